"""Finds out how each type of transformers is called, and writes ``hugging.csv``.

    PYTHONPATH=.venv/families:tests python -m families.survey [TYPE ...]

Without types, it tries all types of the installed transformers. Types that cannot be built or
called are written with the reason. Run it for types that are new, or whose settings have changed.
"""

import csv
import signal
import sys
import warnings

import torch
from torch import nn

from . import hugging, others
from .settings import UNTRIED

#: Time limit for one type; a tiny model takes less than a second.
SECONDS = 10


def has_linear(model):
    kinds = nn.Linear | nn.MultiheadAttention
    return any(isinstance(m, kinds) or type(m).__name__ == "Conv1D" for m in model.modules())


def tried(kind):
    """The way of calling, and the reason if there is none; one of them is empty."""
    if kind in UNTRIED:
        return "", UNTRIED[kind]
    try:
        hugging.model_class(kind)
    except LookupError as error:
        return "", str(error)
    except Exception as error:
        return "", hugging.in_short(error)
    try:
        model = hugging.builder(kind)(0)
    except Exception as error:
        return "", f"not built: {hugging.in_short(error)}"
    if not has_linear(model):
        return "", "no linear layer"
    if type(model).forward is nn.Module.forward:
        return "", "no forward of its own: its parts are called one by one"
    try:
        way, others = hugging.find_way(kind, model)
    except Exception as error:
        return "", f"no inputs: {hugging.in_short(error)}"
    if way:
        return way, ""
    return "", "not called: " + (next(iter(others.values())) if others else "inputs of its own")


class TooLongError(BaseException):
    """Not an Exception, so that no code in between catches it."""


def in_time(kind):
    """`tried`, within `SECONDS`."""

    def stop(*_):
        raise TooLongError

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        return tried(kind)
    except TooLongError:
        return "", f"not built and called within {SECONDS} s: its config cannot be made small"
    finally:
        signal.alarm(0)


def main(kinds):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    warnings.simplefilter("ignore")
    others.operators_of_torchvision()
    torch.use_deterministic_algorithms(True)  # as in the tests, fills unset memory with NaN
    known = hugging.rows() if hugging.TABLE.exists() and kinds else {}
    for kind in kinds or list(CONFIG_MAPPING.keys()):
        known[kind] = in_time(kind)
        if not known[kind][0]:
            print(f"{kind}: {known[kind][1]}", flush=True)
    with hugging.TABLE.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows((k, *v) for k, v in sorted(known.items()))
    print(f"{sum(bool(way) for way, _ in known.values())} of {len(known)} types can be called")


if __name__ == "__main__":
    main(sys.argv[1:])
