"""What a GPU would execute, as benchmarks/sass counts it, against counts by hand and arithmetic."""

import re
import struct
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks.sass import __main__ as commands
from benchmarks.sass import (
    cases,
    count,
    launches,
    listing,
    machine,
    memory,
    report,
    rows,
    triton_rows,
)
from sass_warps import instruction, run, warp_of

needs_nvcc = pytest.mark.skipif(launches.package_build().find_nvcc() is None, reason="no nvcc")
both = pytest.mark.parametrize("architecture", ["sm_90", "sm_100"])


@pytest.fixture(scope="module")
def kernels():
    source = Path(__file__).with_name("sass_hand.cu")

    def of(architecture):
        return listing.read(launches.compile_source(source, [f"-arch={architecture}"]))

    return {name: of(name) for name in ("sm_90", "sm_100")}


def loops(kernel):
    """First and last address of each loop: what a branch backwards spans."""
    found = []
    for one in kernel.code:
        match = re.fullmatch(r"0x[0-9a-f]+", one.operands[-1]) if one.operands else None
        if one.name == "BRA" and match and int(match[0], 16) < one.address:
            found.append((int(match[0], 16), one.address))
    return found


@needs_nvcc
@both
@pytest.mark.parametrize(("block", "warp", "lanes"), [(0, 0, 32), (0, 1, 32), (1, 0, 6), (1, 1, 0)])
def test_a_small_kernel_is_counted_as_by_hand(kernels, architecture, block, warp, lanes):
    kernel = kernels[architecture]["hand"]
    turns, divisor, n = 5, 3, 64 + 6
    arguments = struct.pack("<QQiiixxxxq", 1 << 32, 1 << 33, turns, n, divisor, 4096)
    issued = run(kernel, arguments, threads=64, block=block, warp=warp)
    # The lane with the most turns decides. Lanes leave the loop one after the other, and each group
    # comes to the BSYNC behind it on its own. Nothing else of the kernel is skipped or repeated.
    turns_of_lanes = {thread // divisor for thread in range(32 * warp, 32 * warp + 32)}
    most = max(turns_of_lanes)
    first, second = loops(kernel)
    (sync,) = (one.address for one in kernel.code if one.name == "BSYNC")
    early, late = (one.address for one in kernel.code if one.name == "EXIT")
    expected = {}
    for one in kernel.code:
        at = one.address
        times = turns if first[0] <= at <= first[1] else most if second[0] <= at <= second[1] else 1
        times = len(turns_of_lanes) if at == sync else times
        expected[at] = 0 if at > late or (at > early and not lanes) else times
    assert {one.address: issued.instructions[one.address] for one in kernel.code} == expected
    # 32 lanes in one bank, then one word for all of them; whole sectors of 32 bytes.
    assert issued.shared_cycles == 32 + most
    assert issued.sectors == Counter(read=4 * turns, written=-(-lanes * 4 // 32))
    assert issued.most_loaded == 128
    assert {place * 32 for place in issued.places} == {
        (1 << 32) + 128 * warp + 4 * 4096 * turn + 32 * i for turn in range(turns) for i in range(4)
    }


@needs_nvcc
@both
@pytest.mark.parametrize(
    ("a", "b"),
    [(0, 7), (6, 7), (100, 7), (2**40 + 5, 2**38 - 1), (2**63 + 11, 2**60 + 3), (2**64 - 1, 2**61)],
)
def test_divisions_of_64_bits_say_how_often_a_loop_turns(kernels, architecture, a, b):
    kernel = kernels[architecture]["divide"]
    issued = run(kernel, struct.pack("<QQQ", 1 << 32, a, b))
    stores = [one.address for one in kernel.code if one.name == "STG"]
    assert sum(issued.instructions[address] for address in stores) == a // b


@needs_nvcc
@both
def test_a_branch_on_data_is_refused_unless_the_data_is_known(kernels, architecture):
    kernel = kernels[architecture]["depends"]
    arguments = struct.pack("<QQ", 1 << 32, 1 << 33)
    with pytest.raises(machine.NotKnown, match="depends on"):
        run(kernel, arguments)
    known = [(1 << 32, struct.pack("<ii", 1, 9))]
    assert run(kernel, arguments, known=known).sectors["written"] == 9


@needs_nvcc
@both
def test_a_table_of_jumps_is_followed(kernels, architecture):
    kernel = kernels[architecture]["chooses"]
    assert [one.name for one in kernel.code].count("BRX") > 0
    reads, writes = (0, 1, 1, 1, 2, 2, 3, 0), (1, 1, 1, 2, 1, 3, 1, 0)
    for n, moved in enumerate(zip(reads, writes, strict=True)):
        sectors = run(kernel, struct.pack("<Qi", 1 << 32, n), threads=1).sectors
        assert (sectors["read"], sectors["written"]) == moved


def test_a_grid_may_have_three_dimensions():
    kernel = listing.Kernel("kernel", "sm_90", (), 8, 0, 0, b"")
    for grid, sizes in ((6, (6, 1, 1)), ((6, 5), (6, 5, 1)), ((6, 5, 4), (6, 5, 4))):
        bank = machine.constants_of(kernel, 64, grid, b"abc")[0]
        assert struct.unpack_from("<6I", bank) == (64, 1, 1, *sizes)
        assert bank[0x210:0x213] == b"abc"
    warp = machine.Warp({}, (3, 2), 1, ())
    found = {axis: int(warp.special(f"SR_CTAID.{axis}")[0][0]) for axis in "XYZ"}
    assert found == {"X": 3, "Y": 2, "Z": 0}
    assert list(warp.special("SR_TID.X")[0]) == list(range(32, 64))


@needs_nvcc
@both
def test_a_division_of_known_doubles_takes_the_short_way(kernels, architecture):
    kernel = kernels[architecture]["inverse"]
    issued = run(kernel, struct.pack("<Qi", 1 << 32, 48))
    end = next(one.address for one in kernel.code if one.name == "EXIT")
    assert max(issued.instructions) == end
    assert issued.sectors["written"] == 8


@needs_nvcc
@both
def test_loads_and_copies_are_on_their_way_until_they_are_waited_for(kernels, architecture):
    kernel = kernels[architecture]["copies"]
    issued = run(kernel, struct.pack("<QQ", 1 << 32, 1 << 33))
    assert (issued.most_loaded, issued.most_copied, issued.most_in_flight) == (1024, 512, 1536)
    assert issued.asked_ahead == 32 * 128
    # All lanes copy the same 16 bytes, twice.
    assert issued.sectors == Counter(read=16 + 16 + 1 + 1, written=32)


def test_a_load_has_arrived_with_all_that_began_before_it():
    warp = warp_of([])
    for register, size in (("R0", 1), ("R1", 20), ("R2", 300)):
        warp.count(instruction("LDG R0, [R0]"), 1)
        warp.load([register], size)
    warp.use(["R1"])
    warp.use(["R9"])
    warp.count(instruction("LDG R0, [R0]"), 1)
    warp.load(["R3"], 4000)
    assert warp.issued.most_loaded == 4300


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("LDG.E.128 R4, desc[UR6][R12.64]", "R4 R5 R6 R7 R12 R13"),
        ("STS.64 [R3+0x10], R8", "R3 R8 R9"),
        ("IMAD.WIDE R4, R6, R8, R10", "R4 R5 R6 R8 R10 R11"),
        ("DFMA R4, -R6, c[0x0][0x210], R8", "R4 R5 R6 R7 R8 R9"),
        ("FADD R4, -|R6|, UR8", "R4 R6"),
    ],
)
def test_registers_that_an_instruction_uses(text, expected):
    assert memory.registers_of(instruction(text)) == expected.split()


@needs_nvcc
def test_a_warp_that_does_not_end_is_refused(kernels, monkeypatch):
    monkeypatch.setattr(machine, "MOST", 1000)
    with pytest.raises(machine.NotKnown, match="more than 1000"):
        run(kernels["sm_90"]["divide"], struct.pack("<QQQ", 1 << 32, 1000, 1))


def counted(registers=64, threads=256, shared=0, blocks=8, opcode="FFMA", passes=0.0):
    """A launch of a kernel with one instruction, which every warp issues ten times."""
    code = (listing.Instruction(0, "", opcode, ("R0", "R1", "R2", "R3")),)
    kernel = listing.Kernel("kernel", "sm_90", code, registers, 1024, 0, b"")
    issued = machine.Issued(Counter({0: 10 * blocks * threads // 32}), passes, most_loaded=512)
    return count.Counted(launches.Launch("kernel", blocks, threads, shared, b""), kernel, issued)


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "expected"),
    [
        (120, 256, 110592, 2),  # as Nsight Compute said of it: two blocks
        (120, 256, 115713, 1),  # a byte more than half of the shared memory
        (80, 256, 0, 3),  # registers
        (81, 256, 0, 2),  # which come by eight to a thread
        (32, 1024, 0, 2),  # warps
        (16, 32, 0, 32),  # blocks
    ],
)
def test_blocks_that_a_multiprocessor_holds(registers, threads, shared, expected):
    one = counted(registers, threads, shared)
    assert one.blocks_together == expected
    assert one.in_flight(1000) == threads // 32 * expected


@pytest.mark.parametrize(
    ("opcode", "passes", "part", "cycles"),
    [
        ("FFMA", 0, "issue", 160),
        ("IMAD.WIDE", 0, "fp32", 320),
        ("IADD3.X", 0, "integer", 320),
        ("UIADD3", 0, "issue", 160),
        ("FFMA", 500, "shared", 500),
    ],
)
def test_the_busiest_part_of_a_multiprocessor_binds(opcode, passes, part, cycles):
    case = cases.Case("operator", (1, 10, 1320, 8), "how", list, 8)
    row = counted(opcode=opcode, passes=passes).row(case)  # 640 warp instructions
    assert row["busiest"] == part
    assert row["H100_us"] == f"{cycles / 132 / 1.98e3:.2f}"
    # 105600 bytes at 3 TB/s are 35 ns, and at 4.3 TB/s 25 ns.
    for name, copied in (("H100", 105600 / 3e6), ("H200", 105600 / 4.3e6)):
        assert row[f"{name}_percent"] == f"{min(100, 100 * copied / (cycles / 132 / 1980)):.1f}"
    assert "B200_us" not in row


def test_what_moves_no_weight_has_no_ceiling():
    row = counted().row(cases.Case("operator", (1, 8, 8, 8), "how", list))
    assert not [name for name in row if name.endswith("_percent")]
    assert float(row["fp32"]) == 640 * 32 / 64


@needs_nvcc
def test_the_launches_of_an_operator_write_each_number_once():
    sizes = (12, 24, 80, 3)
    case = cases._materialize(sizes, torch.float32, torch.bfloat16)
    found = count.of_case(case, "sm_90")
    prepare, main = found
    assert prepare.launch.kernel == "prepare_kernel"
    assert main.launch.kernel == "materialize_tubes_kernel<12>"
    assert main.issued.sectors["written"] * memory.SECTOR == case.elements * 2
    row = rows.of_case(case, found, "abc")[1]
    assert float(row["written_bytes"]) == 2
    by_kind = sum(float(row[kind]) for kind in count.KINDS)
    assert abs(by_kind - float(row["total"])) < 1e-3  # each is rounded to four places
    assert set(row) <= set(rows.FIELDS)


def test_recorded_launches_are_those_that_run():
    host, library = launches.host(), launches.host().load()
    case = host.make_case(12, 24, 80, 3)

    def call():
        return launches.operator("core_grad_dense")(case.weight, *case.packed)

    before = call()
    recorded = launches.record(call)
    most = max(recorded, key=lambda one: one.shared_bytes)
    assert most.kernel == "project_tubes_kernel<12>"
    assert torch.equal(call(), before)  # it runs again
    try:
        library.tcur_host_shared(most.shared_bytes)
        assert geometry(launches.record(call)) == geometry(recorded)
        # With a byte less another kernel runs, and the recorded one is again another.
        library.tcur_host_shared(most.shared_bytes - 1)
        less = launches.record(call)
    finally:
        library.tcur_host_shared(227 * 1024)
    assert max(one.shared_bytes for one in less) < most.shared_bytes
    assert geometry(less) != geometry(recorded)


def geometry(found):
    return [(one.kernel, one.blocks, one.threads, one.shared_bytes) for one in found]


def test_the_likeliest_source_of_a_length_comes_first():
    for length, part in ((48, 0), (12, 3), (128, 0), (8, 2)):
        first, *others = launches._candidates("materialize_tubes_kernel", length)
        assert first.stem == f"materialize_tubes_{part}"
        assert len(others) >= 3
    assert [one.stem for one in launches._candidates("order_kernel", 48)] == ["row_order"]


def test_rows_are_sorted_as_the_kernel_leaves_them():
    ids = torch.tensor([33, 1, 63, 16, 0, 33, 17, 1])
    order = launches.Launch("order_kernel", 1, 512, 0, struct.pack("<q4Q", 0, 10, 20, 30, 40))
    contents = cases._sorted_rows(order, ids, cases.ADAPTERS)
    found = {at: struct.unpack(f"<{len(b) // 4}i", b) for at, b in contents}
    by_digit = sorted(range(8), key=lambda row: ids[row].item() % 16)
    by_core = sorted(range(8), key=lambda row: ids[row].item())
    assert (list(found[20]), list(found[10])) == (by_digit, by_core)
    for core in range(cases.ADAPTERS):
        rows_of_core = by_core[found[30][core] : found[40][core]]
        assert rows_of_core == [row for row in range(8) if ids[row] == core]


@needs_nvcc
def test_adapters_of_tokens_are_sorted_as_their_ids_say():
    (case,) = (one for one in cases.CASES if "adapters" in one.name)
    order, _, sums = case.launches()
    assert order.kernel == "order_kernel"
    assert sums.kernel.startswith("core_kernel")
    for launch in (order, sums):
        kernel = launches.compiled(launch, "sm_90", 48)
        how = launch.arguments, launch.threads, 0, 0, launch.blocks
        with pytest.raises(machine.NotKnown):
            run(kernel, *how)
        assert run(kernel, *how, launch.known).sectors["written"] > 0


def row_of(case="materialize 48x768x768x8 fp32->fp32", **others):
    numbers = dict.fromkeys(rows.FIELDS, "1")
    text = {"case": case, "operator": case.split()[0], "role": "main", "architecture": "sm_90"}
    return numbers | text | {"commit": "abc", "kernel": "kernel", "busiest": "issue"} | others


def test_tables_have_what_was_and_what_is(tmp_path):
    path = tmp_path / "sass.csv"
    rows.append([row_of(total="46.3"), row_of(role="beside", total="4")], path)
    rows.append([row_of(total="40.04", time="2"), row_of(role="beside", total="4", time="2")], path)
    rows.append([row_of(commit=report.MEASURED, total="9")], path)
    found = rows.read(path)
    assert len(found) == 5
    calls = report.calls_of([row for row in found if row["commit"] == "abc"])
    (line,) = report.instructions(calls).splitlines()[2:]
    assert "| 46.3 → 40 |" in line
    assert line.endswith("| 4 |")
    (line,) = report.ceilings(calls).splitlines()[2:]
    assert line.endswith("| issue | 1 | 1 | 1 |")


def test_the_pages_have_the_tables_of_the_rows():
    pages = "".join(path.read_text(encoding="utf-8") for path in report.DOCUMENTS)
    tables = report.tables(rows.read()) | {"sass_triton": triton_rows.comparison()}
    for name, table in tables.items():
        assert f"<!-- begin {name} -->\n{table}<!-- end {name} -->\n" in pages, name


def test_what_was_counted_is_what_nsight_compute_measured():
    measured = report.measured()
    counted = [row for row in rows.read() if row["commit"] == report.MEASURED]
    table = report.nsight(counted, measured)
    assert table.count("+0.00 %") == len(counted) == 8
    wrong = [{**row, "warp_instructions": "1000000"} for row in counted]
    assert "+0.00 %" not in report.nsight(wrong, measured)


def test_cases_are_found_by_a_part_of_their_names():
    assert {case.operator for case in commands.named(["packed"])} == {
        "core_of_packed",
        "core_grad_tokens",
    }
    assert len(commands.named([""])) == len(cases.CASES) == len({c.name for c in cases.CASES})
    with pytest.raises(SystemExit, match="materialize 48x768x768x8 fp32->bf16"):
        commands.named(["nothing"])


@needs_nvcc
def test_hot_instructions_are_those_of_loops(capsys):
    (case,) = commands.named(["core_of_packed"])
    commands.print_hot(case, "sm_90")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    times = {int(line[0], 16): float(line[1]) for line in lines}
    assert times[0] == 1
    assert max(times.values()) > 1
