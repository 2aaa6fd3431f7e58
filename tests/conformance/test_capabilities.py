"""The table of backends itself: nothing is missing from it, and what it says is so."""

import pytest
import torch

import tcur_kernels as tcur
from cases import make_case
from tcur_kernels.operators import contract
from tolerance import PROMISE, assert_close, relative_error, same_mathematics

from .backends import BACKENDS, INTERPRETED, INTERPRETER, absence
from .cases import F32, F64, case
from .data import arguments, compute, expected
from .table import CASES

LANGUAGES = {language for each in BACKENDS.values() for language in each.languages.values()}
OPERATORS = {each.operator for each in CASES}

#: One call of each operator, by which a capability shows.
CALLS = {
    "materialize": {},
    "materialize_out": {},
    "core_grad_dense": {},
    "core_grad_tokens": {"tokens": (3,)},
    "core_of_packed": {"count": 2},
    "cur_linear": {"tokens": (3,)},
    "w_eff_linear": {"tokens": (3,)},
}
PROBES = {
    "factors in fp64": {"factors": F64, "elements": (F64,)},
    "elements in fp64": {"elements": (F64,)},
    "factors in bf16": {"precision": "bf16"},
    "bf16 held in fp32": {"precision": "bf16", "bf16_operands": True},
    "2049 slices": {},
}


def test_every_operator_and_language_has_its_place():
    """Whatever is registered under ``tcur::`` is one of the operators in one of the languages."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("tcur::")]
    assert names
    for name in names:
        name = name.removeprefix("tcur::")
        operator = max((each for each in OPERATORS if name.startswith(each)), key=len, default="")
        language = name.removeprefix(operator).removeprefix("_")
        assert operator, f"{name}: no case of tests/conformance/cases.py"
        assert language in LANGUAGES, f"{name}: no backend of tests/conformance/backends.py"
    assert {*contract.LANGUAGES, contract.CUDA_TF32} <= LANGUAGES
    assert set(CALLS) == OPERATORS == set(contract.OPERATORS)


def test_every_backend_that_users_can_ask_for_is_in_the_table():
    stems = {name.partition("_")[0] for name in BACKENDS}
    assert stems >= {"reference", "cpu", "cuda", "triton"} | set(tcur.build_info()["backends"])


def test_every_capability_is_made_use_of(known):
    """Cases of every operator, dtype and precision that the backend has."""
    taken = [each for each in CASES if known.takes(each)]
    assert {each.operator for each in taken} == set(CALLS)
    assert {each.factors for each in taken} == set(known.factors)
    assert {dtype for each in taken for dtype in each.elements} == set(known.elements)
    assert {each.precision for each in taken} == set(known.languages)
    assert set(known.narrow) >= {each.operator for each in taken if each.precision == "bf16"}


def test_it_is_here(known):
    """Or tells why not."""
    reason = absence(known)
    if reason is not None:
        pytest.skip(f"{known}: {reason}")


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("what", PROBES)
def test_it_can_do_what_it_says_and_refuses_the_rest(backend, what, name):
    """What a backend does not declare is refused by it, and not computed by the way."""
    n3, shape = (2049, (1, 1, 1)) if what == "2049 slices" else (4, (24, 34, 8))
    probe = case(name, n3, shape, **CALLS[name], **PROBES[what])
    given, run = arguments(probe)[0], backend.run_case(probe)
    if serves_itself(name, what):
        pytest.skip("nothing of the kind is given to it")
    if n3 > 2048 and backend.few == INTERPRETER:
        pytest.skip("interpreted for minutes")
    if backend.lacks(probe) is not None:
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            compute(probe, run, given)
        return
    actual = compute(probe, run, given).cpu()
    same, exact = expected(probe)
    if n3 > 2048:  # one number, for which no error has a bound
        assert same_mathematics(actual, same)
    elif probe.precision != "ieee":
        assert relative_error(actual, exact) <= PROMISE[probe.precision]
    elif probe.factors == F32 and F64 in probe.elements:
        assert_close(actual.float(), same.float(), exact)
    else:
        assert_close(actual, same, exact)


def serves_itself(name, what):
    """A map by W_eff is torch's own in every language; packed gradients have one dtype."""
    of_dtypes = ("fp64", "bf16", "fp32")
    return name == "w_eff_linear" or (name == "core_of_packed" and what.split()[-1] in of_dtypes)


def test_a_precision_that_it_has_not_is_refused(backend):
    case, name = make_case(4, 6, 9, 2), backend.name.partition("_")[0]
    if name == "cudahost":
        pytest.skip("no backend of the package")
    factors, core = case.factors.to(backend.device), case.core.to(backend.device)
    for precision in ("ieee", "tf32", "bf16"):
        is_its_own = precision in backend.languages and "materialize" in backend.narrow
        if precision == "ieee" or (is_its_own and backend.rounds) or name == INTERPRETED.name:
            tcur.cur_product(factors, core, name, precision=precision)
        elif backend.device == "cpu":
            with pytest.raises(ValueError, match="precision: "):
                tcur.cur_product(factors, core, name, precision=precision)
