"""What Triton's kernels would read and issue, counted from their machine code: no GPU is needed.

The rule for `materialize`: P and R̂ take less time from the second-level cache than base and result
take from device memory. The rates are those of an H200, where that is harder than on an H100.
"""

import functools
import struct

import pytest
import torch

from tcur_kernels.operators.triton import INTERPRETED

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing"),
]

#: TB/s of the second-level cache and of device memory.
CACHE, MEMORY = 5.5, 4.3
FP32, BF16 = torch.float32, torch.bfloat16
SHAPES = [(12, 3072, 768, 8), (48, 768, 768, 8), (128, 1024, 1024, 8)]


@pytest.fixture(scope="module")
def counter(tmp_path_factory):
    from benchmarks.sass import triton_launches

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield triton_launches


@pytest.fixture(scope="module")
def counted(counter):
    """Counts the main launch of a case, by one of its programs, and how many numbers it writes."""

    @functools.cache
    def count(shape, base, out, layers=False):
        _, main = counter.materialize_launches("sm_90", shape, base, out, layers)
        middle = (main.grid[0] // 2, 0)
        return counter.count("sm_90", main, [middle]), shape[0] * shape[1] * shape[2]

    return count


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("base", "out"), [(FP32, FP32), (BF16, BF16)], ids=str)
def test_factors_take_less_time_than_base_and_result(counted, shape, base, out):
    count, numbers = counted(shape, base, out)
    assert count.local_bytes == 0
    moved = numbers * (base.itemsize + out.itemsize)
    # The counter knows every address: all of the base was read once, all of the result written.
    # A program of 128 slices has slice 64 beside its 64.
    assert count.once["base_ptr"] + count.written == pytest.approx(moved, rel=0.02)
    factors = count.once["mixed_ptr"] + count.once["horizontal_ptr"]
    assert factors / CACHE < moved / MEMORY


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_programs_fill_a_multiprocessor(counted, shape):
    """Two programs at least, or one that has nearly all of the registers: its sums need them."""
    count, _ = counted(shape, FP32, FP32)
    assert count.programs >= 2 or count.registers > 224


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_layers_are_read_by_vectors(counted, dtype):
    stack, numbers = counted(SHAPES[1], dtype, dtype)
    layers, _ = counted(SHAPES[1], dtype, dtype, layers=True)
    assert layers.widths["LDG"][16] == stack.widths["LDG"][16]
    # Their addresses come from memory. Of what is read there, nothing is read twice.
    assert layers.once["?"] == pytest.approx(numbers * dtype.itemsize, rel=0.01)


def test_arguments_lie_as_triton_passes_them(counter):
    mix, _ = counter.materialize_launches("sm_90", SHAPES[1], FP32, FP32)
    data = counter.arguments_of(counter.compiled("sm_90", mix), mix)
    pointers, rest = struct.unpack("<4Q", data[:32]), struct.unpack("<3if", data[32:48])
    assert pointers == tuple(counter.APART * place for place in (1, 2, 3, 4))
    assert rest == (768, 48, 8, 0.5)
    assert not any(data[48:])  # addresses of scratch memory, by Triton's version


def test_programs_are_taken_from_the_middle_of_a_grid(counter):
    assert counter.sample((9, 2)) == [(4, 0), (4, 1)]
    assert counter.sample((2, 48, 3)) == [(0, 24, 1), (1, 24, 1)]
