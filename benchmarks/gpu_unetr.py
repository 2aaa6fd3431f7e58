"""Times a training step of a whole UNETR: forward, Dice loss, backward, optimizer. Needs MONAI.

All methods train the decoder, as in the paper. They differ in how they train the transformer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch import nn

import tcur_kernels as tcur

from .gpu_bench import Bench
from .gpu_clock import Contender, Run
from .gpu_models import kernels
from .gpu_rows import Row

BATCH, CLASSES = 4, 14
#: Voxels per edge of the volume, and whether the step runs under autocast to bf16.
CASES = ((96, True), (96, False), (128, True))
SIZES = {"feature_size": 16, "hidden_size": 768, "mlp_dim": 3072, "num_heads": 12}
TINY_SIZES = {"feature_size": 4, "hidden_size": 48, "mlp_dim": 96, "num_heads": 4}
DECODER = "decoder"
RATIOS = ("full", "lora_32")


def lora(model: nn.Module) -> nn.Module:
    """peft's LoRA of rank 32 on every linear layer of the transformer's blocks."""
    import peft

    targets = ["linear1", "linear2", "qkv", "out_proj"]
    model = peft.inject_adapter_in_model(peft.LoraConfig(r=32, target_modules=targets), model)
    for name, parameter in model.named_parameters():
        if name.startswith(DECODER):
            parameter.requires_grad_(True)
    return model


def adapted(model: nn.Module, rank: int, how: dict[str, str]) -> nn.Module:
    """tCURLoRA at a rank, with further settings of `tcur.adapt`."""
    adapter = tcur.adapt(model, rank=rank, train_also=(f"{DECODER}*",), **how)  # type: ignore[arg-type]
    with torch.no_grad():
        for stack in adapter.stacks.values():
            stack.core.normal_(std=1e-3)
    return model


METHODS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "full": lambda model: model.requires_grad_(True),
    "lora_32": lora,
    "tcur_8": partial(adapted, rank=8, how={}),
    "curlora_2": partial(adapted, rank=2, how={"stacks": "layer", "selection": "inverse"}),
}


def run(bench: Bench) -> None:
    """Measures time, and peak memory above the model, for two sizes of volumes."""
    if find_spec("monai") is None:
        bench.rows.add(Row("unetr", "", "", note="absent: no MONAI"))
        return
    for edge, autocast in ((32, False),) if bench.tiny else CASES:
        batch = 1 if bench.tiny else BATCH
        case = f"{batch} x {edge}^3 {'bf16 autocast' if autocast else 'fp32'}"
        bench.piece("unetr", case, partial(_steps, bench, case, batch, edge, autocast))


def _steps(bench: Bench, case: str, batch: int, edge: int, autocast: bool) -> None:
    from monai.losses import DiceCELoss
    from monai.networks.nets import UNETR

    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    sizes = TINY_SIZES if bench.tiny else SIZES
    base = UNETR(in_channels=1, out_channels=CLASSES, img_size=(edge,) * 3, **sizes)
    base = base.to(bench.device)
    image = torch.randn(batch, 1, edge, edge, edge, device=bench.device)
    label = torch.randint(0, CLASSES, image.shape, device=bench.device)
    loss_of = DiceCELoss(softmax=True, to_onehot_y=True, include_background=False)
    launched: dict[str, Run] = {}

    def make(name: str) -> list[Run]:
        model = METHODS[name](copy.deepcopy(base)).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5)

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast(bench.device.type, torch.bfloat16, enabled=autocast):
                logits = model(image)
            loss_of(logits.float(), label).backward()
            optimizer.step()

        launched[name] = step
        return [step]

    with torch.no_grad():
        base(image)  # allocate library workspaces before measuring
    contenders = [Contender(name, "wall", partial(make, name), "wall") for name in METHODS]
    bench.race("unetr", case, contenders, ratios=RATIOS)
    for name, step in launched.items() if bench.clock.on_gpu else ():
        row = Row("unetr", case, name, "kernels")
        bench.guarded(row, partial(kernels, bench, row, step))
