"""The base under peft adapters: other weights, weights that are computed, layers that never run."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from hf_models import PEFT_SAYS
from models import Tiny
from plain import with_updates
from tcur_kernels.peft import TCURConfig, TCURLinear
from tolerance import assert_composition_close, assert_equal_in_float64

pytestmark = [pytest.mark.filterwarnings(text) for text in PEFT_SAYS]

TARGETS = ["qkv", "out_proj", "mlp.0", "mlp.2"]


def drawn(base, **kwargs):
    own = TCURConfig(rank=2, target_modules=list(TARGETS), init_weights=False, **kwargs)
    return get_peft_model(copy.deepcopy(base), own).eval()


def other(base):
    """Weights of another base."""
    torch.manual_seed(5)
    twin = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return twin


def load(model, base):
    """Loads the weights of a base into an adapted model, under the names that they have there."""
    own = base.state_dict()
    renamed = {
        name: own[name.removeprefix("base_model.model.").replace(".base_layer", "")]
        for name in model.state_dict()
        if ".core" not in name
    }
    model.load_state_dict(renamed, strict=False)


def assert_is(y, base, model, x):
    """The output is that of the base with the updates of C and R that are there now."""
    exact = with_updates(copy.deepcopy(base).double(), model)(x.double())
    assert_composition_close(y, lambda: with_updates(base, model)(x), exact)


@pytest.fixture
def base():
    return Tiny().eval().requires_grad_(False)


@pytest.fixture
def x():
    return torch.randn(4, 7, 6)


@torch.no_grad()
def test_c_and_r_are_of_the_base_that_was_loaded(base, x):
    model, new = drawn(base), other(base)
    model(x)
    load(model, new)
    y = model(x)
    place = next(m for m in model.modules() if isinstance(m, TCURLinear)).tcur_places["default"]
    stack = place.stack
    lateral, _ = stack.factors.slices
    assert torch.equal(lateral[0], place.weight[: stack.n1, list(stack.columns)])
    assert_is(y, new, model, x)


@torch.no_grad()
def test_a_compiled_model_goes_by_the_base_that_was_loaded(base, x):
    model, new = drawn(base), other(base)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(x)
    load(model, new)
    assert_is(compiled(x), new, model, x)


@torch.no_grad()
def test_an_adapter_is_saved_with_the_base_that_it_is_of(base, x, tmp_path):
    model, new = drawn(base), other(base)
    load(model, new)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(new), tmp_path).eval()
    assert torch.equal(again(x), model(x))
    with pytest.raises(ValueError, match="expected the base that the adapter was made for"):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)


@torch.no_grad()
def test_a_merged_model_moves_with_the_copy_of_its_base(base):
    model = drawn(base)
    model.merge_adapter()
    model.double().unmerge_adapter()
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, TCURLinear):
            assert torch.equal(layer.base_layer.weight, base.get_submodule(name).weight.double())


def computed(layer, how):
    """A layer whose weight is no parameter any more."""
    if how == "pruned":
        return prune.l1_unstructured(layer, "weight", 0.5)
    if how == "normed":
        return weight_norm(layer)
    return nn.utils.weight_norm(layer)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("how", ["pruned", "normed", "normed by a hook"])
def test_weights_that_are_computed_are_left_out_by_name(base, how):
    computed(base.blocks[1].mlp[0], how)
    kinds = [type(module) for module in base.modules()]
    with pytest.raises((TypeError, ValueError), match=r"target_modules: .* got blocks\.1\.mlp\.0"):
        get_peft_model(base, TCURConfig(rank=2, target_modules=list(TARGETS)))
    assert [type(module) for module in base.modules()] == kinds
    plan = get_peft_model(base, TCURConfig(rank=2)).plans["default"]
    reasons = {item.module: item.reason for item in plan.left_out}
    assert "is no parameter" in reasons["blocks.1.mlp.0"]


def test_a_base_layer_that_was_pruned_is_left_out_of_a_further_adapter(base, x):
    model = drawn(base)
    layer = model.base_model.model.blocks[1].mlp[0]
    prune.l1_unstructured(layer.base_layer, "weight", 0.5)
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.0: its weight is no parameter"):
        model.add_adapter("second", TCURConfig(rank=2, target_modules=TARGETS))
    pruned = copy.deepcopy(base)
    with torch.no_grad():
        pruned.blocks[1].mlp[0].weight.copy_(layer.base_layer.weight)
        assert_is(model(x), pruned, model, x)


def test_layers_that_never_run_are_named(base, x):
    base.spare = nn.Linear(8, 8)
    model = get_peft_model(base, TCURConfig(rank=2, target_modules=[*TARGETS, "spare"]))
    with pytest.warns(UserWarning, match=r"backward: spare never ran"):
        model(x).sum().backward()
    model(x).sum().backward()


def test_matrices_that_are_no_layers_are_named_as_left_out(base):
    base.experts = nn.Module()
    base.experts.up = nn.Parameter(torch.randn(4, 8, 8))
    plan = get_peft_model(base, TCURConfig(rank=2)).plans["default"]
    reasons = {item.module: item.reason for item in plan.left_out}
    assert "holds up [4, 8, 8] as a bare parameter" in reasons["experts"]


def test_checkpoints_of_merged_models_do_not_count_twice():
    base, x = Tiny().eval().double(), torch.randn(3, 7, 6, dtype=torch.float64)
    model = drawn(base)
    wanted = model(x)
    model.merge_adapter()
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for is_merged in (False, True):
        twin = drawn(base)
        load(twin, other(base))
        if is_merged:
            twin.merge_adapter()
        twin.load_state_dict(saved)
        assert_equal_in_float64(twin(x), wanted)
        layer = twin.base_model.model.blocks[0].mlp[0]
        assert layer.merged == is_merged
        if is_merged:
            twin.unmerge_adapter()
        assert_equal_in_float64(twin(x), wanted)
        assert torch.equal(layer.base_layer.weight, base.blocks[0].mlp[0].weight)
    model.unmerge_adapter()
    assert_equal_in_float64(model(x), wanted)
