"""State dicts of merged models: one says what to call instead, the other is plain."""

import copy
import warnings

import pytest
import torch
from torch import nn

import tcur_kernels as tcur
from adapted import adapted
from hf_models import HF_MODELS
from models import Tiny
from tcur_kernels.adapters.file import read_contents

SAYS = (
    r"state_dict: the model is merged in place, .* and the cores \(tcur\.\*\)\. "
    r"adapter\.merge\(inplace=False\)\.state_dict\(\) has the names of the plain model"
)


def attention():
    """With an ``nn.MultiheadAttention``."""
    return nn.TransformerEncoderLayer(12, 3, 24, batch_first=True)


def container():
    return nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Linear(12, 12))


def called(model, inputs):
    """The output as a tensor."""
    y = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return getattr(y, "logits", y)


def tokens(*shape):
    torch.manual_seed(2)
    return torch.randn(*shape)


MODELS = {
    "container": (container, lambda: (tokens(5, 12),)),
    "attention": (attention, lambda: (tokens(2, 5, 12),)),
    "tiny": (Tiny, lambda: (tokens(4, 7, 6),)),
    **{name: HF_MODELS[name][:2] for name in ("gpt2", "unetr")},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("in_place_before", [False, True])
def test_a_merged_copy_has_the_state_of_a_plain_model(name, in_place_before):
    make, make_inputs = MODELS[name]
    torch.manual_seed(0)
    base = make().eval().requires_grad_(False)  # torch's products are not the same for frozen ones
    model, adapter = adapted(copy.deepcopy(base))
    inputs = make_inputs()
    if in_place_before:
        adapter.merge()
    merged = adapter.merge(inplace=False)
    assert adapter.is_merged is in_place_before
    state = merged.state_dict()
    assert list(state) == list(base.state_dict())
    torch.manual_seed(1)
    fresh = make().eval().requires_grad_(False)
    fresh.load_state_dict(state)
    with torch.no_grad():
        y = called(fresh, inputs)
        assert torch.equal(y, called(merged, inputs))
        assert not torch.equal(y, called(base, inputs))
        if not in_place_before:
            adapter.merge()
        assert torch.equal(y, called(model, inputs))
    adapter.unmerge()


def test_a_copy_follows_a_base_that_was_loaded_while_merged():
    """A part of a model is loaded by itself, and nothing has run since."""
    model, adapter = adapted(Tiny().eval())
    other = Tiny().eval()
    adapter.merge()
    for ours, theirs in zip(model.blocks, other.blocks, strict=True):
        ours.load_state_dict(theirs.state_dict())
    merged = adapter.merge(inplace=False).state_dict()
    for stack in adapter.stacks.values():
        stack.settle()
    adapter.unmerge()
    wanted = adapter.merge(inplace=False).state_dict()
    for key, value in wanted.items():
        assert torch.equal(merged[key], value), key


@pytest.mark.parametrize("make", [Tiny, container], ids=["child", "container"])
def test_the_state_of_a_model_merged_in_place_warns_once_for_each_merge(make):
    model, adapter = adapted(make().eval())
    says = SAYS if make is Tiny else SAYS.replace(r"tcur\.", "tcur_")
    model.state_dict()
    for _ in range(2):
        adapter.merge()
        with pytest.warns(UserWarning, match=says) as caught:
            state = model.state_dict()
        assert len(caught) == 1
        assert caught[0].filename == __file__
        model.state_dict()  # once is enough
        adapter.unmerge()
        model.state_dict()
        assert state.keys() == model.state_dict().keys()


def test_a_model_around_it_and_a_copy_warn_too():
    model, adapter = adapted(Tiny().eval())
    adapter.merge()
    twin = copy.deepcopy(model)
    for each in (nn.ModuleDict({"part": model}), twin):
        with pytest.warns(UserWarning, match=SAYS):
            each.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nn.ModuleDict({"part": model}).state_dict()


def test_what_the_package_does_itself_does_not_warn(tmp_path):
    model, adapter = adapted(Tiny().eval(), train_also=("head",))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    adapter.add("b")
    adapter.save(tmp_path / "a")
    adapter.merge()
    adapter.save(tmp_path / "merged")
    assert read_contents(tmp_path / "merged") == read_contents(tmp_path / "a")
    adapter.load(tmp_path / "a", "b")
    adapter.load(tmp_path / "a", "c")
    adapter.delete("c")
    model.load_state_dict(state, strict=False)
    copy.deepcopy(model)
    adapter.merge(inplace=False)
    with pytest.warns(UserWarning, match=SAYS):  # the one of the user still comes
        model.state_dict()


def test_buffers_that_are_not_saved_are_no_buffers_of_an_adapter(tmp_path):
    model = Tiny().eval()
    model.blocks[0].register_buffer("cache", torch.zeros(3), persistent=False)
    model.register_buffer("kept", torch.zeros(3))
    model.blocks[1].register_buffer("none", None)
    _, adapter = adapted(model)
    model.blocks[0].cache += 1
    model.kept += 1
    adapter.save(tmp_path / "a")
    assert list(read_contents(tmp_path / "a").learned) == [("buffer", "kept")]


def test_a_model_made_plain_warns_no_more():
    _, adapter = adapted(Tiny().eval())
    merged = adapter.merge(inplace=False)
    assert not merged._state_dict_pre_hooks
    assert not merged._load_state_dict_post_hooks
    tcur.adapt(merged, rank=2)
