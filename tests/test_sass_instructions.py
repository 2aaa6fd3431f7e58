"""What single instructions do, as benchmarks/sass executes them, against Python's integers."""

import random

import numpy as np
import pytest

from benchmarks.sass import listing, machine, memory, semantics
from benchmarks.sass import operands as of
from sass_warps import instruction, run, warp_of

WORD, SIGN = 2**32, 2**31
EDGES = (0, 1, 2, 31, 32, 33, 63, 64, SIGN - 1, SIGN, SIGN + 1, WORD - 1)


def as_signed(x):
    return x - WORD if x >= SIGN else x


def word_of(a, b, c, table):
    return sum(
        1 << i
        for i in range(32)
        if table >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1
    )


def permuted(a, selector, c):
    data = a.to_bytes(4, "little") + c.to_bytes(4, "little")
    total = 0
    for place in range(4):
        code = selector >> 4 * place & 15
        byte = data[code & 7]
        total |= ((255 if byte & 128 else 0) if code & 8 else byte) << 8 * place
    return total


def compared(kind, a, b):
    return {"LT": a < b, "LE": a <= b, "GT": a > b, "GE": a >= b, "EQ": a == b, "NE": a != b}[kind]


def combined(kind, sign, how):
    """A comparison and its opposite, each combined with a predicate."""

    def meaning(a, b, c, d, p, q):
        first = compared(kind, *((a, b) if sign else (as_signed(a), as_signed(b))))
        both = {"P2": first, "P3": not first}
        combine = {"AND": lambda x: x and p, "OR": lambda x: x or p, "XOR": lambda x: x != p}[how]
        return {name: combine(value) for name, value in both.items()}

    return meaning


