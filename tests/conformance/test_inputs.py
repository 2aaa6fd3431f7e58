"""Layouts of what is given, numbers that are no numbers, and ids that no core has."""

import pytest
import torch

from cases import N3
from tolerance import assert_close

from .backends import HALVES
from .cases import ALL_SLOW, BF16, EMULATOR, EVERYWHERE, F32, F64, case
from .data import arguments, by_torch, compute, expected

SIZES = (6, (8, 20, 2))
LAID_OUT = [
    *[case("materialize", *SIZES, meant_for=EVERYWHERE, weights=w) for w in ("stack", "layers")],
    case("materialize_out", *SIZES, meant_for=EVERYWHERE, weights="beside"),
    case("materialize_out", 12, (9, 36, 3), weights="beside"),
    case("materialize_out", 17, (9, 36, 3), weights="beside"),
    case("core_grad_dense", *SIZES, meant_for=EVERYWHERE),
    case("core_grad_tokens", *SIZES, meant_for=EVERYWHERE, tokens=(7,), first=1),
    case("core_grad_tokens", *SIZES, meant_for=EVERYWHERE, tokens=(7,), first=1, way="dense"),
    case("core_grad_tokens", *SIZES, meant_for=EVERYWHERE, tokens=(7,), first=1, way="z"),
    case("core_of_packed", *SIZES, meant_for=EVERYWHERE, count=2),
    *[
        case("core_of_packed", n3, (rank, rank, rank), meant_for=EMULATOR, count=48)
        for n3, rank in ((12, 1), (12, 3), (12, 8), (47, 3), (64, 3))
    ],
    *[
        case("core_of_packed", n3, (2, 2, 2), factors=F64, elements=(F64,), meant_for=(), count=m)
        for n3 in N3
        for m in (0, 1, 48)
    ],
    case("cur_linear", *SIZES, meant_for=EVERYWHERE, tokens=(7,), first=1),
    case("cur_linear", *SIZES, meant_for=EVERYWHERE, tokens=(7,), first=1, transposed=True),
    case("w_eff_linear", *SIZES, meant_for=EVERYWHERE, tokens=(7,), first=1),
]


def turned(tensor):
    """The same numbers, the last two dimensions exchanged in memory."""
    return tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor


def every_second(tensor):
    """The same numbers with others between them."""
    return torch.stack([tensor, torch.full_like(tensor, 7)], -1)[..., 0]


def shifted(tensor):
    """The same numbers, contiguous, from an address that is no multiple of a vector."""
    flat = torch.cat([tensor.new_zeros(1), tensor.flatten()])
    return flat[1:].view(tensor.shape)


def laid_out(given, layout):
    """Every tensor of floating numbers in a layout, but the buffers that are written."""

    def change(name, value):
        if isinstance(value, list):
            return [layout(each) for each in value]
        is_input = isinstance(value, torch.Tensor) and value.is_floating_point() and name != "out"
        return layout(value) if is_input else value

    return {name: change(name, value) for name, value in given.items()}


@pytest.mark.cases(LAID_OUT)
@pytest.mark.parametrize("layout", [turned, every_second, shifted])
def test_layouts(case, backend, layout):
    given = arguments(case)[0]
    same, exact = expected(case)
    actual = compute(case, backend.run_case(case), laid_out(given, layout)).cpu()
    # Known: the reference gives W_eff the strides of a stack, and its fake says contiguous.
    is_stack = case.operator == "materialize" and case.get("weights") == "stack"
    if not (backend.name == "reference" and is_stack and layout is turned):
        assert actual.is_contiguous()
    assert_close(actual, same, exact)


@pytest.mark.cases([case("materialize", 12, (9, 36, 3)), case("core_grad_dense", 12, (9, 36, 3))])
def test_factors_alone_may_be_shifted(case, backend):
    """Kernels that take the other tensors by vectors may get factors that have to go by numbers."""
    given = arguments(case)[0]
    factors = {name: shifted(given[name]) for name in ("lateral_hat", "horizontal_hat")}
    same, exact = expected(case)
    actual = compute(case, backend.run_case(case), {**given, **factors}).cpu()
    assert_close(actual, same, exact)


@pytest.mark.cases([each for each in LAID_OUT if each.operator == "materialize"])
def test_strided_weights_make_no_difference(case, backend):
    given = arguments(case)[0]
    strided = {**given, "weights": [every_second(each) for each in given["weights"]]}
    run = backend.run_case(case)
    assert torch.equal(compute(case, run, strided), compute(case, run, given))


def test_tokens_that_repeat_or_lie_across(backend):
    """A transposed x, and a gradient that is one column expanded."""
    one = case("core_grad_tokens", *SIZES, meant_for=EVERYWHERE, tokens=(7,), first=1)
    given, exact = ({**each} for each in arguments(one))
    for each in (given, exact):
        each["x"] = each["x"].T.contiguous().T
        each["grad_y"] = each["grad_y"][:, :1].expand(7, 8)
    run, plain = backend.run_case(one), expected_of(one)
    assert_close(compute(one, run, given).cpu(), plain(given), plain(exact))


def expected_of(case):
    """What plain torch makes of other arguments of a case."""
    return lambda given: compute(case, by_torch, given)


SPECIAL = [
    case("materialize", n3, (5, 37, 3), elements=(dtype,), meant_for=EVERYWHERE)
    for n3 in (3, 7, 18)
    for dtype in (F32, *HALVES)
]
SPECIAL.append(case("materialize", 7, (5, 37, 3), factors=torch.float64, elements=(torch.float64,)))


