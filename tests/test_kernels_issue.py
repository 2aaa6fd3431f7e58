"""What the CUDA kernels issue, by the counter of benchmarks/sass and by its newest rows."""

import itertools
import re

import pytest
import torch

from benchmarks.sass import cases, count, launches, model, report, rows

CHANGELOG = report.DOCS.parent / "CHANGELOG.md"
needs_nvcc = pytest.mark.skipif(launches.package_build().find_nvcc() is None, reason="no nvcc")


@pytest.mark.kernels
@needs_nvcc
def test_adapters_of_tokens_cost_what_both_cost_alone():
    """The work grows with tokens and with adapters, and not with their product."""

    def issued(tokens, adapters):
        case = cases.core_grad_ids((5, 16, 16, 4), tokens, adapters)
        return sum(one.instructions for one in count.of_case(case, "sm_90"))

    few, more_tokens = issued(128, 8), issued(512, 8)
    more_adapters, both = issued(128, 32), issued(512, 32)
    assert more_tokens > 2 * few
    assert both - more_adapters < 1.1 * (more_tokens - few)


@pytest.mark.kernels
def test_every_kernel_that_is_compiled_is_launched():
    """By some call: no variant is compiled for nobody."""
    _, names = launches._library()
    compiled = {name for name in names.values() if re.fullmatch(r"\w+_kernel(<[\w, ]*>)?", name)}
    launched, factors = set(), (torch.float32, torch.bfloat16)

    def see(name, *arguments):
        call = launches.operator(name)
        launched.update(one.kernel for one in launches.record(lambda: call(*arguments)))

    for n3, rank in itertools.product((*range(1, 148), 257), (3, 33)):
        packed = torch.empty(9, n3 * rank), torch.empty(n3 * rank, 36)
        stack, core = torch.empty(n3, 9, 36), torch.empty(n3, rank, rank)
        see("materialize", [stack], *packed, core, 0.5, torch.float32)
        see("core_grad_dense", stack, *packed)
    numbers = ((2, 4), (48, 8), (600, 4), (600, 3), (5, 3))
    for (n3, rank), dtype, of_x, wide in itertools.product(
        numbers, factors, (*factors, torch.float16), (8, 9)
    ):
        packed = (
            torch.empty(wide, n3 * rank, dtype=dtype),
            torch.empty(n3 * rank, wide, dtype=dtype),
        )
        for tokens, adapters in ((41, None), (41, 20), (3000, 20)):
            ids = None if adapters is None else torch.zeros(tokens, dtype=torch.int64)
            cores = torch.empty(*([] if ids is None else [adapters]), n3, rank, rank)
            x, weight = torch.zeros(tokens, wide, dtype=of_x), torch.zeros(wide, wide, dtype=of_x)
            how = (n3, 0, 1, ids, adapters or 1)
            see("core_grad_tokens", x, x, *packed, *how, False)
            z = torch.zeros(tokens, n3 * rank)
            see("core_grad_tokens", z, x, packed[0], None, *how, ids is None)
            for is_transposed in (False, True):
                how = (cores, 0, 1, 0.5, is_transposed, None, False, ids)
                see("cur_linear", x, weight, None, *packed, *how)
    for layers, (n3, rank) in itertools.product((7, 700), numbers):
        see("core_of_packed", torch.empty(layers, n3, rank, rank), 0.5)
    assert len(compiled) > 60
    assert compiled - launched == set()


@pytest.mark.kernels
@needs_nvcc
@pytest.mark.parametrize("operator", ["core_grad_tokens", "cur_linear", "core_of_packed"])
def test_kernels_on_tokens_divide_no_64_bits(operator):
    """Such a division or remainder is a call of a function; none of theirs is ever made."""
    chosen = [case for case in cases.CASES if case.operator == operator]
    assert chosen
    for case in chosen:
        for one in count.of_case(case, "sm_90", spread=4):
            names = {opcode.partition(".")[0] for opcode, times in one.by_opcode().items() if times}
            assert "CALL" not in names, (case.name, one.launch.kernel)


def test_figures_in_the_text_are_those_of_the_model_and_the_rows():
    design = (report.DOCS / "design.md").read_text(encoding="utf-8")
    h100, h200, _ = model.DEVICES
    said = re.search(r"for (\d+) instructions while .*, an H200 for (\d+)\.", design, re.DOTALL)
    assert said.groups() == tuple(f"{model.budget(device, 8):.0f}" for device in (h100, h200))
    calls = report.calls_of([row for row in rows.read() if row["commit"] != report.MEASURED])
    calls = [one for one in calls if float(one[0].main["total"]) != float(one[1].main["total"])]
    main = [float(now.main["total"]) / float(before.main["total"]) for before, now in calls]
    least, most = (round(100 * (1 - share)) for share in (max(main), min(main)))
    assert f"{least} to {most} % fewer" in CHANGELOG.read_text(encoding="utf-8")
    prepared = [call for call in calls if call[1].main["operator"] == "materialize"]
    assert all(now.beside < before.beside / 3 for before, now in prepared)  # "less than a third"


#: Lane instructions of a main kernel for each number of W, at most.
MOST = {"materialize 48x": 40, "materialize 12x": 40, "materialize 64x": 40,
        "materialize 128x": 60, "core_grad_dense": 45}  # fmt: skip


def test_kernels_execute_no_more_than_they_may():
    """By the newest rows, on every architecture. A base in fp32 has 32 KB of loads on their way."""
    calls = report.calls_of([row for row in rows.read() if row["commit"] != report.MEASURED])
    checked = set()
    for _, call in calls:
        row = call.main
        assert row["local_bytes"] == "0"
        for name, most in MOST.items():
            if row["case"].startswith(name):
                assert float(row["total"]) <= most, (row["case"], row["architecture"])
                checked.add(name)
        if row["operator"] == "materialize" and "fp32->" in row["case"]:
            assert float(row["loads_kb"]) >= 32, row["case"]
    assert checked == set(MOST)
