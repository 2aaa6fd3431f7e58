"""What quantised layers with an adapter compute: values, gradients, batches, compiled code."""

import pytest
import torch
from torch.nn import functional as F

import tcur_kernels as tcur
from adapted import randomise
from oracle import cur_product
from plain import product as cur_by_torch
from quantisers import QUANTISERS, WIDTH, Two, dequantised, torchao, two
from tcur_kernels.layers.quantised import QuantisedPlace
from tcur_kernels.operators import eager
from tcur_kernels.operators.functional import update_linear
from tolerance import assert_composition_close, same_mathematics

EVERY = pytest.mark.parametrize("name", QUANTISERS)
SOME = pytest.mark.parametrize("name", ["bitsandbytes nf4", "torchao Int8Tensor"])


@pytest.fixture
def x():
    return torch.randn(3, 5, WIDTH)


def adapted(name, dtype=torch.float32, std=0.3, **kwargs):
    """A model with an adapter whose core is not zero, and the adapter."""
    adapter = tcur.adapt(two(name, dtype), rank=4, **kwargs)
    randomise(adapter, std)
    return adapter.model, adapter


def of_one_layer(name, dtype=torch.float32, std=0.3):
    """The parts of a test of the first layer: it, its twin without an adapter, and its place."""
    model, _ = adapted(name, dtype, std)
    layer, twin = model.blocks[0].q, two(name, dtype).blocks[0].q
    for place in layer.tcur_place.stack.places:
        place.ran = True  # the others need not
    return layer, twin, layer.tcur_place


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fresh_adapter_changes_no_bit_and_trains_the_core_alone(name, dtype, x):
    model, x = two(name, dtype), x.to(dtype)
    y = two(name, dtype)(x)
    modules = [*model.modules()]
    adapter = tcur.adapt(model, rank=4)
    assert torch.equal(model(x), y)
    assert all(one is other for one, other in zip(model.modules(), modules, strict=False))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["tcur.64x64"]
    model(x).float().square().mean().backward()
    grad = adapter.stacks["64x64"].core.grad
    assert (grad != 0).any(dim=(1, 2)).all()


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients_are_those_of_float64(name, dtype, x):
    """Beside the product of the library, which has its own roundings."""
    layer, twin, place = of_one_layer(name, dtype)
    stack, x = place.stack, x.to(dtype).requires_grad_()
    base, weight = twin(x.detach()), dequantised(twin).double()
    factors = [each.double() for each in (stack.lateral, stack.core.detach(), stack.horizontal)]
    update = stack.scale * cur_product(*factors)[place.slice_index]
    y = layer(x)
    assert y.dtype == dtype

    def plain():
        return (base.float() + F.linear(x.detach().float(), update.float())).to(dtype)

    exact = base.double() + x.detach().double() @ update.T
    assert_composition_close(y, plain, exact)

    grad_y = torch.randn_like(y)
    y.backward(grad_y)

    def gradients(of, dy):
        lateral, horizontal = stack.lateral.to(of), stack.horizontal.to(of)
        core = stack.core.detach().to(of).requires_grad_()
        made = stack.scale * cur_by_torch(lateral, core, horizontal)[place.slice_index]
        (x.detach().to(of) @ made.mT * dy.to(of)).sum().backward()
        return core.grad, dy.to(of) @ (weight.to(of) + made.detach())

    wide = torch.float32
    of_core, of_x = gradients(torch.float64, grad_y)
    assert_composition_close(stack.core.grad, lambda: gradients(wide, grad_y)[0], of_core)
    # The library multiplies dy by a weight in its own dtype, and the sum of both is rounded.
    assert_composition_close(x.grad, lambda: gradients(wide, grad_y)[1].to(dtype), of_x)


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_small_update_survives_in_the_mean(name, dtype):
    """The product is rounded before the update is added; far below its last bit it counts still."""
    layer, twin, place = of_one_layer(name, dtype, std=3e-5)
    x = torch.randn(4000, WIDTH, dtype=dtype)
    update = place.stack.update(place).detach().double()
    wanted = x.double() @ update.T
    with torch.no_grad():
        base = twin(x)
        found = (layer(x).double() - base.double()).flatten()
    assert wanted.abs().mean() < base.abs().mean() * torch.finfo(dtype).eps / 4
    part = (found @ wanted.flatten()) / wanted.flatten().square().sum()
    assert part.item() == pytest.approx(1.0, abs=0.15)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_a_zero_update_keeps_negative_zeros():
    product = torch.tensor([-0.0, 0.0, 1.5, float("inf"), -2.0])
    update = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for add in (eager.added_to_rounded, eager._added_by_torch):
            y = add(product.to(dtype), update)
            assert y.tolist() == [0.0, 0.0, 1.5, float("inf"), -1.0]
            assert y.signbit().tolist() == [True, False, False, False, True]
        batched = torch.vmap(eager.added_to_rounded)(product.to(dtype)[None], update[None])
        assert torch.equal(batched[0], y)
    _, tangent = torch.func.jvp(
        eager.added_to_rounded, (product[:1], update[:1]), (torch.ones(1), torch.ones(1))
    )
    assert tangent.item() == 2


@EVERY
def test_no_call_dequantises_a_weight(name, x, monkeypatch):
    model, _ = adapted(name)
    made = []
    monkeypatch.setattr(QuantisedPlace, "weight", property(made.append))
    for _ in range(2):
        model(x.requires_grad_()).sum().backward()
    assert not made