@pytest.mark.cases(SPECIAL)
def test_a_zero_core_gives_the_weights_back(case, backend):
    """And what is no number, or a denormal one, passes through."""
    given = arguments(case)[0]
    weight = given["weights"][0].clone()
    weight[0, 0, :3] = torch.tensor([float("inf"), float("-inf"), float("nan")])
    if weight.dtype == F32:  # a NaN that rounding would turn into -0, in a vector and behind them
        weight[0, 0, [3, -1]] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(F32)
    if not (backend.name == "triton_interpreted" and BF16 in case.elements):
        weight[1, 0, 0] = 1e-40  # the interpreter has no denormals in bf16
    changed = {**given, "weights": [weight], "core": torch.zeros_like(given["core"])}
    for dtype in case.elements if case.factors != F32 else (F32, *HALVES):
        if backend.name == "triton_interpreted" and dtype != weight.dtype:
            continue
        w_eff = backend.run("materialize", **{**changed, "out_dtype": dtype}).cpu()
        wanted = weight.to(dtype)
        assert torch.equal(w_eff.isnan(), wanted.isnan())
        assert torch.equal(w_eff.nan_to_num(), wanted.nan_to_num())


def test_nan_in_the_core_is_seen(backend):
    given = arguments(case("materialize", 5, (4, 6, 2)))[0]
    core = given["core"].clone()
    core[0, 0, 0] = float("nan")
    assert backend.run("materialize", **{**given, "core": core}).isnan().all()


#: More rows than cores, so that cores are transformed; and fewer, so that those of each row are.
BAD_IDS = [
    case("cur_linear", 4, (6, 7, 2), meant_for=ALL_SLOW, tokens=tokens, weight=False, ids=ids)
    for tokens, ids in (((6, 2), "mixed"), ((3, 2), "three"))
]


@pytest.mark.cases(BAD_IDS)
@pytest.mark.parametrize("bad", [5, -1])
def test_an_id_of_no_core_reads_nothing(case, backend, bad):
    """It is refused, or gives NaN in its own rows, where asking the GPU would wait for it."""
    given = arguments(case)[0]
    ids = given["adapter_ids"].clone()
    ids[2] = bad
    beside = torch.ones_like(given["core"][:1])  # what lies there, so that no NaN comes from there
    cores = torch.cat([beside, given["core"], beside])[1:-1]
    changed = {**given, "adapter_ids": ids, "core": cores}
    if backend.bad_id == "refused":
        with pytest.raises((RuntimeError, IndexError)):
            backend.run("cur_linear", **changed)
        return
    y = backend.run("cur_linear", **changed).cpu()
    assert y[2].isnan().all()
    assert torch.equal(y[:2], backend.run("cur_linear", **given)[:2].cpu())
    assert y[3:].isfinite().all()


def test_rows_of_no_core_count_for_none(backend):
    one = case("core_grad_tokens", 5, (6, 7, 2), tokens=(6, 3), first=1, ids="mixed")
    given, exact = arguments(one)
    bad, kept = torch.tensor([3, 9, 3, -1, 0, 3]), torch.tensor([0, 2, 4, 5])
    changed = {**given, "adapter_ids": bad}
    if backend.bad_id == "refused":
        with pytest.raises((RuntimeError, IndexError)):
            backend.run("core_grad_tokens", **changed)
        return
    actual = backend.run("core_grad_tokens", **changed).cpu()

    def wanted(given):
        rows = {name: given[name][kept] for name in ("x", "grad_y")}
        return expected_of(one)({**given, **rows, "adapter_ids": bad[kept]})

    assert_close(actual, wanted(given), wanted(exact))
    assert not actual[1].any()


PROJECTED = [case("cur_linear", 5, (6, 20, 3), meant_for=EMULATOR, tokens=(40,), first=3, z=True)]


@pytest.mark.cases(PROJECTED)
def test_projected_tokens_take_the_place_of_tokens(case, backend):
    """Whatever the tokens are, which are there for the base alone."""
    if backend.languages["ieee"] == "reference":
        pytest.skip("plain torch projects tokens itself")
    given = {**arguments(case)[0], "weight": None, "bias": None}
    y = backend.run(case.operator, **given)
    other = backend.run(case.operator, **{**given, "x": torch.zeros_like(given["x"])})
    assert torch.equal(other, y)


ROWS = [
    case(name, 5, (6, 7, 2), meant_for=EMULATOR, tokens=(6, 3), first=1, ids="mixed")
    for name in ("cur_linear", "core_grad_tokens")
]


@pytest.mark.cases(ROWS)
def test_strided_ids_make_no_difference(case, backend):
    given = arguments(case)[0]
    strided = {**given, "adapter_ids": every_second(given["adapter_ids"])}
    run = backend.run_case(case)
    assert torch.equal(compute(case, run, strided), compute(case, run, given))


ROUNDED = [
    case(name, 4, (37, 40, 3), precision="bf16", bf16_operands=True, tokens=(11,), first=2, **how)
    for name, how in (
        ("cur_linear", {"weight": False, "meant_for": EVERYWHERE}),
        ("cur_linear", {"weight": False, "transposed": True}),
        ("core_grad_tokens", {"meant_for": EVERYWHERE}),
        ("core_grad_tokens", {"way": "z"}),
    )
]


@pytest.mark.cases(ROUNDED)
def test_operands_in_fp32_are_rounded_to_bf16(case, backend):
    """So tokens that are rounded already give the same bits."""
    given = arguments(case)[0]
    tokens = [name for name in ("x", "grad_y") if name in given and case.get("way") != "z"]
    tokens = tokens or ["grad_y"]
    rounded = {**given, **{name: given[name].bfloat16().float() for name in tokens}}
    run = backend.run_case(case)
    assert not torch.equal(rounded[tokens[0]], given[tokens[0]])
    assert torch.equal(compute(case, run, rounded), compute(case, run, given))
