"""Training and evaluation of the segmentation example; each method has its own process."""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from monai.data import CacheDataset, DataLoader
from monai.inferers import SlidingWindowInferer
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric, HausdorffDistanceMetric
from monai.networks.utils import one_hot
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import RandomSampler

import tcur_kernels as tcur
from progress import Whole
from segmentation_data import build_unetr, load_volumes


@dataclass(frozen=True)
class Method:
    """What a method trains: parameters by prefixes of their names, and cores if it has any."""

    label: str
    trains: tuple[str, ...]
    cores: bool = False
    seconds: float = 0.2  # per step of the demo on two cores, for the progress


DECODER = ("decoder", "out")
#: The first two are compared. The others help to explain the comparison: they show what can be
#: reached without the decoder, and with the whole transformer, which bounds every adapter of it.
METHODS = {
    "decoder": Method("decoder-only", DECODER, seconds=0.19),
    "tcurlora": Method("tCURLoRA", DECODER, cores=True, seconds=0.24),
    "head": Method("output layer only", ("out",), seconds=0.11),
    "core": Method("core + output layer", ("out",), cores=True, seconds=0.19),
    "vit-head": Method("full ViT + output layer", ("out", "vit")),
    "vit": Method("full ViT + decoder", (*DECODER, "vit")),
    "full": Method("full fine-tuning", ("",)),
}
PRETRAINING = Method("pretraining", ("",), seconds=0.27)
PROBE = "probe.safetensors"  # logits of the trained model for one volume, for comparison


@dataclass(frozen=True)
class Job:
    """One training, as it is passed to its process."""

    method: str  # a key of METHODS; any other value means the pretraining
    seed: int
    entries: list[dict[str, str]]
    held_out: list[dict[str, str]]
    weights: Path | None
    output: Path  # what was trained
    whole: Whole  # the program of which this is a stage


@dataclass
class Report:
    """What a training reports."""

    parameters: int = 0
    seconds_per_step: float = 0.0
    megabytes: float = 0.0
    loss: list[float] = field(default_factory=list)
    dice: dict[int, float] = field(default_factory=dict)  # step -> mean on held-out volumes
    core_norm: dict[str, list[float]] = field(default_factory=dict)  # stack -> norm at each step
    grad_norm: dict[str, list[float]] = field(default_factory=dict)


def settle(args: argparse.Namespace) -> None:
    """Settings with which every process of a run begins."""
    if args.smoke:
        torch.set_num_threads(1)  # for tiny work, synchronising threads costs more than it saves
    # MONAI's HD95 passes an argument that MONAI itself deprecated. It also warns of empty
    # predictions, which `evaluate` reports as nan.
    warnings.filterwarnings("ignore", ".*always_return_as_numpy", FutureWarning)
    warnings.filterwarnings("ignore", "the (prediction|ground truth) of class", UserWarning)


