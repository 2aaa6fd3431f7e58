"""Instructions, warps and launches for the tests of benchmarks/sass."""

import numpy as np

from benchmarks.sass import listing, machine
from benchmarks.sass import operands as of


def instruction(text):
    opcode, _, rest = text.partition(" ")
    return listing.Instruction(0, "", opcode, tuple(part.strip() for part in rest.split(",")))


def warp_of(words, flags=(0, 0)):
    warp = machine.Warp({}, 0, 0, ())
    for place, values in enumerate(words):
        warp.registers[f"R{2 + place}"] = np.array(values, np.int64), of.ALL
    for place, mask in enumerate(flags):
        warp.predicates[f"P{place}"] = mask, of.ALL
    return warp


def run(kernel, arguments, threads=32, block=0, warp=0, blocks=2, known=()):
    constants = machine.constants_of(kernel, threads, blocks, arguments)
    return machine.Program(kernel).run(constants, block, warp, threads, known)
