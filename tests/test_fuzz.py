"""The fuzzer: some thousand calls of it, and whether it finds what is wrong on purpose."""

import functools
import os
import signal
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch

import tcur_kernels as tcur
from tcur_kernels import decompose
from tolerance import assert_close, assert_equal_in_float64

sys.path.append(str(Path(__file__).parent / "fuzz"))

import fuzz
import fuzz_functions
import fuzz_models
import fuzz_operators
from conformance import calls
from fuzz_draw import Draw
from fuzz_judge import (
    REFUSED,
    RIGHT,
    Call,
    Wrong,
    expect_close,
    expect_like,
    is_of_few,
    renewed,
    verdict,
)

#: Calls of each of the tests below.
COUNT = 520


def run(*arguments):
    """Counts of a run, whose faults fail the test with what reproduces them."""
    told = []
    args = fuzz.parse([*arguments, "--workers", "1"])
    counts, by_backend, _, faults = fuzz.drive(args, told.append)
    assert not faults, "\n".join(told)
    return counts, by_backend


@pytest.mark.parametrize("part", range(4))
def test_random_calls_are_right_or_refused(part):
    """On the reference, every instruction set of the CPU, and of public functions."""
    first = str(part * COUNT)
    counts, by_backend = run(
        "--seed", "24", "--first", first, "--count", str(COUNT), "--without", "cudahost"
    )
    assert counts[RIGHT] + counts[REFUSED] == COUNT
    assert counts[REFUSED] < counts[RIGHT]
    assert {"functions", "reference"} < set(by_backend)


def test_random_calls_of_cuda_kernels_on_the_host():
    counts, _ = run("--seed", "24", "--count", "16", "--backend", "cudahost")
    assert counts[RIGHT] + counts[REFUSED] == 16


def test_a_call_is_made_of_two_numbers():
    without = ("cudahost",)
    for index in range(20):
        one, other = (fuzz.make(3, index, without) for _ in range(2))
        assert (one.text, one.backend) == (other.text, other.backend)
        pairs = zip(one.inputs, other.inputs, strict=True)
        assert all(a.layout != torch.strided or torch.equal(a, b) for a, b in pairs)


#: Public names that take no tensors, or are made by a function that the fuzzer calls.
NOT_CALLED = {
    "Adapter", "AdapterStore", "GroupedCores", "LoraExport", "Plan", "StackedCores", "Tenants",
    "TensorCUR", "MatrixCUR", "ModewiseCUR", "Selection",  # results and types
    "load_adapter", "read_metadata", "open_stack", "FileMatrix", "FileSlices", "Shards",  # files
    "ShardedSlices",  # needs processes
    "CORES", "RULES", "Slices",  # names, and a base class
    "Norm", "Norm2", "Leverage", "Deim", "Inverse", "Uniform",  # by their names, see `tensor_cur`
}  # fmt: skip


def test_every_public_name_is_called_or_is_listed():
    called = {*fuzz_functions.FUNCTIONS, *fuzz_models.FUNCTIONS}
    called |= {"TProductLinear"} if "TProductStack" in called else set()  # its layers
    public = {*tcur.__all__, *decompose.__all__}
    assert public - called == NOT_CALLED
    assert set(fuzz_operators.OPERATORS) == set(fuzz_operators.contract.OPERATORS)


# -- faults that are planted


def operator_call(wrong):
    """A call of an operator whose results are spoilt by ``wrong``."""
    backend = fuzz_operators.backends(("cudahost",))["reference"]
    for index in range(100):
        call = fuzz_operators.make(Draw(1, index), backend, "materialize")
        if not call.refusable and "none" in call.text and "meta" not in call.text:
            break
    whole = call.run
    call.run = lambda: wrong(whole(), call)
    return call


def one_element_forgotten(found, call):
    found[0].view(-1)[-1] = float("nan")
    return found


