"""Adapted layers and public functions under functorch and forward mode: as plain torch."""

import contextlib
import itertools

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import tcur_kernels as tcur
from cases import make_case
from plain import Plain, product
from tcur_kernels.operators import eager, functional
from tolerance import assert_composition_close, assert_equal_in_float64, same_mathematics

MODES = pytest.mark.parametrize("mode", ["materialized", "factored"])
SAMPLES = 5

# torch's own, of its first forward derivative.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")


def make_model(dtype=torch.float64, mode="factored"):
    sizes = (12, 9, 12, 9, 12)
    linears = [nn.Linear(*each) for each in itertools.pairwise(sizes)]
    model = nn.Sequential(linears[0], nn.GELU(), *linears[1:]).to(dtype)
    adapter = tcur.adapt(model, rank=3, mode=mode, alpha=0.7)
    for stack in adapter.stacks.values():
        nn.init.normal_(stack.core)
    return model, adapter


def cores_of(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def loss_of(model):
    def loss(cores, x):
        return functional_call(model, cores, (x,)).sin().sum()

    return loss


@MODES
def test_gradients_per_sample(mode):
    model, _ = make_model(mode=mode)
    cores, x = cores_of(model), torch.randn(SAMPLES, 12, dtype=torch.float64)
    assert len(cores) == 2
    loss = loss_of(model)
    of_cores, of_x = vmap(grad(loss, argnums=(0, 1)), in_dims=(None, 0))(cores, x)
    for index in range(SAMPLES):
        own = x[index].clone().requires_grad_()
        wanted = torch.autograd.grad(loss(cores, own), (own, *cores.values()))
        found = (of_x[index], *(of_cores[name][index] for name in cores))
        assert_equal_in_float64(found, wanted)


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        (torch.float32, False),
        (torch.bfloat16, False),
        (torch.float16, False),
        (torch.float32, True),
    ],
)
def test_gradients_per_sample_in_lower_precision(dtype, autocast):
    model, adapter = make_model(dtype)
    cores, x = cores_of(model), torch.randn(SAMPLES, 12).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = vmap(grad(loss_of(model)), in_dims=(None, 0))(cores, x)
    used = torch.bfloat16 if autocast else dtype

    plains = {each: Plain(adapter, each) for each in (used, torch.float64)}

    def each(dtype):
        plain = plains[dtype]
        rows = [plain.with_gradients(lambda y: y.sin().sum(), row.to(dtype))[1:] for row in x]
        return [torch.stack(grads).to(dtype) for grads in zip(*rows, strict=True)]

    assert_composition_close(found.values(), lambda: each(used), each(torch.float64))
    loss_of(model)(cores, x).backward()  # nothing of a transform was kept
    assert all(core.grad.isfinite().all() for core in cores.values())


@MODES
def test_derivatives_of_functions(mode):
    model, adapter = make_model(mode=mode)
    plain = Plain(adapter, torch.float64)
    cores, x = cores_of(model), torch.randn(4, 12, dtype=torch.float64)
    names, same = list(cores), tuple(plain.trained)

    def by_cores(*values):
        return functional_call(model, dict(zip(names, values, strict=True)), (x,)).sin().sum()

    wanted = torch.autograd.grad(plain(x).sin().sum(), same)
    arguments = tuple(range(len(names)))
    assert_equal_in_float64(grad(by_cores, arguments)(*cores.values()), wanted)
    tangents = tuple(torch.randn_like(core) for core in cores.values())
    _, tangent = jvp(by_cores, tuple(cores.values()), tangents)
    assert_equal_in_float64(tangent, sum((g * t).sum() for g, t in zip(wanted, tangents, strict=1)))
    jacobian = torch.autograd.functional.jacobian(plain, x)
    assert_equal_in_float64((jacrev(model)(x), jacfwd(model)(x)), (jacobian, jacobian))
    second = torch.autograd.functional.hessian(lambda x: plain(x).sin().sum(), x)
    assert_equal_in_float64(hessian(lambda x: model(x).sin().sum())(x), second)
    assert_equal_in_float64(vmap(model)(x), plain(x))


@MODES
@pytest.mark.parametrize("recorded", [False, True])
def test_forward_mode(mode, recorded):
    """A tangent is not lost, whether gradients are recorded beside it or not."""
    model, adapter = make_model(mode=mode)
    x, tangent = torch.randn(2, 4, 12, dtype=torch.float64)
    _, wanted = jvp(Plain(adapter, torch.float64), (x,), (tangent,))
    with contextlib.nullcontext() if recorded else torch.no_grad(), forward_ad.dual_level():
        y = model(forward_ad.make_dual(x, tangent))
        assert_equal_in_float64(forward_ad.unpack_dual(y).tangent, wanted)


