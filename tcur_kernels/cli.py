"""``python -m tcur_kernels``: plans models, inspects, merges and exports adapters; build, times.

Model directories are those of Hugging Face: config.json and safetensors shards.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from .adapters.budget import Budget, within_budget
from .adapters.curves import RANKS, model_curves, plot_curves
from .adapters.file import StoredStack, read_contents
from .adapters.gradients import read_gradients
from .adapters.linear_maps import find_places
from .adapters.lora import SERVED_RANKS, check_served, exact_rank, largest_exact
from .adapters.lora_file import TASK_TYPES
from .adapters.plan import STACKS_BY, Plan, StackPlan, make_plan
from .adapters.streaming import BaseFiles
from .decompose import RULES, Slices
from .decompose.slices import MAX_WORKSPACE
from .files.shards import model_files
from .merge.directory import ModelDirectory, merge_directory
from .merge.lora import DTYPES, lora_of_directory
from .operators.dispatch import build_info
from .operators.factors import CURFactors
from .operators.functional import cur_linear, materialize


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, or 2 after a message about bad input."""
    args = build_parser().parse_args(arguments)
    try:
        args.run(args)
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tcur_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("info", help="what was compiled, and what of it runs here")
    command.set_defaults(run=show_info)

    command = commands.add_parser("plan", help="which layers of a model would be adapted, and how")
    command.add_argument("model_dir", type=Path)
    command.add_argument("--targets", nargs="+", help="names or patterns; default: all by shape")
    command.add_argument("--rank", type=int, help="of all stacks; default: 8")
    command.add_argument("--stacks", choices=STACKS_BY, default="shape")
    command.add_argument(
        "--budget",
        type=int,
        metavar="N",
        help="ranks for so many trained numbers instead, by --gradients; reads the weights",
    )
    command.add_argument(
        "--gradients",
        type=Path,
        metavar="FILE",
        help="what tcur_kernels.collect_gradients returned, kept by safetensors.torch.save_file",
    )
    command.add_argument("--selection", choices=RULES, default="norm", help="of the budget")
    command.add_argument("--verbose", action="store_true", help="a line for every layer")
    command.add_argument(
        "--max-lora-rank",
        type=int,
        metavar="N",
        help=f"which tubal ranks vLLM could serve as LoRA: one of {_listed(SERVED_RANKS)}",
    )
    command.add_argument(
        "--curve",
        type=Path,
        metavar="PNG",
        help="error against rank, drawn here; reads the weights",
    )
    command.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="of the curve")
    command.add_argument("--selections", choices=RULES, nargs="+", default=("norm", "deim"))
    command.set_defaults(run=show_plan)

    command = commands.add_parser("inspect", help="what an adapter file holds")
    command.add_argument("adapter", type=Path)
    command.set_defaults(run=inspect)

    command = commands.add_parser("merge", help="a model directory with an adapter folded in")
    command.add_argument("model_dir", type=Path)
    command.add_argument("adapter", type=Path)
    command.add_argument("-o", "--out", type=Path, required=True, help="a new directory")
    command.set_defaults(run=merge)

    command = commands.add_parser("to-lora", help="an adapter as a LoRA of peft, for servers")
    command.add_argument("model_dir", type=Path)
    command.add_argument("adapter", type=Path)
    command.add_argument("out_dir", type=Path)
    command.add_argument(
        "--rank", type=int, help="of the LoRA, rounded up to a rank of vLLM; default: exact"
    )
    command.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    command.add_argument(
        "--base-model", help="what the config names as the base; default: MODEL_DIR"
    )
    command.add_argument("--task-type", choices=TASK_TYPES, help="of peft; default: none")
    command.add_argument("--verbose", action="store_true", help="a line for every layer")
    command.set_defaults(run=to_lora)

    command = commands.add_parser("bench", help="times the operators on one shape, here")
    for name, value in (("n3", 48), ("n1", 768), ("n2", 768), ("rank", 8), ("tokens", 864)):
        command.add_argument(f"--{name}", type=int, default=value)
    command.add_argument("--rounds", type=int, default=7)
    command.add_argument("--device", default="cpu")
    command.set_defaults(run=bench)
    return parser


def show_info(args: argparse.Namespace) -> None:
    """Prints `build_info`."""
    for key, value in build_info().items():
        if isinstance(value, dict):
            print(f"{key}:")
            for inner, fact in value.items():
                print(f"  {inner}: {_listed(fact)}")
        else:
            print(f"{key}: {_listed(value)}")


