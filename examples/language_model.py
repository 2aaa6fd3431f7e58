"""Adapts a language model from one author to another: how much it learns, how much it forgets.

A character-level GPT-2 is pretrained on four adventures of Sherlock Holmes. It is then adapted to
Romeo and Juliet in several ways, all with the same steps and batches:

* tCURLoRA (`tcur_kernels.peft`): only the cores U of W + s * (C * U * R) are trained;
* matrix CUR ("curlora"): the same with a stack for each matrix, and C and R drawn with CURLoRA's
  inverted probabilities;
* LoRA (`peft`) and full fine-tuning, for comparison.

Each method tries a small grid of learning rates and keeps the one with the lowest perplexity on a
validation part of the new text. The table shows perplexities on held-out parts of both texts: the
new text shows what was learned, the old text what was forgotten. The adapter is then saved, loaded
onto a fresh base and merged, and the logits are compared.

Both texts are in the repository, so nothing is downloaded. You can use your own model instead, in a
directory that ``save_pretrained`` wrote with its tokenizer; then there is no pretraining::

    python examples/language_model.py --model DIR --new-text mine.txt --old-text general.txt \\
        --context 512 --batch 4
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from language_model_texts import TEXTS, Text, batches, characters, read_text, windows
from peft_adapters import adaptable, round_trip, round_trip_note
from plain_table import lay_out
from tcur_kernels.files.whole import replacing
from tcur_kernels.peft import TCURConfig

#: Name -> peft config for a rank; "full" has none and trains every parameter.
METHODS: dict[str, Callable[[int], Any]] = {
    "tcurlora": lambda rank: TCURConfig(rank=rank, task_type="CAUSAL_LM"),
    "curlora": lambda rank: TCURConfig(
        rank=rank, stacks="layer", selection="inverse", task_type="CAUSAL_LM"
    ),
    "lora": lambda rank: LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"),
    "full": lambda rank: None,
}

#: Learning rates that a method tries: cores those of LoRA, at every rank.
RATES = {
    "tcurlora": (5e-3, 1e-2, 2e-2),
    "curlora": (5e-3, 1e-2, 2e-2),
    "lora": (5e-3, 1e-2, 2e-2),
    "full": (1e-3, 2e-3, 4e-3),
}


DEFAULT = ["tcurlora:8", "tcurlora:32", "curlora:8", "lora:1", "lora:8", "full"]


def main() -> None:
    """Pretrains or loads the base, adapts it by every method, prints the table."""
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    torch.manual_seed(args.seed)
    base, encode, decode = load_base(args) if args.model else new_base(args)
    old, new = (read_text(path, encode, args.context) for path in (args.old_text, args.new_text))
    if args.model is None:
        optimise(args, base, old.training, args.pretrain_rate, args.pretrain_steps, "pretraining")
    base.requires_grad_(False).eval()

    results = [{"method": "no adaptation", **perplexities(args, base, old, new), "trained": 0}]
    samples = {"no adaptation": sample(args, base, new, decode)}
    for name in args.methods:
        model, result = adapt(args, name, base, old, new)
        results.append(result)
        samples[name] = sample(args, model, new, decode)
    summary = {
        "settings": {k: v for k, v in vars(args).items() if isinstance(v, int | float | list)},
        "texts": [old.name, new.name],
        "parameters": sum(p.numel() for p in base.parameters()),
        "results": results,
        "samples": samples,
        "seconds": time.perf_counter() - started,
    }
    with replacing(args.output / "results.json") as fresh:
        fresh.write_text(json.dumps(summary, indent=1) + "\n")
    print(report(summary))


def adapt(
    args: argparse.Namespace, name: str, base: nn.Module, old: Text, new: Text
) -> tuple[nn.Module, dict[str, Any]]:
    """Adapts a copy of the base with one method; returns the best model and the results."""
    tried: dict[float, float] = {}
    best: nn.Module | None = None
    seconds = 0.0
    kind, _, digits = name.partition(":")
    rank = int(digits or 1)
    for rate in RATES[kind] if args.rates is None else args.rates:
        torch.manual_seed(args.seed)
        model = adaptable(base, METHODS[kind](rank))
        seconds = optimise(args, model, new.training, rate, args.steps, f"{name}, rate {rate:g}")
        tried[rate] = perplexity(args, model, new.validation)
        if tried[rate] <= min(tried.values()):
            best = model
    assert best is not None
    trained = sum(p.numel() for p in best.parameters() if p.requires_grad)
    result = {
        "method": name,
        **perplexities(args, best, old, new),
        "trained": trained,
        "seconds_per_step": seconds / args.steps,
        "rate": min(tried, key=tried.__getitem__),
        "validation": {f"{rate:g}": value for rate, value in tried.items()},
    }
    if isinstance(best, PeftModel):
        inputs = {"input_ids": windows(new.test, args.context)[:1]}
        result |= round_trip(best, base, args.output / name.replace(":", "_"), inputs)
    return best, result


def optimise(
    args: argparse.Namespace, model: nn.Module, numbers: Tensor, rate: float, steps: int, label: str
) -> float:
    """Trains with AdamW, a short warm-up and a cosine decay; returns the seconds it took."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    warm_up = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, (1 + math.cos(math.pi * step / steps)) / 2),
    )
    generator = torch.Generator().manual_seed(args.seed)
    model.train()
    started = time.perf_counter()
    bar = tqdm(range(steps), desc=f"{label:<24}", ncols=100)
    for _ in bar:
        ids = batches(numbers, args.context, args.batch, generator)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()
    return time.perf_counter() - started