def a_tail_of_zeros(found, call):
    found[0][..., -1] = 0
    return found


def one_element_too_far(found, call):
    found[0].view(-1)[1:] = found[0].reshape(-1)[:-1].clone()
    return found


def another_dtype(found, call):
    return (found[0].double() if found[0].dtype != torch.float64 else found[0].float(),)


def strides_of_another(found, call):
    return (found[0].mT.contiguous().mT,)


def an_input_that_changes(found, call):
    call.inputs[0].view(-1)[:1] += 1
    return found


def a_warning(found, call):
    warnings.warn("something odd", UserWarning, stacklevel=1)
    return found


def other_bits_every_time(found, call):
    return (found[0] * (1 + torch.rand(()) * 1e-7),)


def a_refusal(found, call):
    raise ValueError("core: expected something else, got this")


def an_error_of_python(found, call):
    raise KeyError("core")


PLANTED = [
    one_element_forgotten, a_tail_of_zeros, one_element_too_far, another_dtype, strides_of_another,
    an_input_that_changes, a_warning, a_refusal, an_error_of_python,
]  # fmt: skip


@pytest.mark.parametrize("wrong", PLANTED)
def test_the_judge_finds_what_is_planted(wrong):
    assert verdict(operator_call(lambda found, call: found)) == RIGHT
    with pytest.raises(AssertionError):
        verdict(operator_call(wrong))


def test_the_judge_asks_for_the_same_bits():
    call = Call("one", "here", lambda: torch.rand(3), judge=lambda found: None)
    with pytest.raises(Wrong, match="other bits"):
        verdict(call)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("MKL FFT error: inconsistent"), "unclear refusal"),
        (TypeError("'NoneType' object is not iterable"), "unclear refusal"),
        (ValueError("a number was wrong somewhere"), "names nothing"),
        (ZeroDivisionError("division by zero"), "raised ZeroDivisionError"),
    ],
    ids=str,
)
def test_the_judge_reads_refusals(error, words):
    def refuse():
        raise error

    call = Call("one", "here", refuse, judge=None, is_public=True, refusable=True)
    with pytest.raises(Wrong, match=words):
        verdict(call)


def test_a_clear_refusal_is_one():
    def refuse():
        raise ValueError("rank: expected 1 to 3, got 4")

    call = Call("one", "here", refuse, judge=None, is_public=True, refusable=True)
    assert verdict(call) == REFUSED


def test_the_bound_refuses_an_error_of_a_wrong_sum():
    exact = torch.randn(50, dtype=torch.float64)
    same = exact.float()
    expect_like(same, same)
    expect_close(same, same, exact)
    with pytest.raises(Wrong):
        expect_close(same * (1 + 1e-5), same, exact)


def test_the_judge_looks_again_at_few_numbers_in_the_same_places():
    whole = torch.arange(12.0).reshape(3, 4)
    expanded = whole[1:2, ::2].expand(5, 2)
    other = renewed(expanded)
    assert (other.shape, other.stride()) == (expanded.shape, expanded.stride())
    assert other.storage_offset() == expanded.storage_offset()
    assert not torch.equal(other, expanded)
    many = torch.zeros(65)
    assert is_of_few(torch.zeros(64), {})
    assert is_of_few(many, {"a": many, "b": [whole, None]})
    assert not is_of_few(many, {"a": many, "b": torch.zeros(2, dtype=torch.int64)})


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("n3", [1, 2, 5, 6])
@pytest.mark.parametrize("adapter_ids", [None, torch.tensor([1, 0])])
def test_one_sum_over_all_planes_is_the_same_product(n3, is_transposed, adapter_ids):
    n1, n2, rank, slices = 4, 3, 2, min(2, n3)
    numbers = functools.partial(torch.randn, dtype=torch.float64)
    given = {
        "lateral_hat": numbers(n1, n3 * rank),
        "horizontal_hat": numbers(n3 * rank, n2),
        "core": numbers(*(() if adapter_ids is None else (2,)), n3, rank, rank),
        "x": numbers(2, 3, slices * n1 if is_transposed else n2),
        "weight": numbers(slices * n1, n2),
        "bias": None if is_transposed else numbers(slices * n1),
        "slice_index": n3 - slices,
        "slices": slices,
        "scale": 0.7,
        "transposed": is_transposed,
        "adapter_ids": adapter_ids,
    }
    for one in (given, {**given, "weight": None, "bias": None}):
        found = fuzz_operators.linear_by_planes(**one)
        assert_equal_in_float64(found, calls.plain("cur_linear", **one))


