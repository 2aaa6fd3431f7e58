"""The weight of an adapted layer reads as the one that counts."""

import copy
import gc
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tcur_kernels as tcur
from adapted import (
    WIDTH,
    Reads,
    adapted,
    assert_is_the_merged_model,
    randomise,
)
from plain import Plain
from tolerance import assert_composition_close, same_mathematics


@pytest.fixture
def x():
    return torch.randn(5, WIDTH)


@pytest.mark.parametrize("mode", ["auto", "materialized", "factored"])
def test_a_weight_that_is_read_is_w_eff(mode, x):
    base = Reads()
    model = copy.deepcopy(base)
    adapter = tcur.adapt(model, rank=3, mode=mode)
    assert torch.equal(model(x), base(x))
    assert torch.equal(model.parts[0].weight, base.parts[0].weight)
    randomise(adapter)
    assert_is_the_merged_model(model, adapter, x)
    plain, exact = Plain(adapter, torch.float32), Plain(adapter, torch.float64)

    def loss(y):
        return y.square().sum()

    y = model(x)
    loss(y).backward()
    (core,) = (stack.core for stack in adapter.stacks.values())
    assert_composition_close(
        (y, core.grad),
        lambda: plain.with_gradients(loss, x),
        exact.with_gradients(loss, x.double()),
    )
    with torch.no_grad():
        assert torch.equal(model.parts[0].weight.detach(), model.parts[0].weight.clone())


def test_gradients_through_a_read_can_be_differentiated_again():
    model, adapter = adapted(Reads(), mode="factored")
    model.double()
    core = adapter.stacks["12x12"].core
    x = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, core: model(x), (x, core))
    assert torch.autograd.gradgradcheck(lambda x, core: model(x).sin(), (x, core))


def test_what_is_asked_of_a_weight_alone_computes_nothing(monkeypatch):
    model, adapter = adapted()
    part = model[0]
    stack = adapter.stacks["12x12"]
    monkeypatch.setattr(stack, "effective_value", None)  # computing anything fails
    with torch.no_grad():
        weight = part.weight
        assert (weight.dtype, weight.device.type, weight.shape) == (
            torch.float32,
            "cpu",
            (WIDTH, WIDTH),
        )
        assert (weight.size(0), weight.ndim, weight.numel(), weight.element_size()) == (
            WIDTH,
            2,
            WIDTH * WIDTH,
            4,
        )
        assert weight.is_floating_point()
        assert weight.is_contiguous()
        assert weight.to(torch.float32) is weight
        assert weight.to("meta").is_meta
    assert not torch.is_grad_enabled() or part.weight.requires_grad
    assert adapter.unused() == ()


def test_a_weight_serves_as_an_array_and_in_copies():
    model, _ = adapted()
    weight = model[0].weight.detach()
    assert torch.equal(torch.from_numpy(weight.numpy().copy()), weight.clone())
    assert torch.equal(torch.tensor(weight.tolist()), weight.clone())
    for twin in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert type(twin) is torch.Tensor
        assert torch.equal(twin, weight.clone())
    assert repr(weight) == repr(weight.clone())
    with pytest.raises(RuntimeError, match=r"weight: expected a tensor without a graph"):
        model[0].weight.numpy()
    assert model[0].weight.tolist() == weight.tolist()  # of a parameter, too, without a word
    assert (model[0].weight.numpy(force=True) == weight.numpy()).all()


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad])
def test_a_weight_is_known_as_a_parameter(context):
    model, _ = adapted()
    with context():
        weight, other = model.get_parameter("0.weight"), nn.Linear(WIDTH, WIDTH)
        assert isinstance(weight, nn.Parameter)
        assert torch.equal(weight, model[0].weight)
        with pytest.raises(ValueError, match="Cannot assign non-leaf Tensor to parameter 'weight'"):
            other.weight = weight
        assert not isinstance(weight.detach(), nn.Parameter)
        assert weight.detach().grad_fn is None


def test_the_memory_of_a_weight_is_that_of_its_numbers(tmp_path):
    model, _ = adapted()
    weights = {str(index): part.weight.detach() for index, part in enumerate(model)}
    assert len({weight.data_ptr() for weight in weights.values()} - {0}) == len(weights)
    save_file(weights, tmp_path / "weights.safetensors")  # refuses tensors that share memory
    read = load_file(tmp_path / "weights.safetensors")
    assert all(torch.equal(read[name], weight.clone()) for name, weight in weights.items())
    assert torch.equal(torch.from_dlpack(weights["0"]), weights["0"].clone())
    with pytest.raises(RuntimeError, match="Cannot access data pointer"):  # not a crash
        torch.utils.dlpack.to_dlpack(weights["0"])


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad])
def test_whether_a_weight_is_trained_is_asked_of_the_base(context, x):
    model, _ = adapted()
    layer = model[0]
    with context():
        assert layer.weight.requires_grad_(False) is not None
        layer.weight.requires_grad = False
        assert not layer.base_weight.requires_grad
        own = nn.Parameter(layer.weight)
        own.requires_grad_(False).requires_grad = True  # a parameter made of it is another
        layer.weight.detach().requires_grad_(True)
        assert not layer.base_weight.requires_grad
        layer.weight.requires_grad = True
        assert layer.base_weight.requires_grad
        layer.weight.requires_grad_(False)
        layer.weight.requires_grad_()
    with pytest.raises(ValueError, match=r"weight: expected a frozen tensor, got requires_grad"):
        model(x)


