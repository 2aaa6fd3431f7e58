"""Many adapters trained in common batches: each as if it were trained alone."""

import copy

import pytest
import torch

import tcur_kernels as tcur
from plain import Plain
from test_batch import some_cores
from test_batch_ids import Words
from tolerance import assert_composition_close

HOW = {"lr": 1e-2, "weight_decay": 0.1}


def base_model():
    torch.manual_seed(0)
    return Words()


@pytest.fixture
def adapter():
    return tcur.adapt(base_model(), ["more.*"], rank=2)


def loss_of(y, x):
    """A sum over rows, so that no row changes the gradient of another."""
    return (y - x.roll(1, -1)).square().mean((1, 2)).sum()


#: For each batch the tenants of its rows. c joins late, a misses one, b leaves, and a nobody rows.
BATCHES = (
    ("a", "b", "a"),
    ("b", "b", None),
    ("a", "c", "b"),
    ("c", "a", "c"),
)


def alone(model, batches, xs, first, dtype):
    """The cores after a training of a plain model with the rows of one tenant."""
    model.cores["6x6"].data.copy_(first)
    optimizer = torch.optim.AdamW(model.trained, **HOW)
    for rows, x in zip(batches, xs, strict=True):
        if rows:
            x = x[list(rows)].to(dtype)
            loss_of(model(x), x).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.cores["6x6"].detach()


def test_each_is_trained_as_if_it_were_alone(adapter, tmp_path):
    tenants, xs = adapter.tenants(3), torch.randn(4, 3, 4, 6)
    start = {"a": torch.zeros(2, 2, 2), "b": some_cores(adapter, 1)[0]["6x6"]}
    with torch.no_grad():
        adapter.stacks["6x6"].core.copy_(torch.randn(2, 2, 2) * 0.1)
    adapter.save(tmp_path / "c")
    start["c"] = adapter.stacks["6x6"].core.detach().clone()
    tenants.join("a")
    tenants.join("b", {"6x6": start["b"]})
    optimizers = {n: torch.optim.AdamW(tenants.parameters(n), **HOW) for n in tenants}
    found = {}
    for turn, (names, x) in enumerate(zip(BATCHES, xs, strict=True)):
        if turn == 2:
            tenants.join("c", tmp_path / "c")
            optimizers["c"] = torch.optim.AdamW(tenants.parameters("c"), **HOW)
        if turn == 3:
            (found["b"],) = tenants.parameters("b")
            tenants.leave("b")
        with tenants.batch(names):
            loss_of(adapter.model(x), x).backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
    assert list(tenants) == ["a", "c"]
    found |= {name: tenants.cores(name)["6x6"] for name in tenants}
    assert adapter.stacks["6x6"].core.grad is None
    for name, core in found.items():
        rows = [[i for i, n in enumerate(names) if n == name] for names in BATCHES]
        how, plain = (rows, xs, start[name]), Plain(adapter)
        exact = alone(Plain(adapter, torch.float64), *how, torch.float64)
        run = lambda plain=plain, how=how: alone(plain, *how, torch.float32)  # noqa: E731
        assert_composition_close(core, run, exact)
        assert optimizers[name].state[core]["step"] == sum(map(bool, rows))


def test_gradients_accumulate_and_nobody_else_steps(adapter):
    tenants, xs = adapter.tenants(2), torch.randn(2, 2, 4, 6)
    for name in ("a", "b"):
        tenants.join(name, {"6x6": torch.randn(2, 2, 2)})
    (a,), (b,) = tenants.parameters("a"), tenants.parameters("b")
    before = b.detach().clone()
    for x in xs:
        with tenants.batch(["a", None]):
            loss_of(adapter.model(x), x).backward()
    assert b.grad is None
    optimizer = torch.optim.AdamW([b], lr=1.0, weight_decay=0.5)
    optimizer.step()
    assert torch.equal(b, before)
    assert not optimizer.state[b]

    def gradients(model, xs):
        (core,) = model.trained
        core.data.copy_(a.detach())
        core.grad = None
        for x in xs:
            loss_of(model(x), x).backward()
        return core.grad

    xs, plain = xs[:, :1], Plain(adapter)
    exact = gradients(Plain(adapter, torch.float64), xs.double())
    assert_composition_close(a.grad, lambda: gradients(plain, xs), exact)