def test_crashes_and_hangs_are_reported_and_the_rest_goes_on(tmp_path, monkeypatch):
    """One call of ten ends its process, and one never ends."""
    program = tmp_path / "planted.py"
    program.write_text(
        textwrap.dedent(f"""
        import os, signal, sys, time
        sys.path[:0] = [{str(Path(fuzz.__file__).parent)!r}]
        import fuzz
        fuzz.paths()
        from fuzz_judge import Call

        def run(index):
            if index == 3:
                os.kill(os.getpid(), signal.SIGFPE)
            if index == 6:
                time.sleep(1000)
            return []

        def make(seed, index, *rest):
            return Call("one", "here", lambda: run(index), judge=lambda found: None)

        fuzz.make = make
        fuzz.as_worker(fuzz.parse())
        """)
    )
    monkeypatch.setattr(fuzz.Worker, "program", str(program))
    monkeypatch.setattr(fuzz, "LIMIT", 5)
    told = []
    args = fuzz.parse(["--count", "10", "--workers", "1"])
    counts, *_, faults = fuzz.drive(args, told.append)
    assert counts == {RIGHT: 8, "crash": 1, "hang": 1}
    assert [fault["done"] for fault in faults] == [3, 6]
    assert signal.Signals.SIGFPE.name in faults[0]["error"]
    assert os.path.exists(fuzz.__file__)


# -- what the fuzzer found: operators past the Python layer

SIZES = {"n3": 4, "n1": 6, "n2": 9, "rank": 2}


def packed(n1=6, n2=9, q=8):
    return torch.randn(n1, q), torch.randn(q, n2)


@pytest.mark.parametrize("language", ["", "_reference"])
@pytest.mark.parametrize("empty", ["n1", "n2", "rank", "n3"])
def test_empty_axes_are_refused_in_every_language(language, empty):
    """No rows, no columns, no rank, no slices: n2 = 0 ended the process with a SIGFPE."""
    ops = torch.ops.tcur
    n3, n1, n2, rank = (SIZES[name] * (name != empty) for name in ("n3", "n1", "n2", "rank"))
    factors, core = packed(n1, n2, n3 * rank), torch.randn(n3, rank, rank)
    calls = [
        lambda: getattr(ops, f"core_grad_dense{language}")(torch.randn(n3, n1, n2), *factors),
        lambda: getattr(ops, f"materialize{language}")([], *factors, core, 1.0, torch.float32),
        lambda: getattr(ops, f"cur_linear{language}")(
            torch.randn(3, n2), None, None, *factors, core, 0, 1, 1.0, False
        ),
        lambda: getattr(ops, f"core_grad_tokens{language}")(
            torch.randn(3, n2), torch.randn(3, n1), *factors, n3, 0, 1
        ),
    ]
    for call in calls:
        with pytest.raises((RuntimeError, ValueError), match=r"_hat|core|n3|grad"):
            call()


@pytest.mark.parametrize("language", ["", "_reference"])
@pytest.mark.parametrize("first", [2**63 - 1, 2**62, -1, 3])
def test_slices_whose_numbers_overflow_are_refused(language, first):
    """2**63 - 1 and as many slices have a sum of -2, which is not more than n3."""
    op = getattr(torch.ops.tcur, f"cur_linear{language}")
    core = torch.randn(4, 2, 2)
    with pytest.raises((RuntimeError, ValueError), match="slice_index"):
        op(torch.randn(3, 9), None, None, *packed(), core, first, 2**63 - 1, 1.0, False)