def in_own_process(args: argparse.Namespace, job: Job) -> Report:
    """Trains in a fresh process, so that the peak memory is only that of this training."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        report, job.whole.done = pool.submit(run_job, args, job).result()
    return report


def run_job(args: argparse.Namespace, job: Job) -> tuple[Report, float]:
    """Trains with a method and saves the result; returns its report and the progress so far."""
    settle(args)
    torch.manual_seed(job.seed)
    model = build_unetr(args, job.weights)
    if job.method not in METHODS:
        report = fit(
            args, job, model, [{"params": list(model.parameters()), "lr": args.pretrain_lr}]
        )
        torch.save(model.state_dict(), job.output)
        return report, job.whole.done
    groups, adapter = trained_groups(args, model, job.method)
    report = fit(args, job, model, groups, adapter)
    if adapter is None:
        state = {n: p.detach().cpu() for n, p in model.named_parameters() if p.requires_grad}
        save_file(state, job.output)
    else:
        adapter.save(job.output)
    if job.method == "tcurlora":
        image = load_volumes(args, job.held_out[:1], augment=False)[0]["image"]
        save_file({"logits": predict(args, model, image).cpu()}, job.output.with_name(PROBE))
    return report, job.whole.done


def trained_groups(
    args: argparse.Namespace, model: nn.Module, method: str
) -> tuple[list[dict[str, Any]], tcur.Adapter | None]:
    """Freezes what the method freezes; returns optimizer groups for the rest, and the adapter.

    The decoder has the same learning rate in every method. The cores need another one: C and R are
    slices of the weights, with entries of about 0.05, so an entry of U changes W only a little.
    """
    chosen = METHODS[method]
    if chosen.cores:
        adapter = tcur.adapt(
            model,
            rank=args.rank,
            alpha=args.alpha,
            selection=args.selection,
            train_also=[f"{prefix}*" for prefix in chosen.trains],
        )
        cores = [stack.core for stack in adapter.stacks.values()]
        known = set(map(id, cores))
        decoder = [p for p in adapter.parameters() if id(p) not in known]
        return [
            {"params": decoder, "lr": args.decoder_lr},
            {"params": cores, "lr": args.core_lr},
        ], adapter
    decoder, rest = [], []
    for name, parameter in model.named_parameters():
        if not name.startswith(chosen.trains):
            parameter.requires_grad_(False)
        elif name.startswith(DECODER):
            decoder.append(parameter)
        else:
            rest.append(parameter)
    groups = [{"params": decoder, "lr": args.decoder_lr}]
    return groups + ([{"params": rest, "lr": args.vit_lr}] if rest else []), None


def fit(
    args: argparse.Namespace,
    job: Job,
    model: nn.Module,
    groups: list[dict[str, Any]],
    adapter: tcur.Adapter | None = None,
) -> Report:
    """Trains with Adam and batch size 1; learning rates are warmed up and annealed."""
    method = METHODS.get(job.method, PRETRAINING)
    steps = args.pretrain_steps if method is PRETRAINING else args.steps
    volumes = load_volumes(args, job.entries, augment=True)
    held_out = load_volumes(args, job.held_out, augment=False)
    volumes.transform.set_random_state(job.seed)
    order = RandomSampler(
        volumes, num_samples=steps, generator=torch.Generator().manual_seed(job.seed)
    )
    loss_of = DiceCELoss(softmax=True, to_onehot_y=True, include_background=False)
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in groups], total_steps=max(steps, 20), pct_start=0.1
    )
    stacks = adapter.stacks if adapter is not None else {}
    report = Report(parameters=sum(p.numel() for group in groups for p in group["params"]))
    report.core_norm, report.grad_norm = {n: [] for n in stacks}, {n: [] for n in stacks}
    check_at = {round(steps * part / 5) for part in range(1, 6)}
    seconds: list[float] = []
    batches = job.whole.track(
        method.label,
        DataLoader(volumes, batch_size=1, sampler=order),
        steps,
        steps * method.seconds,
        lambda: f"loss {statistics.fmean(report.loss[-20:]):.3f}",
    )
    model.train()
    for step, batch in enumerate(batches, start=1):
        image = batch["image"].as_tensor().to(args.device)
        label = batch["label"].as_tensor().to(args.device)
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = loss_of(model(image), label)
        loss.backward()
        optimizer.step()
        report.loss.append(loss.item())  # waits for the device
        seconds.append(time.perf_counter() - start)
        schedule.step()
        for name, stack in stacks.items():
            assert stack.core.grad is not None
            report.core_norm[name].append(stack.core.norm().item())
            report.grad_norm[name].append(stack.core.grad.norm().item())
        if step in check_at:
            scores = evaluate(args, model, held_out, distances=False)
            report.dice[step] = mean(scores["dice"])
            model.train()
    report.seconds_per_step = statistics.median(seconds)
    report.megabytes = peak_megabytes(args.device)
    return report


def peak_megabytes(device: str) -> float:
    """Peak memory of this process: on the GPU if it uses one, else resident memory."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.is_file():  # on Linux ru_maxrss starts at the parent's peak, but VmHWM does not
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS


@torch.no_grad()
def predict(args: argparse.Namespace, model: nn.Module, image: Tensor) -> Tensor:
    """Logits [1, classes, ...] of a whole volume [channels, ...]."""
    model.eval()
    inferer = SlidingWindowInferer(args.img_size, sw_batch_size=1, overlap=0.25)
    return inferer(torch.as_tensor(image)[None].to(args.device), model)


def evaluate(
    args: argparse.Namespace, model: nn.Module, volumes: CacheDataset, distances: bool = True
) -> dict[str, list[float]]:
    """Dice and, if asked, HD95 in mm of every volume, averaged over the foreground classes.

    The HD95 of an empty prediction is nan.
    """
    metrics: dict[str, DiceMetric | HausdorffDistanceMetric] = {
        "dice": DiceMetric(include_background=False)
    }
    if distances:
        metrics["hd95"] = HausdorffDistanceMetric(include_background=False, percentile=95)
    for volume in volumes:
        logits = predict(args, model, volume["image"]).cpu()
        label = volume["label"].as_tensor()[None]
        predicted = one_hot(logits.argmax(1, keepdim=True), args.out_channels)
        truth = one_hot(label, args.out_channels)
        for name, metric in metrics.items():
            metric(predicted, truth, **({"spacing": args.spacing} if name == "hd95" else {}))
    scores = {name: metric.get_buffer().nanmean(1).tolist() for name, metric in metrics.items()}
    return {n: [v if abs(v) < float("inf") else float("nan") for v in s] for n, s in scores.items()}


def mean(values: Sequence[float]) -> float:
    """Mean of the values that are not nan."""
    return torch.tensor(values).nanmean().item()
