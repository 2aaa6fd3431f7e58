"""transformers' Trainer and accelerate run unchanged; conversion to LoRA."""

import copy

import peft
import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import PeftModel, get_peft_model

from hf_models import HF_MODELS, IS_FOUR, PEFT_SAYS, gpt2, output
from plain import with_updates
from tcur_kernels.peft import TCURConfig
from tolerance import assert_composition_close

pytestmark = [pytest.mark.filterwarnings(text) for text in PEFT_SAYS]


def checkpoints(is_on):
    """Settings of the Trainer; those of transformers 4 are reentrant unless one says otherwise."""
    if not IS_FOUR:
        return {"activation_checkpointing": is_on}
    how = {"use_reentrant": False} if is_on else None
    return {"gradient_checkpointing": is_on, "gradient_checkpointing_kwargs": how}


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def cores(model):
    return {name: p for name, p in model.named_parameters() if name.endswith(".core")}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainer_of_transformers(tmp_path, checkpointing):
    base = gpt2()
    model = get_peft_model(copy.deepcopy(base), TCURConfig(rank=2, task_type="CAUSAL_LM"))
    examples = [{"input_ids": ids, "labels": ids} for ids in torch.randint(50, (16, 9))]
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        **checkpoints(checkpointing),
        max_steps=4,
        learning_rate=0.1,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model=model, args=settings, train_dataset=examples)
    trainer.train()
    assert all((core != 0).all(dim=(1, 2)).all() for core in cores(model).values())
    resumed = get_peft_model(copy.deepcopy(base), TCURConfig(rank=2, task_type="CAUSAL_LM"))
    trainer = transformers.Trainer(model=resumed, args=settings, train_dataset=examples)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    inputs = {"input_ids": examples[0]["input_ids"][None]}
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "run" / "checkpoint-4")
    with torch.no_grad():
        for one in (model, resumed, loaded):
            one.eval()
        assert torch.equal(output(resumed, inputs), output(model, inputs))
        assert torch.equal(output(loaded, inputs), output(model, inputs))


def test_accelerate():
    """Mixed precision and accumulation, and the checkpoint of the unwrapped model."""
    AcceleratorState._reset_state(reset_partial_state=True)  # that of the Trainer before
    accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2, cpu=True)
    model = get_peft_model(gpt2(), TCURConfig(rank=2, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW(cores(model).values(), lr=0.1)
    data = torch.utils.data.DataLoader(torch.randint(50, (8, 9)), batch_size=2)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    before = {name: core.detach().clone() for name, core in cores(model).items()}
    for ids in data:
        with accelerator.accumulate(model):
            loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    assert torch.isfinite(loss)
    for name, core in cores(model).items():
        assert core.dtype == torch.float32
        assert not torch.equal(core, before[name])
    assert accelerator.unwrap_model(model).base_model.prefix == "tcur_"


def with_low_rank(base, model, rank):
    """A copy of ``base`` with the updates beside its weights, as LoRA has them: two products."""
    halves = []

    def halve(update):
        u, s, v = torch.linalg.svd(update, full_matrices=False)
        halves.append((u[:, :rank] * s[:rank], v[:rank]))
        return torch.zeros_like(update)

    twin = with_updates(base, model, change=halve)
    layers = model.base_model.model.named_modules()
    names = [name for name, layer in layers if hasattr(layer, "tcur_places")]
    for name, (left, right) in zip(names, halves, strict=True):
        layer = twin.get_submodule(name)
        first, second = (right.T, left.T) if isinstance(layer, torch.nn.Linear) else (left, right)
        layer.register_forward_hook(
            lambda _, inputs, y, first=first, second=second: y + inputs[0] @ first @ second
        )
    return twin


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("name", ["gpt2", "llama", "unetr"])
def test_conversion_to_lora_is_exact_at_rank_n3_r(name):
    lora = pytest.importorskip("peft.tuners.lora.conversion", reason="came with peft 0.19")
    make, inputs, task = HF_MODELS[name]
    base, inputs = make().eval(), inputs()
    # Stacks of 2 to 8 slices of rank 1: updates of rank 8 at most.
    model = get_peft_model(copy.deepcopy(base), TCURConfig(rank=1, task_type=task)).eval()
    with torch.no_grad():
        for core in cores(model).values():
            core.normal_()
    assert model.supports_lora_conversion()
    rank = max(stack.n3 for stack in model.plans["default"].stacks)
    double = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad():
        y = output(model, inputs)
        exact = output(with_updates(copy.deepcopy(base).double(), model), double)
        outputs = {}
        for chosen in (rank, 1):
            config, weights = lora.convert_to_lora(model, rank=chosen)
            converted = get_peft_model(copy.deepcopy(base), config).eval()
            peft.set_peft_model_state_dict(converted, weights)
            outputs[chosen] = output(converted, inputs)
        change = (y - output(base, inputs)).norm()
    assert (outputs[1] - y).norm() > 0.1 * change

    assert_composition_close(y, lambda: output(with_updates(base, model), inputs), exact)
    assert_composition_close(
        outputs[rank], lambda: output(with_low_rank(base, model, rank), inputs), exact
    )
