"""Several threads on one model of peft: no call computes with half of one adapter and half of
another.
"""

import threading
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import torch
from peft import get_peft_model
from torch import nn

from tcur_kernels.peft import TCURConfig
from tolerance import same_mathematics


class Meeting(nn.Module):
    """Two adapted layers, between which a call waits for another thread."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.inside, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def forward(self, x):
        x = self.first(x)
        self.inside.set()
        assert self.go_on.wait(60)
        return self.second(x)


@pytest.fixture
def adapted():
    torch.manual_seed(0)
    config = TCURConfig(r=2, target_modules=["first", "second"])
    model = get_peft_model(Meeting(), config)
    model.add_adapter("b", TCURConfig(r=2, target_modules=["first", "second"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "tcur_" in name:
                parameter.normal_(std=0.5)
    return model.eval(), torch.randn(3, 6)


#: What is refused while another thread is inside, and what must come before it.
CHANGES = {
    "set_adapter": (None, lambda model: model.set_adapter("b")),
    "merge_adapter": (None, lambda model: model.merge_adapter()),
    "unmerge_adapter": (lambda model: model.merge_adapter(), lambda model: model.unmerge_adapter()),
    "delete_adapter": (None, lambda model: model.delete_adapter("b")),
    "disable_adapter_layers": (None, lambda model: model.base_model.disable_adapter_layers()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_no_change_while_another_thread_is_inside(adapted, change):
    model, x = adapted
    before, make = CHANGES[change]
    if before is not None:
        before(model)
    inner = model.base_model.model
    with torch.no_grad():
        wanted = model(x)
    inner.inside.clear()
    inner.go_on.clear()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(torch.no_grad()(model), x)
        assert inner.inside.wait(60)
        try:
            with pytest.raises(RuntimeError, match=f"{change}: expected no other thread inside"):
                make(model)
        finally:
            inner.go_on.set()
        assert torch.equal(other.result(), wanted)
    with torch.no_grad():
        assert torch.equal(model(x), wanted)  # nothing has changed
    make(model)  # and now it may
    with torch.no_grad():
        assert not torch.equal(model(x), wanted) or change in ("merge_adapter", "delete_adapter")


def test_what_was_disabled_is_enabled_in_any_case(adapted):
    """peft has no second try for the end of its context. Who was inside hears of it."""
    model, x = adapted
    inner = model.base_model.model
    with torch.no_grad():
        wanted = model(x)
    context = model.disable_adapter()
    context.__enter__()
    inner.inside.clear()
    inner.go_on.clear()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(torch.no_grad()(model), x)
        assert inner.inside.wait(60)
        try:
            with pytest.raises(RuntimeError, match="enable_adapter_layers: expected no other thr"):
                context.__exit__(None, None, None)
        finally:
            inner.go_on.set()
        other.result()
    with torch.no_grad():
        assert torch.equal(model(x), wanted)


def test_disabling_unmerges_at_once(adapted):
    """Layers that unmerge themselves in a call would change what other threads compute with."""
    model, x = adapted
    base = model.base_model.model.first.base_layer.weight.clone()
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model.base_model.model.first.base_layer.weight, base)
        assert model(x).shape == (3, 6)


def test_no_change_while_another_thread_is_in_a_backward(adapted):
    model, x = adapted
    inside, go_on = threading.Event(), threading.Event()

    def backward():
        y = model(x)
        y.register_hook(lambda grad: (inside.set(), go_on.wait(60)) and grad)
        y.square().sum().backward()

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(backward)
        assert inside.wait(60)
        try:
            with pytest.raises(RuntimeError, match=r"merge_adapter: expected .* in a backward"):
                model.merge_adapter()
        finally:
            go_on.set()
        other.result()
    model.merge_adapter()


def test_a_call_that_begins_in_a_change_waits(adapted):
    model, x = adapted
    with torch.no_grad():
        wanted = model(x)
    model.set_adapter("b")
    with ThreadPoolExecutor(1) as pool:
        with model.base_model._changing("set_adapter"):
            other = pool.submit(torch.no_grad()(model), x)
            assert not wait([other], timeout=0.2).done
            model.set_adapter("default")
        assert same_mathematics(other.result(60), wanted)