#: Text -> what it makes of R2, R3, R4, R5 and P0, P1: numbers of R0, of R1, and flags of P2, P3.
MEANING = {
    "MOV R0, R2": lambda a, b, c, d, p, q: {"R0": a},
    "IADD3 R0, P2, R2, R3, RZ": lambda a, b, c, d, p, q: {"R0": a + b, "P2": a + b >= WORD},
    "IADD3 R0, P2, R2, -R3, RZ": lambda a, b, c, d, p, q: {"R0": a - b, "P2": a >= b},
    "IADD3 R0, P2, P3, R2, R3, R4": lambda a, b, c, d, p, q: {
        "R0": a + b + c, "P2": a + b + c >= WORD, "P3": a + b + c >= 2 * WORD,
    },
    "IADD3.X R0, P2, R2, ~R3, RZ, P0, !PT": lambda a, b, c, d, p, q: {
        "R0": a + (WORD - 1 - b) + p, "P2": a + (WORD - 1 - b) + p >= WORD,
    },
    "VIADD R0, R2, -0x5": lambda a, b, c, d, p, q: {"R0": a - 5},
    "IABS R0, R2": lambda a, b, c, d, p, q: {"R0": abs(as_signed(a))},
    "IMAD R0, R2, -R3, R4": lambda a, b, c, d, p, q: {"R0": c - a * b},
    "IMAD.X R0, R2, 0x1, R3, P0": lambda a, b, c, d, p, q: {"R0": a + b + p},
    "IMAD.WIDE R0, R2, R3, R4": lambda a, b, c, d, p, q: {
        "R0": (total := as_signed(a) * as_signed(b) + c + d * WORD), "R1": total >> 32,
    },
    "IMAD.WIDE.U32 R0, P2, R2, R3, R4": lambda a, b, c, d, p, q: {
        "R0": (total := a * b + c + d * WORD), "R1": total >> 32, "P2": total >= WORD**2,
    },
    "IMAD.HI.U32 R0, P2, R2, R3, R4": lambda a, b, c, d, p, q: {
        "R0": a * b + c + d * WORD >> 32,
        "P2": a * b + c + d * WORD >= WORD**2,
    },
    "IMAD.HI R0, R2, R3, R4": lambda a, b, c, d, p, q: {
        "R0": as_signed(a) * as_signed(b) + c + d * WORD >> 32,
    },
    "IMAD.HI.U32 R0, R2, R3, R4": lambda a, b, c, d, p, q: {"R0": a * b + c + d * WORD >> 32},
    "LEA R0, P2, R2, R3, 0x4": lambda a, b, c, d, p, q: {
        "R0": (a << 4) + b, "P2": (a << 4) % WORD + b >= WORD,
    },
    "LEA.HI R0, R2, R3, R4, 0x1b": lambda a, b, c, d, p, q: {"R0": (c * WORD + a << 27 >> 32) + b},
    "LEA.HI.X R0, R2, R3, R4, 0x2, P0": lambda a, b, c, d, p, q: {
        "R0": (c * WORD + a << 2 >> 32) + b + p,
    },
    "LEA.HI.X.SX32 R0, R2, R3, 0x3, P0": lambda a, b, c, d, p, q: {
        "R0": (as_signed(a) << 3 >> 32) + b + p,
    },
    "SHF.L.U32 R0, R2, R3, RZ": lambda a, b, c, d, p, q: {"R0": a << min(b, 32)},
    "SHF.L.W.U32 R0, R2, R3, RZ": lambda a, b, c, d, p, q: {"R0": a << b % 32},
    "SHF.L.U64.HI R0, R2, R3, R4": lambda a, b, c, d, p, q: {
        "R0": c * WORD + a << min(b, 63) >> 32,
    },
    "SHF.R.U32.HI R0, RZ, R3, R4": lambda a, b, c, d, p, q: {"R0": c >> min(b, 32)},
    "SHF.R.S32.HI R0, RZ, R3, R4": lambda a, b, c, d, p, q: {"R0": as_signed(c) >> min(b, 32)},
    "SHF.R.U64 R0, R2, R3, R4": lambda a, b, c, d, p, q: {"R0": c * WORD + a >> min(b, 63)},
    "SHF.R.S64 R0, R2, R3, R4": lambda a, b, c, d, p, q: {
        "R0": as_signed(c) * WORD + a >> min(b, 63),
    },
    "LOP3.LUT R0, R2, R3, R4, 0x96, !PT": lambda a, b, c, d, p, q: {"R0": a ^ b ^ c},
    "LOP3.LUT P2, R0, R2, R3, R4, 0xd8, !PT": lambda a, b, c, d, p, q: {
        "R0": word_of(a, b, c, 0xD8), "P2": word_of(a, b, c, 0xD8) != 0,
    },
    "PLOP3.LUT P2, P3, P0, P1, PT, 0x80, 0x2a": lambda a, b, c, d, p, q: {
        "P2": p and q, "P3": bool(0x2A >> 4 * p + 2 * q + 1 & 1),
    },
    "SEL R0, R2, R3, !P0": lambda a, b, c, d, p, q: {"R0": b if p else a},
    "FSEL R0, R2, 1.875, P0": lambda a, b, c, d, p, q: {"R0": a if p else 0x3FF00000},
    "VIMNMX R0, R2, R3, P0": lambda a, b, c, d, p, q: {
        "R0": (min if p else max)(as_signed(a), as_signed(b)),
    },
    "VIMNMX.U32 R0, R2, R3, !PT": lambda a, b, c, d, p, q: {"R0": max(a, b)},
    "VIADDMNMX R0, R2, -R3, 0x2, PT": lambda a, b, c, d, p, q: {
        "R0": min(as_signed((a - b) % WORD), 2),
    },
    "PRMT R0, R2, R3, R4": lambda a, b, c, d, p, q: {"R0": permuted(a, b, c)},
    "SGXT.U32 R0, R2, 0x7": lambda a, b, c, d, p, q: {"R0": a % 128},
    "SGXT R0, R2, 0x7": lambda a, b, c, d, p, q: {"R0": (a % 128) - 128 * (a >> 6 & 1)},
    "P2R R0, PR, R2, 0x3": lambda a, b, c, d, p, q: {"R0": a - a % 4 + p + 2 * q},
    **{
        f"ISETP.{kind}{sign}.{how} P2, P3, R2, R3, P0": combined(kind, sign, how)
        for kind in ("LT", "LE", "GT", "GE", "EQ", "NE")
        for sign in ("", ".U32")
        for how in ("AND", "OR", "XOR")
    },
}  # fmt: skip


