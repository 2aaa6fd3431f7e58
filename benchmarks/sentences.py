"""Sentences with figures, written from the newest rows like the tables beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from textwrap import fill

from . import cost_rule, materialize, methods

#: (device, case) -> contender -> milliseconds, for one operation.
Values = Mapping[tuple[str, str], Mapping[str, float]]


def _by_device(values: Values) -> dict[str, dict[str, Mapping[str, float]]]:
    found: dict[str, dict[str, Mapping[str, float]]] = {}
    for (device, case), value in values.items():
        found.setdefault(device, {})[case] = value
    return found


def _range(numbers: Sequence[float], digits: int = 2) -> str:
    least, most = (f"{number:.{digits}f}" for number in (min(numbers), max(numbers)))
    return least if least == most else f"{least} to {most}"


def stream(values: Values) -> str:
    """What a stream takes for a weight, on every device."""
    said = []
    for device, cases in _by_device(values).items():
        known = materialize.CASES.keys() & cases.keys()
        each = [1e6 * cases[c]["stream"] / math.prod(materialize.CASES[c][:3]) for c in known]
        if each:
            said.append(f"It takes {_range(each)} ns per weight in the rows of {device}.")
    return " ".join(said)


def rule(values: Values) -> str:
    """How often the rule of `operators.cost` takes the fastest way, on every device."""
    said = []
    for device, cases in _by_device(values).items():
        faster = {
            case: min(way for name, way in value.items() if name != "auto") / value["auto"]
            for case, value in cases.items()
            if case in cost_rule.CASES
        }
        missed = {case: 1 - ratio for case, ratio in faster.items() if ratio < 0.99}
        said.append(
            f"On {device} the rule's way is the fastest or within 1 % of it in "
            f"{len(faster) - len(missed)} of {len(faster)} cases."
        )
        if missed:
            worst = max(missed, key=missed.__getitem__)
            said.append(f"At worst another way takes {100 * missed[worst]:.0f} % less ({worst}).")
    return " ".join(said)


def step(values: Values) -> str:
    """What a step costs over the frozen model's, beside its floor by operations."""
    width, rank = methods.WIDTH, methods.RANK
    blocks = methods.BLOCKS
    # z and p of a layer take 2 q (n1 + n2) operations for each token, its two products 4 n1 n2. The
    # 4 layers of attention in a block share a stack, and three of them share z.
    attention, mlp = 4 * blocks * rank, blocks * rank
    layers = 4 * 4 * width**2 + 2 * 4 * 4 * width**2
    added = 2 * attention * width * (2 + 4) + 2 * 2 * mlp * 5 * width
    said = [f"By operations the floor is {1 + added / layers:.2f} of the frozen model's step."]
    for device, cases in _by_device(values).items():
        ratios = [value["tcur"] / value["frozen"] for value in cases.values()]
        beside = [value["tcur"] / value["lora"] for value in cases.values()]
        said.append(f"On {device} it is {_range(ratios)}, and {_range(beside)} of LoRA's step.")
    return " ".join(said)


def serving(values: Values) -> str:
    """What a thousand adapters cost beside one by the same products."""
    said = []
    for device, cases in _by_device(values).items():
        each = " and ".join(
            f"{value['thousand'] / value['one_by_factors']:.2f} ({case})"
            for case, value in cases.items()
        )
        said.append(f"On {device} a thousand cost {each} of one by the factors.")
    return " ".join(said)


def small(values: Values) -> str:
    """Our step of a small model beside LoRA's and full fine-tuning's."""
    said = []
    for device, cases in _by_device(values).items():
        for case, value in cases.items():
            ranks = sorted(int(name[5:]) for name in value if name.startswith("tcur_"))
            each = ", ".join(
                f"{value[f'tcur_{r}'] / value['lora_8']:.2f} of LoRA's and "
                f"{value[f'tcur_{r}'] / value['full']:.2f} of full fine-tuning's at r = {r}"
                for r in ranks
            )
            said.append(f"On {device} ({case}) our step takes {each}.")
    return " ".join(said)


#: name in the marks -> the operation whose rows it speaks of, and what writes it.
SENTENCES: dict[str, tuple[str, Callable[[Values], str]]] = {
    "stream_says": ("materialize", stream),
    "cost_rule_says": ("cost_rule", rule),
    "step_says": ("step", step),
    "serving_says": ("serving", serving),
    "small_says": ("small", small),
}


def written(name: str, values: Values) -> str:
    """The sentences of that name, as a paragraph of the page."""
    return fill(SENTENCES[name][1](values), 100, break_on_hyphens=False) + "\n"