def test_w_eff_of_an_earlier_core_is_not_overwritten(x):
    """Neither what was made of it: a transposed weight is a view."""
    model, adapter = adapted(mode="materialized")
    with torch.no_grad():
        turned = model[0].weight.T
        before = turned.clone()
        randomise(adapter)
        model(x)
        assert torch.equal(turned, before)


def test_writes_go_to_the_base_and_lost_ones_are_refused(x):
    model, adapter = adapted(mode="materialized")
    nn.init.eye_(model[0].weight)
    assert torch.equal(model[0].base_weight, torch.eye(WIDTH))
    model[3].weight.data = 3.0 * torch.eye(WIDTH)
    assert torch.equal(model[3].base_weight, 3.0 * torch.eye(WIDTH))
    model[3].weight.data = model[3].weight.data  # as code does that goes over all weights
    assert torch.equal(model[3].base_weight, 3.0 * torch.eye(WIDTH))
    model[1].weight.data.fill_(0.25)
    assert (model[1].base_weight == 0.25).all()
    with torch.no_grad():
        model[2].weight.copy_(torch.eye(WIDTH)).mul_(2.0)
    assert torch.equal(model[2].base_weight, 2 * torch.eye(WIDTH))
    assert_is_the_merged_model(model, adapter, x)
    with torch.no_grad():
        model[0].weight[0].zero_()
    gc.collect()
    with pytest.raises(RuntimeError, match="got a write in place to a part of the weight of 0"):
        model(x)
    assert_is_the_merged_model(model, adapter, x)


def test_weights_that_were_read_are_put_back_as_the_base(x):
    """Moving weights from device to device reads them, and registers what was read."""
    model, _ = adapted()
    y, before = model(x), model[1].base_weight.clone()
    model[0].weight = model[0].weight
    model[1].weight = nn.Parameter(model[1].weight.detach().to("cpu"), requires_grad=False)
    model[2]._parameters["weight"] = nn.Parameter(model[2].weight.data, requires_grad=False)
    state = model.state_dict()
    assert type(state["2.weight"]) is torch.Tensor
    assert torch.equal(state["1.weight"], before)
    assert torch.equal(model(x), y)
    other = nn.Linear(WIDTH, WIDTH)
    other.weight = nn.Parameter(model[3].weight.detach().clone())
    assert torch.equal(other.weight, model[3].weight.detach().clone())
    with pytest.raises(TypeError, match="expected a parameter, got the effective weight"):
        model[0].weight = model[3].weight


def test_reads_follow_merging_and_disabling():
    model, adapter = adapted()
    model(torch.ones(1, WIDTH))
    base = model[0].base_weight.clone()
    w_eff = model[0].weight.detach().clone()
    with adapter.disable():
        assert torch.equal(model[0].weight, base)
    adapter.merge()
    assert torch.equal(model[0].weight, w_eff)
    assert torch.equal(model[0].base_weight, base)
    adapter.unmerge()
    assert torch.equal(model[0].weight.detach(), w_eff)
    assert torch.equal(model[0].base_weight, base)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_models_that_read_weights_compile_whole(backend, x):
    model, adapter = adapted(Reads())
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    grads = []
    for run in (model, compiled):
        model.zero_grad()
        run(x).square().sum().backward()
        grads.append(adapter.stacks["12x12"].core.grad.clone())
    assert same_mathematics(*grads)
    assert same_mathematics(compiled(x), model(x))


# -- torch's attention reads its weights


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("recorded", [False, True])
def test_a_transformer_encoder_changes_no_bit_padded_places_included(norm_first, recorded):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        WIDTH, 4, 24, batch_first=True, norm_first=norm_first, dropout=0.0
    )
    base = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    model = copy.deepcopy(base)
    padding = torch.arange(6) >= torch.tensor([[6], [4], [3]])
    x = torch.randn(3, 6, WIDTH)
    adapter = tcur.adapt(model, rank=2)
    with torch.set_grad_enabled(recorded):
        before = base(x, src_key_padding_mask=padding)
        assert torch.equal(model(x, src_key_padding_mask=padding), before)
        randomise(adapter)
        moved = model(x, src_key_padding_mask=padding)
        merged = adapter.merge(inplace=False)(x, src_key_padding_mask=padding)
    assert not same_mathematics(moved, before)
    # A merged model trains nothing, and torch leaves padded places out where nothing is trained.
    rows = ~padding if recorded else ...
    assert same_mathematics(moved[rows], merged[rows])
    assert (moved[padding] == 0).all() == (before[padding] == 0).all()