@pytest.mark.parametrize("text", MEANING)
def test_an_instruction_does_what_integers_do(text):
    draw = random.Random(text)
    step = semantics.step_of(instruction(text))
    for _ in range(8):
        words = [
            [draw.choice((draw.choice(EDGES), draw.getrandbits(32))) for _ in range(32)]
            for _ in range(4)
        ]
        masks = draw.getrandbits(32), draw.getrandbits(32)
        warp = warp_of(words, masks)
        step(warp, of.ALL)
        for lane in range(32):
            bits = [bool(mask >> lane & 1) for mask in masks]
            for name, value in MEANING[text](*(one[lane] for one in words), *bits).items():
                if name[0] == "R":
                    values, known = warp.registers[name]
                    assert int(values[lane]) == value % WORD, (name, lane)
                else:
                    flags, known = warp.predicates[name]
                    assert flags >> lane & 1 == value, (name, lane)
                assert known == of.ALL


@pytest.mark.parametrize("kind", ["LT", "LE", "GT", "GE", "EQ", "NE"])
@pytest.mark.parametrize("sign", ["", ".U32"])
def test_a_comparison_of_64_bits_is_two_of_words(kind, sign):
    draw = random.Random(kind)
    words = [[draw.choice(EDGES) for _ in range(32)] for _ in range(4)]
    warp = warp_of(words)
    low = f"ISETP.{kind}.U32.AND P4, PT, R2, R3, PT"
    high = f"ISETP.{kind}{sign}.AND.EX P2, PT, R4, R5, PT, P4"
    for text in (low, high):
        semantics.step_of(instruction(text))(warp, of.ALL)
    for lane in range(32):
        a, b, c, d = (one[lane] for one in words)
        if not sign:
            c, d = as_signed(c), as_signed(d)
        assert warp.predicates["P2"][0] >> lane & 1 == compared(kind, c * WORD + a, d * WORD + b)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("HFMA2.MMA R0, -RZ, RZ, 1.875, 0.5", 0x3F803800),
        ("MUFU.RCP R0, 4", 0x3E800000),
        ("I2F.U32.RP R0, 0x1000001", 0x4B800001),
        ("I2F R0, -0x2", 0xC0000000),
        ("I2F.U16 R0, 0x10002", 0x40000000),
        ("F2I.FTZ.U32.TRUNC.NTZ R0, 3.75", 3),
        ("F2I.FTZ.U32.TRUNC.NTZ R0, -3.75", 0),
        ("F2I.FTZ.U32.TRUNC.NTZ R0, +INF", 0),
        ("FADD R0, 1, -|R2|", 0xBFC00000),
        ("FMUL.RZ R0, 0.333333343267440796, 3", 0x3F800000),
        ("FMUL.RZ R0, 1.00000011920928955078, 1.5", 0x3FC00001),  # half way, and cut off
        ("FFMA R0, 2, -0.5, 1.5", 0x3F000000),
    ],
)
def test_floats_of_divisions_are_rounded_as_they_say(text, expected):
    warp = warp_of([[0xC0200000] * 32])  # -2.5
    semantics.step_of(instruction(text))(warp, of.ALL)
    values, known = warp.registers["R0"]
    assert (int(values[0]), known) == (expected, of.ALL)


@pytest.mark.parametrize(
    "text",
    [
        "MUFU.EX2 R0, R2",
        "F2I.TRUNC R0, R2",
        "HFMA2 R0, R2, R3, R4",
        "SHFL.BFLY PT, R0, R2, 0x1, 0x1f",
        "FSETP.NAN.AND P2, PT, R2, R3, PT",
        "MOV R0, R9",
    ],
)
def test_what_is_not_understood_is_not_known(text):
    warp = warp_of([[1] * 32] * 4, (1, 1))
    warp.registers["R0"] = of.ZERO, of.ALL
    warp.predicates["P2"] = 0, of.ALL
    one = instruction(text)
    (memory.step_of(one) or semantics.step_of(one))(warp, of.ALL)
    results = [warp.registers["R0"][1]] if "R0" in text else []
    results += [warp.predicates["P2"][1]] if "P2" in text else []
    assert results
    assert set(results) == {0}