@SOME
def test_q_k_and_v_share_the_product_with_r(name, x, monkeypatch):
    from tcur_kernels.layers import w_eff

    counted = []

    def project(*args):
        counted.append(1)
        return eager.project(*args)

    monkeypatch.setattr(w_eff, "project", project)
    model, adapter = adapted(name)
    with adapter.batch(adapter.stack_cores(["default"]), torch.zeros(3, dtype=torch.int64)):
        model(x)
    assert len(counted) == 4  # in each block one of q, k and v, and one of o


@SOME
def test_each_row_of_a_batch_goes_by_its_adapter(name, x):
    model, adapter = adapted(name)
    adapter.add("b")
    adapter.stacks["64x64"].core_of("b").data.normal_(std=0.3)
    alone = {}
    for each in ("default", "b"):
        adapter.activate(each)
        alone[each] = model(x)
    rows = ["b", "default", "b"]
    with adapter.batch(adapter.stack_cores(["default", "b"]), torch.tensor([1, 0, 1])):
        y = model(x)
    for row, each in enumerate(rows):
        assert same_mathematics(y[row], alone[each][row])
        assert not same_mathematics(y[row], alone["b" if each == "default" else "default"][row])


@EVERY
def test_under_autocast(name, x):
    model, adapter = adapted(name)
    y = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(x.requires_grad_())
        low.float().sum().backward()
    assert same_mathematics(low.float().bfloat16(), y.bfloat16())
    assert x.grad.dtype == torch.float32
    assert adapter.stacks["64x64"].core.grad.dtype == torch.float32


@SOME
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled(name, x):
    """Without a break where the product of the library compiles."""
    layer, _, place = of_one_layer(name)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph="torchao" in name)
    assert torch.equal(compiled(x), layer(x))
    with torch.no_grad():
        place.stack.core.mul_(2)
    assert torch.equal(compiled(x), layer(x))


def test_the_update_alone():
    """Beside `cur_linear` with a base of zeros; and what it refuses."""
    factors = tcur.CURFactors(torch.randn(4, 6, 2), torch.randn(4, 2, 5))
    core, x = torch.randn(4, 2, 2, requires_grad=True), torch.randn(3, 7, 5, requires_grad=True)
    zeros = torch.zeros(12, 5)
    y = update_linear(x, factors, core, 1, 2, scale=0.5)
    wanted = tcur.cur_linear(x, zeros, None, factors, core, 1, 0.5)
    assert same_mathematics(y, wanted)
    grads = [torch.autograd.grad(each.square().sum(), (core, x)) for each in (y, wanted)]
    assert all(map(same_mathematics, *grads))
    cores, ids = torch.randn(2, 4, 2, 2), torch.tensor([1, 0, 1])
    rows = update_linear(x, factors, cores, 1, 2, adapter_ids=ids)
    assert same_mathematics(rows[1], update_linear(x, factors, cores[0], 1, 2)[1])
    with pytest.raises(ValueError, match=r"slice_index: expected 0 to 2 for 2 of 4 slices, got 3"):
        update_linear(x, factors, core, 3, 2)
    with pytest.raises(ValueError, match=r"x: expected \[..., 5\], got \[3, 7, 4\]"):
        update_linear(x[..., :4], factors, core, 0)
    with pytest.raises(TypeError, match=r"x: expected at most the precision of fp32 factors"):
        update_linear(x.double(), factors, core, 0)
    with pytest.raises(ValueError, match=r"adapter_ids: expected as many as x .* has rows, got 2"):
        update_linear(x, factors, cores, 0, adapter_ids=ids[:2])


def test_other_dtypes_and_devices_of_tokens(x):
    model, _ = adapted("bitsandbytes int8")
    y = model(x)
    wide = model(x.double())
    assert wide.dtype == torch.float64
    assert same_mathematics(wide.float(), y)
    model, adapter = adapted("HQQ 4 bits", torch.float64)
    assert adapter.stacks["64x64"].core.dtype == torch.float64
    assert same_mathematics(model(x.double()), adapter.merge(inplace=False)(x.double()))
    place = model.blocks[0].q.tcur_place
    on_meta = x.double().to("meta")
    assert place.stack.add_update(on_meta, on_meta, place).is_meta


def test_a_4_bit_layer_is_not_repacked_for_the_cpu():
    model = two("bitsandbytes nf4")
    model.blocks[0].q.support_avx512bf16_for_cpu = True
    tcur.adapt(model, rank=4)
    assert model.blocks[0].q.support_avx512bf16_for_cpu is False


def test_a_product_without_a_gradient_is_refused(x):
    """Rounded activations have none in torchao, whatever the input needs."""
    torch.manual_seed(0)
    model = Two().requires_grad_(False)
    torchao().quantize_(model, torchao().Int8DynamicActivationInt8WeightConfig())
    adapter = tcur.adapt(model, rank=4)
    with torch.no_grad():
        assert model(x).shape == x.shape
    with pytest.raises(RuntimeError, match=r"gradient by blocks.0.q, whose input .*torchao Int8Te"):
        model(x.requires_grad_())
    assert adapter.stacks["64x64"].core.grad is None


@SOME
def test_w_eff_that_somebody_asked_for_is_not_kept(name):
    """No layer computes with it, and it takes the memory that quantisation has saved."""
    _, adapter = adapted(name)
    (stack,) = adapter.stacks.values()
    assert stack.effective(torch.float32).shape == (stack.n3, stack.n1, stack.n2)
    assert stack._kept._eager is None
