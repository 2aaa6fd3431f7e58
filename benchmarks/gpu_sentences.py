"""Sentences with figures about GPUs, written from the newest rows like the tables beside them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from .documents import paragraph, span
from .gpu_report import BASELINES, PLAIN, Found, Row, cases, devices, newest
from .sass import model

#: What was aimed at, in per cent: n3 -> of a copy, fp32 to fp32; and of a dense gradient's floor.
COPY, DENSE = {64: 85, 128: 65}, 60
STEP = 1.25  # what was aimed at for a step, beside the frozen model's


OURS = ("stack", "cuda")


def _shares(found: Found, pattern: str) -> list[float]:
    """Per cent of a copy that the CUDA kernels reach, in the cases whose names match."""
    named = {case: row for (case, form, how), row in found.items() if (form, how) == OURS}
    chosen = [row for case, row in named.items() if re.fullmatch(pattern, case)]
    return [float(row["percent_of_copy"]) for row in chosen if row["percent_of_copy"]]


def _reached(shares: Sequence[float], aim: float) -> str:
    """How many of them are at least the aim, as they are rounded in the table."""
    return f"reached by {sum(round(share) >= aim for share in shares)} of {len(shares)}"


def rates(recorded: Sequence[Row]) -> str:
    """What a copy moves."""
    said = []
    for device in devices(recorded):
        for (case, contender, _), row in newest(recorded, "rates", device).items():
            if contender == "copy" and "TB/s" in row["note"]:
                said.append(f"On {device} a {case} moves {row['note']}.")
    return paragraph(" ".join(said))


def _materialize(found: Found) -> list[str]:
    said = []
    for n3, aim in COPY.items():
        shares = _shares(found, rf"\w+ {n3}x.* fp32->fp32")
        if shares:
            said.append(
                f"fp32 to fp32 at n3 = {n3} reaches {span(shares, '.0f')} % of a copy. The aim of "
                f"{aim} % is {_reached(shares, aim)}."
            )
    for pattern, name in (
        (r"vit_b\w+ .*fp32->fp32", "The ViT-B stacks in fp32 reach"),
        (r".*fp32->bf16", "From fp32 to bf16 it is"),
        (r".*bf16->bf16", "From bf16 to bf16 it is"),
    ):
        shares = _shares(found, pattern)
        if shares:
            said.append(f"{name} {span(shares, '.0f')} % of a copy.")
    return said


def _plain(found: Found) -> list[str]:
    each = []
    for name in BASELINES:
        ratios = [
            float(row["ms"]) / float(found[(case.removesuffix(PLAIN), *OURS)]["ms"])
            for (case, contender, _), row in found.items()
            if contender == name
            and case.endswith(PLAIN)
            and (case.removesuffix(PLAIN), *OURS) in found
        ]
        if ratios:
            each.append(f"{name} {span(ratios, '.1f')}")
    return [f"Of our time, plain torch takes these multiples: {', '.join(each)}."] if each else []


def _gradients(dense: Found, tokens: Found) -> list[str]:
    rows = [row for (_, _, how), row in dense.items() if how == "cuda" and row["percent_of_copy"]]
    shares = [float(row["percent_of_copy"]) for row in rows]
    said = []
    if shares:
        said.append(
            f"The dense gradient reaches {span(shares, '.0f')} % of its floor. The aim of {DENSE} "
            f"% is {_reached(shares, DENSE)}."
        )
    for precision in ("fp32", "bf16"):
        notes = [
            re.search(r"(\d+) % of floor", row["note"])
            for (case, _, how), row in tokens.items()
            if how == "cuda" and case.endswith(precision)
        ]
        shares = [float(note[1]) for note in notes if note]
        if shares:
            said.append(f"From tokens in {precision} it reaches {span(shares, '.0f')} %.")
    return said


def _step(found: Found, case: str) -> list[str]:
    each = [
        f"{float(ours['ms']) / float(other['ms']):.2f} of {whose} time {how}"
        for name, whose, backend, how in (
            ("lora_8", "LoRA's", "graph", "as a graph"),
            ("lora_8", "LoRA's", "wall", "launched"),
            ("frozen", "the frozen model's", "graph", "as a graph"),
        )
        if (ours := found.get((case, "tcur", backend)))
        and (other := found.get((case, name, backend)))
    ]
    said = []
    if each:
        said.append(
            f"The step ({case}) takes {', '.join(each)}. Of the frozen model's, {STEP} was the aim."
        )
    for name, whose in (("tcur", "Our step"), ("frozen", "That of the frozen model")):
        row = found.get((case, name, "kernels"))
        launches = re.match(r"(\d+) launches", row["note"]) if row else None
        if launches:
            said.append(f"{whose} has {launches[1]} launches.")
    return said


def _serving(found: Found) -> list[str]:
    each = []
    for name in ("64 adapters", "4096 adapters", "loop of 64"):
        ratios = [
            float(found[case, name, ""]["ms"]) / float(found[case, "1 adapter", ""]["ms"])
            for case in cases(found)
            if {(case, name, ""), (case, "1 adapter", "")} <= found.keys()
        ]
        each += [f"{name} {span(ratios)}"] if ratios else []
    return [f"Serving, of the time with one adapter: {', '.join(each)}."] if each else []


def _groups(found: Found) -> list[str]:
    groups = {
        "n3 = 47 and 127": r"(47|127)x.*",
        "r = 16": r".*x16 .*",
        "r = 32": r".*x32 .*",
        "r = 4 and 8 at n3 = 48 and more, other than these": r"(48|64|96|128)x\d+x\d+x[48] .*",
    }
    shares = {name: _shares(found, pattern) for name, pattern in groups.items()}
    each = [f"{span(some, '.0f')} % at {name}" for name, some in shares.items() if some]
    return [f"Over n3 and r, fp32 reaches these shares of a copy: {'; '.join(each)}."] * bool(each)


def reached(recorded: Sequence[Row]) -> str:
    """What was reached of what was aimed at, as a list."""
    points = []
    for device in devices(recorded):
        found = {
            name: newest(recorded, name, device)
            for name in ("materialize", "core_grad_dense", "core_grad_tokens", "step", "serving")
        }
        said = [
            _materialize(found["materialize"]),
            _plain(found["materialize"]),
            _gradients(found["core_grad_dense"], found["core_grad_tokens"]),
            *(_step(found["step"], case) for case in cases(found["step"])),
            _serving(found["serving"]),
            _groups(newest(recorded, "sweep", device)),
        ]
        points += [f"On {device}: {' '.join(one)}" for one in said if one]
    return "".join(paragraph(f"- {point}", "  ") for point in points)


def prepare(recorded: Sequence[Row]) -> str:
    """What ``prepare_kernel`` took, whose name Nsight Compute cut off; it is launched first."""
    said = []
    for device in devices(recorded):
        first = {
            row["case"]: row
            for row in reversed(recorded)
            if (row["section"], row["device"], row["backend"]) == ("ncu", device, "cuda")
            and row["case"].startswith("materialize")
            and row["contender"].startswith("<")
        }
        if first:
            micros = span([1e3 * float(row["ms"]) for row in first.values()], ".0f")
            issue = [re.search(r"issue % ([\d.]+)", row["note"]) for row in first.values()]
            busy = span([float(match[1]) for match in issue if match], ".0f")
            said.append(f"On {device} it took {micros} µs and {busy} % of the issue slots.")
    return paragraph(" ".join(said))


def modelled(recorded: Sequence[Row]) -> str:
    """What the model of ceilings takes a GPU to be."""
    del recorded
    each = [
        f"The {one.name} has {one.multiprocessors} multiprocessors at {one.gigahertz} GHz, and "
        f"copies {one.copy_tb_s} TB/s."
        for one in model.DEVICES
    ]
    return paragraph(" ".join(each))


#: Name of the marks in the documents -> what writes the text between them.
SENTENCES: dict[str, Callable[[Sequence[Row]], str]] = {
    "gpu_rates_says": rates,
    "gpu_reached_says": reached,
    "gpu_prepare_says": prepare,
    "gpu_model_says": modelled,
}