@pytest.mark.parametrize(
    ("text", "mask", "name", "expected"),
    [
        ("VOTE.ANY P2, P0", 0b0011, "P2", True),
        ("VOTE.ANY P2, P0", 0b1000, "P2", False),
        ("VOTE.ALL P2, P0", 0b0011, "P2", False),
        ("VOTE.ALL P2, P0", 0b0110, "P2", True),
        ("VOTEU.ANY UP2, P0", 0b0011, "UP2", True),
        ("VOTE.ANY R0, PT, P0", 0b0011, "R0", 0b0010),
        ("R2UR UR0, R2", 0b0110, "UR0", 11),
    ],
)
def test_lanes_that_are_at_work_speak_for_a_warp(text, mask, name, expected):
    warp = warp_of([range(10, 42)], (0b0110,))
    semantics.step_of(instruction(text))(warp, mask)
    lane = mask.bit_length() - 1
    if "P" in name:
        value, known = warp.predicates[name]
        assert value >> lane & 1 == expected
    else:
        values, known = warp.registers[name]
        assert int(values[lane]) == expected
    assert known >> lane & 1


def test_a_vote_of_lanes_that_are_not_known_is_not_known():
    warp = warp_of([])
    warp.predicates["P0"] = 0b0001, 0b0101
    step = semantics.step_of(instruction("VOTE.ANY P2, P0"))
    step(warp, 0b0101)
    assert warp.predicates["P2"][1] & 0b0101 == 0b0101
    step(warp, 0b0011)
    assert warp.predicates["P2"][1] & 0b0011 == 0


@pytest.mark.parametrize(
    ("text", "known", "value"),
    [
        ("ISETP.EQ.AND P2, PT, R9, R2, P0", 0b11100, 0b00000),
        ("ISETP.EQ.OR P2, PT, R9, R2, P0", 0b00011, 0b00011),
        ("ISETP.EQ.XOR P2, PT, R9, R2, P0", 0, 0),
        ("SEL R0, R9, R2, P0", 0b11100, 7),
        ("SEL R0, R2, R9, P0", 0b00011, 7),
        ("FSEL R0, R2, R9, P0", 0b00011, 7),
        ("IMAD.WIDE R0, R2, R3, R3", 0, 0),  # the addend is {R4, R3}
        ("IMAD.WIDE R0, R2, R3, R2", 0b11111, 7 * 7 + 7),
    ],
)
def test_what_is_known_is_what_does_not_depend_on_the_unknown(text, known, value):
    lanes = 0b11111
    warp = warp_of([[7] * 32, [7] * 32], (0b00011,))
    semantics.step_of(instruction(text))(warp, of.ALL)
    if "P2" in text:
        found, sure = warp.predicates["P2"]
        assert (sure & lanes, found & sure & lanes) == (known, value)
    else:
        values, sure = warp.registers["R0"]
        assert sure & lanes == known
        assert {int(values[lane]) for lane in of.lanes(known)} <= {value}