@pytest.mark.parametrize("language", ["", "_reference"])
def test_what_does_not_fit_is_refused_and_not_repeated(language):
    """torch repeats a bias of one number, and looks at another z as if it were of these tokens."""
    op = getattr(torch.ops.tcur, f"cur_linear{language}")
    rest = (*packed(), torch.randn(4, 2, 2), 0, 1, 1.0, False)
    x, weight = torch.randn(2, 3, 9), torch.randn(6, 9)
    with pytest.raises((RuntimeError, ValueError), match="bias"):
        op(x, weight, torch.randn(1), *rest)
    with pytest.raises((RuntimeError, ValueError), match="z"):
        op(x, weight, None, *rest, torch.randn(8, 6).mT)
    with pytest.raises((RuntimeError, TypeError), match="x"):
        op(torch.ones(3, 9).long(), None, None, *rest)
    grad = getattr(torch.ops.tcur, f"core_grad_tokens{language}")
    with pytest.raises((RuntimeError, TypeError), match="x"):
        grad(torch.ones(3, 9).long(), torch.randn(3, 6), *packed(), 4, 0, 1)


def test_fakes_refuse_what_kernels_refuse():
    x, core = torch.randn(3, 8, device="meta"), torch.randn(4, 2, 2, device="meta")
    factors = [each.to("meta") for each in packed()]
    with pytest.raises(ValueError, match=r"x: expected \[..., 9\], got \[3, 8\]"):
        torch.ops.tcur.cur_linear(x, None, None, *factors, core, 0, 1, 1.0, False)


def test_complex_pseudo_inverses_within_a_mode():
    """torch's forgets to conjugate there."""
    from torch.utils.flop_counter import FlopCounterMode

    a = torch.randn(5, 3, 4)
    wanted = tcur.t_pinv(a)
    with FlopCounterMode(display=False):
        assert torch.equal(tcur.t_pinv(a), wanted)


def test_gradients_by_way_of_a_matrix_are_as_wide_as_the_core():
    """Tokens of fp32 with factors of fp64: dyᵀx was rounded to fp32."""
    factors = tcur.CURFactors(torch.randn(3, 5, 2).double(), torch.randn(3, 2, 6).double())
    x, weight = torch.randn(40, 6), torch.randn(5, 6)
    found = []
    for dense in (False, True):
        core = torch.zeros(3, 2, 2, dtype=torch.float64, requires_grad=True)
        y = tcur.cur_linear(x, weight, None, factors, core, 1, dense_grad=dense)
        found.append(torch.autograd.grad(y.sum(), core)[0])
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 1e-13


@pytest.mark.parametrize("rule", [*decompose.RULES])
def test_rules_with_another_default_device(rule):
    a = torch.randn(3, 7, 6)
    torch.manual_seed(0)
    wanted = tcur.tensor_cur(a, 3, rule)
    torch.manual_seed(0)
    with torch.device("meta"):
        found = tcur.tensor_cur(a, 3, rule)
    assert torch.equal(found.rows, wanted.rows)
    assert torch.equal(found.core, wanted.core)


@pytest.mark.parametrize("n3", [700, 1031 * 2 + 1, 2049])
def test_long_tubes_of_one_sign_keep_their_digits(n3):
    """A transform of a thousand terms added them up one after another, and lost a digit."""
    spectrum = torch.ones(1, n3, 2, 2) + torch.rand(2, 2)
    found = torch.ops.tcur.core_of_packed(spectrum, 1.0)
    same = torch.ops.tcur.core_of_packed_reference(spectrum, 1.0)
    assert_close(found, same, torch.ops.tcur.core_of_packed_reference(spectrum.double(), 1.0))