def test_the_core_is_not_lost_behind_an_effective_weight():
    case = make_case(4, 6, 9, 2, torch.float64)
    factors, core, x = case.factors, case.core, torch.randn(5, 9, dtype=torch.float64)
    w_eff = tcur.materialize(case.weight, factors, core)

    def loss(core, effective):
        return tcur.cur_linear(
            x, case.weight[1], None, factors, core, 1, effective=effective
        ).sin().sum()  # fmt: skip

    wanted = torch.autograd.grad(loss(core.requires_grad_(), w_eff[1]), core)[0]
    assert_equal_in_float64(grad(loss)(core.detach(), w_eff[1]), wanted)


@pytest.mark.parametrize("backend", ["auto", "reference", "cpu"])
def test_public_functions_in_batches(backend):
    case = make_case(4, 6, 9, 2, torch.float64)
    factors, cores = case.factors, torch.randn(3, 4, 2, 2, dtype=torch.float64)
    x, weight = torch.randn(3, 5, 9, dtype=torch.float64), list(case.weight)
    how = {"backend": backend}
    functions = {
        "product": lambda core: tcur.cur_product(factors, core, **how),
        "materialize": lambda core: tcur.materialize(weight, factors, core, 0.5, **how),
        "update": lambda core: functional.slice_update(factors, core, 1, 2, 0.5, **how),
        "linear": lambda core: tcur.cur_linear(x[0], weight[1], None, factors, core, 1, **how),
        "z": lambda core: tcur.cur_linear(
            x[0], weight[1], None, factors, core, 1, z=functional.project(x[0], factors), **how
        ),
    }
    for function in functions.values():
        assert_equal_in_float64(vmap(function)(cores), torch.stack([*map(function, cores)]))
        losses = grad(lambda core, function=function: function(core).sin().sum())
        for core, found in zip(cores, vmap(losses)(cores), strict=True):
            own = core.clone().requires_grad_()
            wanted = torch.autograd.grad(function(own).sin().sum(), own)[0]
            assert_equal_in_float64(found, wanted)
    by_rows = lambda x, ids: tcur.cur_linear(  # noqa: E731
        x, weight[1], None, factors, cores, 1, adapter_ids=ids, **how
    )
    ids = torch.tensor([[0, 1, 2, 0, 1], [2, 2, 2, 1, 0], [0, 0, 0, 0, 0]])
    wanted = torch.stack([by_rows(*each) for each in zip(x, ids, strict=True)])
    assert_equal_in_float64(vmap(by_rows)(x, ids), wanted)


def test_what_is_written_into_a_buffer_is_not_for_a_batch():
    case = make_case(4, 6, 9, 2)
    out, cores = torch.empty(4, 6, 9), torch.randn(3, 4, 2, 2)
    with pytest.raises(RuntimeError, match="vmap: inplace arithmetic"):
        vmap(lambda core: tcur.materialize(case.weight, case.factors, core, out=out))(cores)
    moved = vmap(lambda x: tcur.materialize(case.weight, case.factors, case.core, out=out) + x)
    assert torch.equal(moved(torch.zeros(2))[0], out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_are_rounded_as_elsewhere(dtype):
    update, bias = torch.randn(50, 9).to(dtype), torch.randn(9).to(dtype)
    update[0, 0] = torch.inf
    same = eager.Dithered.apply(update, bias)
    assert torch.equal(eager.dithered_by_torch(update, bias), same)
    assert torch.equal(vmap(eager.dithered_by_torch, (0, None))(update, bias), same)
    _, tangent = jvp(lambda u: eager.dithered_by_torch(u, bias), (update[1:],), (update[1:],))
    assert torch.equal(tangent, update[1:])


@pytest.mark.parametrize("precision", ["ieee", "bf16"])
def test_nothing_of_a_transform_is_kept(precision):
    case = make_case(4, 6, 9, 2)
    factors, x = case.factors, torch.randn(5, 9)

    def loss(core):
        how = {"precision": precision}
        return tcur.cur_linear(x, case.weight[1], None, factors, core, 1, **how).sum()

    grad(loss)(case.core)
    factors.transposed()
    core = case.core.clone().requires_grad_()
    update = product(case.lateral.double(), case.core.double(), case.horizontal.double())[1]
    exact = (x.double() @ (case.weight[1].double() + update).T).sum()
    found = loss(core)
    assert abs(found - exact) < (1e-3 if precision == "ieee" else 1) * 20
    found.backward()
    assert torch.isfinite(core.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_gradients_per_sample(dtype):
    model, _ = make_model(dtype)
    cores, x = cores_of(model), torch.randn(SAMPLES, 12).to(dtype)
    each = vmap(grad(loss_of(model)), in_dims=(None, 0))
    compiled = torch.compile(each, backend="aot_eager", fullgraph=True)(cores, x)
    for name, wanted in each(cores, x).items():
        assert same_mathematics(compiled[name], wanted)


def test_weights_are_not_differentiated():
    model, _ = make_model()
    parameters = dict(model.named_parameters())
    with pytest.raises(ValueError, match="weight: expected a frozen tensor"):
        grad(loss_of(model))(parameters, torch.randn(2, 12, dtype=torch.float64))