@pytest.mark.parametrize(
    ("opcode", "operands"),
    [("MOV", ("R0", "0x1")), ("ISETP.EQ.AND", ("P1", "PT", "RZ", "RZ", "PT"))],
)
def test_a_guard_that_is_not_known_leaves_what_is_not_known(opcode, operands):
    code = [listing.Instruction(0x0, "P0", opcode, operands)]
    if opcode == "MOV":
        compare = ("P1", "PT", "R0", "0x1", "PT")
        code.append(listing.Instruction(0x10, "", "ISETP.EQ.AND", compare))
    code.append(listing.Instruction(0x20, "P1", "EXIT", ()))
    kernel = listing.Kernel("guarded", "sm_90", tuple(code), 8, 0, 0, b"")
    with pytest.raises(machine.NotKnown, match="0x20: EXIT depends on P1"):
        run(kernel, b"")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("LDC R2, c[0x0][0x4]", [0x8685_8483]),
        ("LDC.64 R2, c[0x0][R2+0x4]", [0x8A89_8887, 0x8E8D_8C8B]),  # over its own index
        ("LDC.U16 R2, c[0x0][0x4]", [0x8483]),
        ("LDC.S8 R2, c[0x0][R2]", [0xFFFF_FF83]),
        ("LDCU.128 UR4, c[0x0][0x0]", [0x8281_807F, 0x8685_8483, 0x8A89_8887, 0x8E8D_8C8B]),
    ],
)
def test_constants_are_loaded_from_their_bank(text, words):
    warp = warp_of([[4] * 32])
    warp.constants = {0: bytes(range(0x7F, 0xFF))}
    one = instruction(text)
    semantics.step_of(one)(warp, of.ALL)
    for place, word in enumerate(words):
        values, known = warp.registers[of.next_register(one.operands[0], place)]
        assert ([int(x) for x in values], known) == ([word] * 32, of.ALL)


def test_a_uniform_register_is_written_where_its_guard_is_true_alone():
    warp = warp_of([])
    warp.write("UR4", of.same(3), of.ALL, 0)
    assert warp.read("UR4")[1] == 0
    warp.write("UR4", of.same(3), of.ALL, 1)
    assert warp.read("UR4")[1] == of.ALL


@pytest.mark.parametrize(
    ("width", "stride", "expected"),
    [(4, 4, 1), (4, 8, 2), (4, 128, 32), (4, 0, 1), (4, 132, 1), (16, 16, 4), (8, 8, 2), (1, 1, 1)],
)
def test_passes_through_shared_memory_are_conflicts_of_banks(width, stride, expected):
    addresses = stride * np.arange(32, dtype=np.int64), of.ALL
    assert memory.passes(addresses, width, of.ALL) == expected
    assert memory.passes(addresses, width, 0) == 0


def test_matrices_of_shared_memory_take_a_pass_each_and_so_does_an_exchange():
    warp = warp_of([[128 * lane for lane in range(32)]])
    for text, passes in (
        ("LDSM.16.M88.4 R4, [R2]", 4),
        ("LDSM.16.M88 R4, [R2]", 1),
        ("SHFL.BFLY PT, R4, R2, 0x1, 0x1f", 1),
        ("LDS R4, [R2]", 32),
    ):
        before = warp.issued.shared_cycles
        memory.step_of(instruction(text))(warp, of.ALL)
        assert warp.issued.shared_cycles - before == passes


def test_a_product_of_tensor_cores_writes_four_registers():
    warp = warp_of([[1] * 32] * 4)
    semantics.step_of(instruction("HMMA.16816.F32 R2, R8, R12, R16"))(warp, of.ALL)
    assert [warp.read(f"R{i}")[1] for i in range(2, 6)] == [0] * 4


def test_what_a_loop_waits_for_has_arrived():
    warp = warp_of([])
    text = "SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [R2], R3"
    semantics.step_of(instruction(text))(warp, of.ALL)
    assert warp.predicates["P2"] == (of.ALL, of.ALL)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[R2]", 5),
        ("[R2.X16+0x10]", 5 * 16 + 16),
        ("[R2+UR4+-0x4]", 5 + 1000 - 4),
        ("desc[UR6][R2.64]", 5 + 7 * WORD),
        ("desc[UR6][R2.U32+UR4.64+0x8]", 5 + 1000 + 2 * WORD + 8),
        ("[0x20]", 32),
    ],
)
def test_addresses_are_sums(text, expected):
    warp = warp_of([[5] * 32, [7] * 32])
    warp.write("UR4", of.same(1000), of.ALL, of.ALL)
    warp.write("UR5", of.same(2), of.ALL, of.ALL)
    values, known = of.address(text)(warp)
    assert ({int(x) for x in values}, known) == ({expected}, of.ALL)


# The operators.
