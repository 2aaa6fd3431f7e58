"""An adapter keeps its promises on the models of everybody: one function over all of them.

`families.check.check_family` says what the promises are. Families that stand for a way of using
layers are checked on every run, the others by ``make test-families``, which also has the libraries
that the other tests do not need.
"""

import importlib.util
import re

import pytest
import torch
from torch import nn

import tcur_kernels as tcur
from families import hugging, others
from families.check import BrokenPromise, check_family
from families.settings import UNTRIED
from tolerance import same_mathematics

FAMILIES = [*others.families(), *hugging.families()]
#: Models warn of what is no concern of ours; this package may not.
QUIET = pytest.mark.filterwarnings("ignore", "error:::tcur_kernels", "ignore:.*never ran")


#: What the full sweep alone runs.
RARE = [pytest.mark.families]

#: Compiled in every run; the others with all families.
COMPILED_OFTEN = ("TransformerEncoder", "MultiheadAttention, batch first", "weights read", "gpt2")


def parameters(families, often=None):
    return [
        pytest.param(
            family,
            id=f"{family.library}-{family.name}",
            marks=[] if (family.often if often is None else family.name in often) else RARE,
        )
        for family in families
    ]


@pytest.fixture
def _offline(monkeypatch):
    """A model whose config would have it download something fails at once."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def need(family):
    others.operators_of_torchvision()
    if importlib.util.find_spec(family.library) is None:
        pytest.skip(f"{family.library} is not installed; make test-families has it")


@QUIET
@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize("family", parameters(FAMILIES))
def test_family(family):
    need(family)
    if family.refused:
        with pytest.raises(ValueError, match=family.refused):
            tcur.adapt(family.build(0), rank=4)
    else:
        check_family(family.build, family.inputs, smooth=family.smooth)


@QUIET
@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize("family", parameters([f for f in FAMILIES if f.compiles], COMPILED_OFTEN))
def test_compiled(family):
    need(family)
    check_family(family.build, family.inputs, ["compile"], smooth=family.smooth)


@QUIET
@pytest.mark.families
def test_torchvision_extracts_features_of_adapted_models():
    others.operators_of_torchvision()
    pytest.importorskip("torchvision")
    from torchvision.models.feature_extraction import create_feature_extractor
    from torchvision.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(32, 8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32).eval()
    adapter = tcur.adapt(model, rank=2)
    for stack in adapter.stacks.values():
        nn.init.normal_(stack.core)
    node, x = "encoder.layers.encoder_layer_2", torch.randn(2, 3, 32, 32)
    got, wanted = (
        create_feature_extractor(each, {node: "features"})(x)["features"]
        for each in (model, adapter.merge(inplace=False))
    )
    assert same_mathematics(got, wanted)
    got.square().sum().backward()
    assert all(core.grad is not None for core in adapter.parameters())


def test_every_type_of_transformers_is_checked_or_named():
    """A type that is neither called nor listed with a reason would be skipped silently."""
    pytest.importorskip("transformers")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    rows = hugging.rows()
    unknown = set(CONFIG_MAPPING.keys()) - set(rows)
    assert not unknown, f"run python -m families.survey {' '.join(sorted(unknown))}"
    assert all(bool(way) != bool(reason) for way, reason in rows.values())
    assert sum(bool(way) for way, _ in rows.values()) >= 700
    own = {kind for kind, (way, _) in rows.items() if way == hugging.OWN}
    assert own == set(hugging.CALLS), own ^ set(hugging.CALLS)
    assert {kind: ("", reason) for kind, reason in UNTRIED.items()}.items() <= rows.items()
    known = set(rows)
    for names in (hugging.OFTEN, hugging.COMPILED, hugging.REFUSED, hugging.JUMPING):
        assert set(names) <= known, set(names) - known
    assert all(re.compile(pattern) for pattern in hugging.REFUSED.values())


def test_the_reasons_name_no_path():
    """What a library says of its files would be true on one machine alone."""
    for kind, (_, reason) in hugging.rows().items():
        assert not hugging.PATH.search(reason), f"{kind}: expected no path, got {reason}"
    for path in ("/home/someone/lib/a.py", "C:\\lib\\a.py", "~/lib/a.py/"):
        error = ValueError(f"first\nno model in '{path}'")
        assert hugging.in_short(error).endswith("no model in 'a file'"), hugging.in_short(error)


# -- the check itself: it finds what is broken on purpose


def perceptron(seed):
    torch.manual_seed(seed)
    layers = [nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)]
    return nn.Sequential(*layers).eval()


def tokens():
    return {"input": torch.linspace(-2, 2, 40).view(5, 8)}


def core_not_zero(adapter):
    with torch.no_grad():
        next(adapter.parameters()).fill_(1e-6)


def other_module(adapter):
    adapter.model[1] = nn.Tanh()


def no_hooks(adapter):
    for module in adapter.model.modules():
        module._forward_hooks.clear()


def merged_with_another_weight(adapter):
    merge = adapter.merge

    def wrong(inplace=True):
        model = merge(inplace=inplace)
        with torch.no_grad():
            (model if not inplace else adapter.model)[2].bias.add_(1e-4)
        return model

    adapter.merge = wrong


def unmerged_to_another(adapter):
    unmerge = adapter.unmerge

    def wrong():
        unmerge()
        with torch.no_grad():
            adapter.model[2].bias.mul_(1 + 1e-6)

    adapter.unmerge = wrong


def saved_with_another_core(adapter):
    save = adapter.save

    def wrong(path):
        with torch.no_grad():
            next(adapter.parameters()).mul_(1.001)
        save(path)
        with torch.no_grad():
            next(adapter.parameters()).div_(1.001)

    adapter.save = wrong


def state_that_is_not_loaded(adapter):
    adapter.model.load_state_dict = lambda state: None


def larger_gradient(adapter):
    next(adapter.parameters()).register_hook(lambda gradient: 1.001 * gradient)


def slightly_larger_gradient(adapter):
    next(adapter.parameters()).register_hook(lambda gradient: 1.0001 * gradient)


def gradient_that_jumps(adapter):
    """In fp32 alone, like that of a number that is nearly at a kink."""
    core = next(adapter.parameters())
    core.register_hook(lambda g: 1.0001 * g if g.dtype == torch.float32 else g)


def one_slice_without_gradient(adapter):
    next(adapter.parameters()).register_hook(lambda g: g * torch.tensor([1.0, 1, 0])[:, None, None])


def more_that_trains(adapter):
    adapter.model[2].bias.requires_grad_()


class Itself(nn.Sequential):
    """Copies of it are no copies."""

    def __deepcopy__(self, memo):
        return self


def off_in_float64(adapter):
    def add(model, args, y):
        is_adapted = any(parameter.requires_grad for parameter in model.parameters())
        return y + 0.01 if y.dtype == torch.float64 and is_adapted else y

    adapter.model.register_forward_hook(add)


BREAKS = {
    "zero core": [core_not_zero],
    "names": [other_module],
    "hooks": [no_hooks],
    "merged copy": [merged_with_another_weight],
    "merged in place": [merged_with_another_weight, unmerged_to_another],
    "saved and loaded": [saved_with_another_core],
    "state dict": [state_that_is_not_loaded],
    "gradients": [
        larger_gradient,
        slightly_larger_gradient,
        one_slice_without_gradient,
        more_that_trains,
    ],
    "dtypes": [off_in_float64],
}


@pytest.mark.parametrize(
    ("promise", "break_it"), [(p, each) for p, several in BREAKS.items() for each in several]
)
def test_the_check_finds(promise, break_it, monkeypatch):
    adapt_and(break_it, monkeypatch)
    with pytest.raises(BrokenPromise, match=rf"^{promise}: "):
        check_family(perceptron, tokens, [promise], rank=2)


def adapt_and(change, monkeypatch):
    """Has `adapt` change every adapter that it makes."""
    adapt = tcur.adapt

    def changed(model, **settings):
        adapter = adapt(model, **settings)
        change(adapter)
        return adapter

    monkeypatch.setattr(tcur, "adapt", changed)


def test_a_gradient_that_jumps_at_a_kink_is_right(monkeypatch):
    adapt_and(gradient_that_jumps, monkeypatch)
    check_family(perceptron, tokens, ["gradients"], rank=2)


def test_the_check_finds_a_copy_that_is_none():
    def build(seed):
        return Itself(*perceptron(seed))

    with pytest.raises(BrokenPromise, match=r"^copies: "):
        check_family(build, tokens, ["copies"], rank=2)


def test_the_check_passes_what_is_whole():
    report = check_family(perceptron, tokens, rank=2)
    assert (report.layers, report.stacks, report.silent) == (3, 1, [])


def test_a_model_that_does_not_repeat_itself_is_no_base_to_compare_with():
    class Counting(nn.Sequential):
        calls = 0

        def forward(self, input):
            Counting.calls += 1
            return super().forward(input) + Counting.calls

    with pytest.raises(BrokenPromise, match="repeats itself"):
        check_family(lambda seed: Counting(*perceptron(seed)), tokens, ["zero core"], rank=2)