@torch.no_grad()
def perplexity(args: argparse.Namespace, model: nn.Module, numbers: Tensor) -> float:
    """exp of the mean negative log-likelihood per token, over consecutive windows."""
    losses = []
    for ids in windows(numbers, args.context).split(args.batch):
        losses.append(model(input_ids=ids, labels=ids).loss.double() * len(ids))
    return math.exp(torch.stack(losses).sum() / len(windows(numbers, args.context)))


def perplexities(
    args: argparse.Namespace, model: nn.Module, old: Text, new: Text
) -> dict[str, float]:
    """The perplexities on the held-out parts of both texts."""
    return {
        f"{kind} text": perplexity(args, model, text.test)
        for kind, text in (("new", new), ("old", old))
    }


@torch.no_grad()
def sample(
    args: argparse.Namespace, model: nn.Module, text: Text, decode: Callable[[list[int]], str]
) -> str:
    """A continuation of the beginning of the held-out part, drawn from the model."""
    torch.manual_seed(args.seed)
    prompt = text.test[: args.context // 4][None]
    settings = {"do_sample": True, "top_k": 0, "temperature": 0.8, "pad_token_id": 0}
    new = args.context - prompt.shape[1]
    ids = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, **settings
    )
    return decode(ids[0, prompt.shape[1] :].tolist())


def new_base(args: argparse.Namespace) -> tuple[nn.Module, Any, Any]:
    """An untrained character-level GPT-2, and functions that encode and decode text."""
    encode, decode = characters(args.old_text, args.new_text)
    size = max(encode("".join(sorted(set(args.old_text.read_text() + args.new_text.read_text())))))
    config = GPT2Config(
        vocab_size=size + 1,
        n_positions=args.context,
        n_embd=args.width,
        n_layer=args.layers,
        n_head=args.width // 32 if args.width >= 32 else 1,
        bos_token_id=0,
        eos_token_id=None,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config), encode, decode


def load_base(args: argparse.Namespace) -> tuple[nn.Module, Any, Any]:
    """Loads a model and its tokenizer from a directory."""
    if not (args.model / "config.json").is_file():
        raise SystemExit(f"--model: expected a directory with config.json, got {args.model}")
    tokenizer = AutoTokenizer.from_pretrained(args.model, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(args.model, local_files_only=True)
    return model, lambda text: tokenizer(text)["input_ids"], tokenizer.decode


def report(summary: dict[str, Any]) -> str:
    """The table, and how much loading and merging changed the logits."""
    old, new = summary["texts"]
    rows = [("", f"ppl {new}", f"ppl {old}", "trained", "file KB", "rate", "s/step")]
    notes = []
    for result in summary["results"]:
        row = [result["method"], *(f"{result[f'{kind} text']:.3f}" for kind in ("new", "old"))]
        row.append(f"{result['trained']:,}")
        row.append(f"{result['kilobytes']:.1f}" if "kilobytes" in result else "-")
        row.append(f"{result['rate']:g}" if "rate" in result else "-")
        row.append(f"{result['seconds_per_step']:.3f}" if "rate" in result else "-")
        rows.append(tuple(row))
        if "loaded" in result:
            notes.append(round_trip_note(result))
    head = f"{summary['parameters']:,} parameters; perplexity per token on held-out text"
    lines = [head, "", *lay_out(rows), *notes, "", f"{summary['seconds']:.0f} s in all"]
    return "\n".join(lines)


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses and checks the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, help="directory of a causal language model; default: pretrain here")
    add("--old-text", type=Path, default=TEXTS / "sherlock_holmes.txt", help="of the pretraining")
    add("--new-text", type=Path, default=TEXTS / "romeo_and_juliet.txt", help="to adapt to")
    add("--methods", nargs="+", metavar="NAME:RANK", default=DEFAULT, help=" ".join(DEFAULT))
    add("--rates", type=float, nargs="+", help="learning rates to try; default: by method")
    add("--steps", type=int, default=100, help="of adaptation")
    add("--pretrain-steps", type=int, default=600)
    add("--pretrain-rate", type=float, default=2e-3)
    add("--context", type=int, default=96)
    add("--batch", type=int, default=16)
    add("--width", type=int, default=96)
    add("--layers", type=int, default=4)
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("runs/language_model"))
    add("--smoke", action="store_true", help="a few steps of a tiny model, to see that it runs")
    args = parser.parse_args(arguments)
    for method in args.methods:
        name, _, rank = method.partition(":")
        if name not in METHODS or (name != "full" and not (rank.isdigit() and int(rank))):
            known = ", ".join(f"{one}:RANK" for one in METHODS if one != "full")
            parser.error(f"--methods: expected {known} or full, got {method!r}")
    for name in ("steps", "pretrain_steps", "context", "batch", "layers"):
        if getattr(args, name) < 1:
            option = name.replace("_", "-")
            parser.error(f"--{option}: expected at least 1, got {getattr(args, name)}")
    for name in ("old_text", "new_text"):
        if not getattr(args, name).is_file():
            option = name.replace("_", "-")
            parser.error(f"--{option}: expected a text file, got {getattr(args, name)}")
    if args.smoke:
        args.pretrain_steps, args.steps, args.rates = 3, 3, [1e-2]
        args.width, args.layers, args.context = 16, 2, 32
    return args


if __name__ == "__main__":
    main()