def test_a_tenant_becomes_a_file_of_its_own(adapter, tmp_path):
    tenants, x = adapter.tenants(1), torch.randn(2, 4, 6)
    tenants.join("a", some_cores(adapter, 1)[0])
    with tenants.batch(["a", "a"]), torch.no_grad():
        y = adapter.model(x)
    tenants.save("a", tmp_path / "a", {"tenant": "a"})
    loaded = tcur.load_adapter(base_model(), tmp_path / "a")
    assert loaded.metadata == {"tenant": "a"}
    assert torch.equal(loaded.stacks["6x6"].core, tenants.cores("a")["6x6"])
    adapter.load(tmp_path / "a")
    with adapter.batch(adapter.stack_cores(["default"]), torch.zeros(2, dtype=torch.int64)):
        assert torch.equal(adapter.model(x), y)
    tenants.save("a", tmp_path / "a")
    assert tcur.read_metadata(tmp_path / "a") == {}


def test_who_leaves_takes_its_values_along(adapter):
    """A late step of its optimizer must not reach who comes next."""
    tenants = adapter.tenants(1)
    tenants.join("a", {"6x6": torch.ones(2, 2, 2)})
    (a,) = tenants.parameters("a")
    a.grad = torch.ones_like(a)
    tenants.leave("a")
    assert "a" not in tenants
    tenants.join("b")
    torch.optim.SGD([a], lr=1.0).step()
    assert not a.any()
    tenants.leave("b")
    tenants.join("c")
    assert not tenants.cores("c")["6x6"].any()
    assert repr(tenants) == "Tenants(1 of 1, of stacks 6x6)"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_evaluation_and_compiled_training(adapter):
    tenants, x = adapter.tenants(2), torch.randn(2, 4, 6)
    for name in ("a", "b"):
        tenants.join(name, {"6x6": torch.randn(2, 2, 2)})
    torch._dynamo.reset()
    compiled = torch.compile(adapter.model, backend="aot_eager", fullgraph=True)
    grads = []
    for model in (compiled, adapter.model):
        with tenants.batch(["b", "a"]):
            loss_of(model(x), x).backward()
        grads.append([tenants.cores(name)["6x6"].grad for name in tenants])
        for name in tenants:
            tenants.cores(name)["6x6"].grad = None

    def gradients(models, x):
        own = []
        for model, name, row in zip(models, ("a", "b"), x.flip(0)[:, None], strict=True):
            (core,) = model.trained
            core.data.copy_(tenants.cores(name)["6x6"].detach())
            own += torch.autograd.grad(loss_of(model(row), row), core)
        return tuple(own)

    plain = [Plain(adapter) for _ in tenants]
    exact = gradients([Plain(adapter, torch.float64) for _ in tenants], x.double())
    for own in grads:
        assert_composition_close(tuple(own), lambda: gradients(plain, x), exact)
    with tenants.batch(["a", "b"]), torch.inference_mode():
        assert adapter.model(x).is_inference()


def test_a_backward_after_a_step_of_a_tenant_is_refused(adapter):
    tenants, x = adapter.tenants(1), torch.randn(1, 4, 6, requires_grad=True)
    tenants.join("a", {"6x6": torch.randn(2, 2, 2)})
    with tenants.batch(["a"]):
        y = adapter.model(x)
    with torch.no_grad():
        tenants.parameters("a")[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_bad_tenants(adapter, tmp_path):
    for capacity, error in ((0, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="capacity: expected a"):
            adapter.tenants(capacity)
    tenants = adapter.tenants(2)
    with pytest.raises(ValueError, match=r"name: expected one of the tenants \(none\), got 'a'"):
        tenants.parameters("a")
    tenants.join("a")
    for name, entry, error, message in (
        ("a", None, ValueError, "name: expected a name that is free, got 'a'"),
        (None, None, TypeError, "name: expected a str, got NoneType"),
        ("b", {}, TypeError, "adapter: expected a core for stack 6x6, got none"),
        ("b", {"6x6": torch.full((2, 2, 2), torch.nan)}, ValueError, "adapter: expected finite"),
        ("b", tmp_path / "none", FileNotFoundError, "path: expected an adapter file, got none"),
    ):
        with pytest.raises(error, match=message):
            tenants.join(name, entry)
        assert len(tenants) == 1
    tenants.join("b")
    with pytest.raises(ValueError, match="name: expected at most 2 tenants, got 'c' as one more"):
        tenants.join("c")
    for action in (tenants.leave, tenants.cores, lambda name: tenants.save(name, tmp_path / "x")):
        with pytest.raises(
            ValueError, match=r"name: expected one of the tenants \(a, b\), got 'c'"
        ):
            action("c")
    with pytest.raises(ValueError, match="expected one of the tenants"), tenants.batch(["c"]):
        pass
    with (
        tenants.batch(["a"]),
        pytest.raises(ValueError, match="name: expected a tenant that no open batch has rows of"),
    ):
        tenants.leave("a")
    moved = tenants.parameters("a")[0]
    moved.data = copy.deepcopy(moved.data)
    with (
        pytest.raises(ValueError, match="parameters: expected those of 'a' in the common memory"),
        tenants.batch(["a", "b"]),
    ):
        pass
    tenants.leave("a")