def show_plan(args: argparse.Namespace) -> None:
    """Prints the plan of a model and, if asked, its curves; only the curves need weights."""
    directory = ModelDirectory(args.model_dir)
    model = directory.skeleton()
    if args.max_lora_rank is not None:
        check_served("--max-lora-rank", args.max_lora_rank)
    for option, value in (("--curve", args.curve), ("--budget", args.budget)):
        if value is not None:
            model_files(option, directory.path)
    if (args.budget is None) != (args.gradients is None):
        raise ValueError("--gradients: expected with --budget and only there, got one of the two")
    if args.budget is not None and args.rank is not None:
        raise ValueError(f"--rank: expected none beside --budget, got {args.rank}")
    rank = args.rank or (8 if args.budget is None else 1)
    plan = make_plan(model, args.targets, rank, stacks=args.stacks, loaded=False)
    if args.budget is not None:
        files = BaseFiles(model, directory.path, MAX_WORKSPACE, progress=True)

        def slices_of(stack: StackPlan) -> Slices:
            source = files.slices_of(stack, any_dtype=True)
            assert source is not None  # the skeleton has no weights
            return source

        came = read_gradients(args.gradients)
        budget = Budget(args.budget)
        plan, _ = within_budget(plan, budget, came, slices_of, args.selection, generator=None)
    print(plan.describe() if args.verbose else f"{plan}\n(every layer: --verbose)")
    cores = sum(stack.n3 * stack.rank**2 for stack in plan.stacks)
    total = sum(parameter.numel() for parameter in model.parameters())
    what = f"rank {rank}" if args.budget is None else f"budget {args.budget:,}"
    print(f"{what}: {cores:,} trained numbers, {cores / total:.2e} of {total:,}")
    quantised = getattr(getattr(model, "config", None), "quantization_config", None)
    if quantised:
        method = quantised.get("quant_method", "a method without a name")
        print(
            f"config.json: its weights are quantised ({method}); adapt takes layers of "
            "bitsandbytes, torchao and HQQ, which run through the factors, and leaves others out"
        )
    if args.max_lora_rank is not None:
        show_lora_ranks(model, plan, args.max_lora_rank)
    if args.curve is not None:
        curves = model_curves(
            model, plan, args.ranks, args.selections, args.model_dir, progress=True
        )
        print(*curves, sep="\n")
        plot_curves(curves, args.curve)
        print(f"written: {args.curve}")


def show_lora_ranks(model: nn.Module, plan: Plan, served: int) -> None:
    """Prints for each stack the LoRA rank that its layers need, and what ``served`` allows."""
    print(f"as LoRA, served with --max-lora-rank {served}:")
    places = find_places(model)
    for stack in plan.stacks:
        if {places[member.module].layout for member in stack.members} - {"matrix", "transposed"}:
            print(f"  stack {stack.name}: convolutions and experts are not written as LoRA")
            continue
        largest = largest_exact(stack, served)
        can = f"at most rank {largest}" if largest else f"none, {stack.n3} matrices are too many"
        print(
            f"  stack {stack.name}: rank {stack.rank} takes LoRA rank {exact_rank(stack)}; "
            f"exact within {served}: {can}"
        )


def inspect(args: argparse.Namespace) -> None:
    """Prints the contents of an adapter file."""
    contents = read_contents(args.adapter)
    size = args.adapter.stat().st_size
    print(f"{args.adapter}: {size:,} bytes, {len(contents.stacks)} stacks")
    if contents.metadata:
        print("metadata:")
        print(textwrap.indent(json.dumps(contents.metadata, indent=2, ensure_ascii=False), "  "))
    for stored in contents.stacks:
        plan = stored.plan
        names = [member.module for member in plan.members]
        print(
            f"stack {plan.name}: {plan.n3} slices of {plan.n1} x {plan.n2}, rank {stored.rank}, "
            f"basis {stored.basis}, alpha {stored.alpha:g}, mode {stored.mode}, "
            f"precision {stored.precision}"
        )
        print(f"  core: norm {stored.core.norm():.4g}, largest {stored.core.abs().max():.4g}")
        print(f"  layers: {names[0]}" + (f" … {names[-1]} ({len(names)})" if names[1:] else ""))
        print(f"  rows {list(stored.record.rows)}, columns {list(stored.record.columns)}")
        print(f"  C and R: {'in the file' if stored.factors else 'slices of the base'}")
        base = stored.record.base
        print(f"  base: {base.dtype}, sha256 of C and R {base.sha256}")
    for kind, title in (("trained", "trained beside the cores"), ("buffer", "buffers")):
        held = {name: value for (k, name), value in contents.learned.items() if k == kind}
        if held:
            numbers = sum(value.numel() for value in held.values())
            print(f"{title}: {len(held)} tensors, {numbers:,} numbers")
            print(
                "".join(f"  {name} {list(value.shape)}\n" for name, value in held.items()), end=""
            )


