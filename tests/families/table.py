"""Checks all families, then writes their tables in docs/adapters.md.

    make families-table

If a promise is broken or a library is missing, it exits with 1 and does not change the document.
"""

import importlib.util
import sys
import warnings
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

import tcur_kernels as tcur
from benchmarks import documents

from . import hugging, others
from .check import check_family
from .subject import Report

DOCUMENT = Path(__file__).parents[2] / "docs" / "adapters.md"
#: How many layers without gradient are named.
NAMED = 2


def all_families():
    return [*others.families(), *hugging.families()]


def checked(index):
    """The report of one family, or what is wrong with it."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    others.operators_of_torchvision()
    family = all_families()[index]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if not family.refused:
                return check_family(family.build, family.inputs, smooth=family.smooth)
            tcur.adapt(family.build(0), rank=4)
            return "expected to be refused, but was adapted"
        except ValueError as error:
            return Report(refused=str(error)) if family.refused else str(error)
        except Exception as error:
            return str(error)


def lines(families, reports):
    """The tables: what was checked, what is special, and what is not checked and why."""
    by_way = defaultdict(list)
    for family in families:
        by_way[family.library, family.way].append(family.name)
    yield f"{len(families)} families are checked."
    yield ""
    yield "| library | called with | families |"
    yield "| --- | --- | --- |"
    for (library, way), names in by_way.items():
        count = f" ({len(names)})" if len(names) > 1 else ""
        yield f"| {library} | {way or 'its inputs'}{count} | {'; '.join(names)} |"
    yield ""
    yield "Of these, what is particular:"
    yield ""
    yield "| what | families |"
    yield "| --- | --- |"
    for what, names in particular(families, reports).items():
        yield f"| {what} | {'; '.join(names)} |"
    yield ""
    by_reason = defaultdict(list)
    for kind, (way, reason) in hugging.rows().items():
        if not way:
            by_reason[reason_in_short(reason)].append(kind)
    left = sum(map(len, by_reason.values()))
    yield f"Of the {len(hugging.rows())} types of transformers, {left} are not checked:"
    yield ""
    yield "| why | types of transformers |"
    yield "| --- | --- |"
    for reason, kinds in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        yield f"| {reason} ({len(kinds)}) | {'; '.join(kinds)} |"


def particular(families, reports):
    found = defaultdict(list)
    for family, report in zip(families, reports, strict=True):
        if report.refused:
            found["refused: no layer that can be adapted"].append(family.name)
        if report.silent:
            shown = ", ".join(report.silent[:NAMED])
            more = len(report.silent) - NAMED
            shown += f" and {more} more" if more > 0 else ""
            found["layers that no gradient reached (not called, or to no effect)"].append(
                f"{family.name} ({shown})"
            )
        for note in report.notes:
            found[note].append(family.name)
        if not family.smooth:
            what = "sorts, picks or rounds: in half precision only finite outputs are asked for"
            found[what].append(family.name)
    return found


def reason_in_short(reason):
    """The reason without details, which ``hugging.csv`` has."""
    if reason.startswith("no model of"):
        return "a part that has no model of its own"
    if "ModuleNotFoundError" in reason:
        return "a name for another type's model"
    if "ImportError" in reason:
        return "needs a library that is not installed"
    if reason.startswith(("not called", "no inputs")):
        return "no inputs were found for its tiny model"
    if reason.startswith("not built:"):
        return "its config could not be made tiny"
    return reason.replace("|", "/")


def main():
    families = all_families()
    missing = sorted({f.library for f in families if importlib.util.find_spec(f.library) is None})
    if missing:
        sys.exit(f"expected all libraries, got none of {', '.join(missing)}")
    with ProcessPoolExecutor() as pool:  # raises if a process dies, instead of waiting for it
        reports = list(pool.map(checked, range(len(families)), chunksize=8))
    pairs = zip(families, reports, strict=True)
    broken = [f"{f.library} {f.name}: {r}" for f, r in pairs if isinstance(r, str)]
    if broken:
        sys.exit("\n".join(broken))
    text = "\n".join(lines(families, reports)) + "\n"
    documents.fill({"families": text}, [DOCUMENT])


if __name__ == "__main__":
    main()
