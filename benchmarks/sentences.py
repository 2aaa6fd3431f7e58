"""Sentences with figures, written from the newest rows like the tables beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from . import cost_rule, materialize, methods, scaling
from .documents import paragraph, span

#: (device, case) -> contender -> milliseconds, for one operation.
Values = Mapping[tuple[str, str], Mapping[str, float]]


def _by_device(values: Values) -> dict[str, dict[str, Mapping[str, float]]]:
    found: dict[str, dict[str, Mapping[str, float]]] = {}
    for (device, case), value in values.items():
        found.setdefault(device, {})[case] = value
    return found


def _ratios(cases: Mapping[str, Mapping[str, float]], top: str, bottom: str) -> list[float]:
    """Of two contenders, in every case that has both."""
    return [value[top] / value[bottom] for value in cases.values() if {top, bottom} <= value.keys()]


def stream(values: Values) -> str:
    """What a stream takes for a weight, on every device."""
    said = []
    for device, cases in _by_device(values).items():
        known = materialize.CASES.keys() & cases.keys()
        each = [1e6 * cases[c]["stream"] / math.prod(materialize.CASES[c][:3]) for c in known]
        if each:
            said.append(f"It takes {span(each)} ns per weight in the rows of {device}.")
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


def _operations() -> tuple[float, float]:
    """Multiplications and additions of a token in a block: of its frozen layers, and of z and p.

    A product takes 2 n1 n2. z and p of a layer take 2 q (n1 + n2); the 4 layers of attention in a
    block share a stack, and three of them share z. What projects y takes as many.
    """
    width, rank, blocks = methods.WIDTH, methods.RANK, methods.BLOCKS
    attention, mlp = 4 * blocks * rank, blocks * rank
    layers = 2 * 4 * width**2 + 2 * 2 * 4 * width**2
    return layers, 2 * attention * width * (2 + 4) + 2 * 2 * mlp * 5 * width


def step(values: Values) -> str:
    """What a step costs over the frozen model's, beside its floor by operations."""
    layers, added = _operations()
    floor = 1 + added / (2 * layers)
    said = [f"By operations the floor is {floor:.2f} of the frozen model's step."]
    for device, cases in _by_device(values).items():
        beside = span(_ratios(cases, "tcur", "lora"))
        said.append(
            f"On {device} it is {span(_ratios(cases, 'tcur', 'frozen'))}, and {beside} of LoRA's "
            "step."
        )
    return " ".join(said)


def serving(values: Values) -> str:
    """What a thousand adapters and one cost beside none, and beside each other."""
    layers, added = _operations()
    said = [f"By operations the factors cost {1 + added / layers:.2f} of the frozen model."]
    for device, cases in _by_device(values).items():
        by_weights = span(_ratios(cases, "one", "frozen"))
        by_factors = span(_ratios(cases, "one_by_factors", "frozen"))
        each = " and ".join(
            f"{value['thousand'] / value['one_by_factors']:.2f} ({case})"
            for case, value in cases.items()
        )
        said.append(
            f"On {device} one adapter costs {by_weights} of it in W_eff, and {by_factors} by the "
            f"factors; a thousand cost {each} of one by the factors."
        )
    return " ".join(said)


def cast(values: Values) -> str:
    """W_eff in bf16 beside what autocast does for it."""
    return " ".join(
        f"On {device} it takes {span(_ratios(cases, 'materialize', 'autocast'))} of the time of "
        "autocast's cast."
        for device, cases in _by_device(values).items()
    )


def memory(values: Values) -> str:
    """Peaks of ours beside those of others."""
    others = {"lora": "LoRA's", "fourierft": "FourierFT's", "full": "full fine-tuning's"}
    said = []
    for device, cases in _by_device(values).items():
        found = {name: _ratios(cases, "tcur", other) for other, name in others.items()}
        each = [f"{span(ratios)} of {name}" for name, ratios in found.items() if ratios]
        said.append(f"On {device} the peak of ours is {', '.join(each)}.")
    return " ".join(said)


def overhead(values: Values) -> str:
    """What a layer costs the host over a frozen one; a thousand were timed."""
    said = []
    for device, cases in _by_device(values).items():
        each = []
        for name, how in (("materialized", "by W_eff"), ("factored", "by the factors")):
            more = [v[name] - v["linear"] for v in cases.values() if name in v]
            each += [f"{span(more, '.0f')} µs {how}"] if more else []
        if each:
            costs = " and ".join(each)
            said.append(f"Over `nn.Linear`, a layer costs the host {costs} on {device}.")
    return " ".join(said)


def over_lengths(values: Values) -> str:
    """Per cent of the stream's speed, over n3 and over the rank."""
    said = [f"All cases have {scaling.WEIGHTS / 1e6:.1f} million weights."]
    for device, cases in _by_device(values).items():
        for prefix, over in (("n3_", "n3 at r = 8"), ("rank_", "r at n3 = 12")):
            chosen = {case: value for case, value in cases.items() if case.startswith(prefix)}
            if chosen:
                shares = span([100 * x for x in _ratios(chosen, "stream", "materialize")], ".0f")
                said.append(f"On {device} it is {shares} % over {over}.")
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
    "cast_says": ("cast", cast),
    "memory_says": ("memory", memory),
    "overhead_says": ("overhead", overhead),
    "scaling_says": ("scaling", over_lengths),
}


def written(name: str, values: Values) -> str:
    """The sentences of that name, as a paragraph of the page."""
    return paragraph(SENTENCES[name][1](values))