def merge(args: argparse.Namespace) -> None:
    """Writes the merged directory, with a progress bar over the shards."""
    directory = ModelDirectory(args.model_dir)
    contents = read_contents(args.adapter)

    def progress(files: Iterable[Path]) -> Iterable[Path]:
        bar: Iterable[Path] = tqdm(files, desc="merging", unit="shard")
        return bar

    left_out = merge_directory(directory, contents, args.out, progress)
    print(f"written: {args.out}")
    if left_out:
        print(f"not copied, as it is without the adapter: {', '.join(left_out)}")


def to_lora(args: argparse.Namespace) -> None:
    """Writes the LoRA directory, with a progress bar over the stacks, and prints the errors."""
    directory = ModelDirectory(args.model_dir)
    contents = read_contents(args.adapter)

    def progress(stacks: Iterable[StoredStack]) -> Iterable[StoredStack]:
        bar: Iterable[StoredStack] = tqdm(stacks, desc="exporting", unit="stack")
        return bar

    written = lora_of_directory(
        directory,
        contents,
        args.out_dir,
        args.rank,
        DTYPES[args.dtype],
        args.base_model,
        args.task_type,
        progress,
    )
    print(written.describe() if args.verbose else written)


def bench(args: argparse.Namespace) -> None:
    """Times the operators on random data, after a check against plain torch in float64."""
    torch.manual_seed(0)
    device = torch.device(args.device)
    sizes = (args.n3, args.n1, args.n2)
    weight = torch.randn(sizes, device=device) / args.n2**0.5
    factors = CURFactors(weight[:, :, : args.rank].clone(), weight[:, : args.rank].clone())
    core = torch.randn(args.n3, args.rank, args.rank, device=device)
    out = torch.empty_like(weight)
    x = torch.randn(args.tokens, args.n2, device=device)
    last = args.n3 - 1

    def eager() -> torch.Tensor:
        parts = (torch.fft.rfft(t, dim=0) for t in (factors.lateral, core, factors.horizontal))
        c, u, r = parts
        return weight + torch.fft.irfft(c @ u @ r, n=args.n3, dim=0)

    def exact() -> torch.Tensor:
        c, u, r = (
            torch.fft.rfft(t.double(), dim=0) for t in (factors.lateral, core, factors.horizontal)
        )
        return torch.fft.irfft(c @ u @ r, n=args.n3, dim=0)

    contenders: dict[str, Callable[[], torch.Tensor]] = {
        "stream (W + W, same bytes)": lambda: torch.add(weight, weight, out=out),
        "materialize": lambda: materialize(weight, factors, core, out=out),
        "the same by torch.fft": eager,
        "nn.Linear, one slice": lambda: x @ weight[last].T,
        "cur_linear, one slice": lambda: cur_linear(x, weight[last], None, factors, core, last),
    }
    wanted = exact()
    error = (materialize(weight, factors, core).double() - weight.double() - wanted).norm()
    print(f"{json.dumps(build_info()['backends'])}, {torch.get_num_threads()} threads, {device}")
    print(f"n3 n1 n2 {sizes}, rank {args.rank}, {args.tokens} tokens, fp32, {args.rounds} rounds")
    print(f"materialize: relative error of the update {error / wanted.norm():.1e}")
    for run in contenders.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(args.rounds):  # in turn: what disturbs a round disturbs all
        for name, run in contenders.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            seconds[name].append(time.perf_counter() - start)
    for name, values in seconds.items():
        print(f"  {name:28} {1e3 * statistics.median(values):9.3f} ms")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _listed(fact: object) -> str:
    return ", ".join(map(str, fact)) if isinstance(fact, list | tuple) else str(fact)
