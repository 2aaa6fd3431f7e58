"""Kinds of layers and ways to use adapters that were made apart, together."""

import pytest
import torch
from torch import nn

import tcur_kernels as tcur
from adapted import randomise
from expert_models import Model
from quantisers import WIDTH, two
from tolerance import same_mathematics


class Convolutions(nn.Module):
    """A convolution of each direction, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.out = nn.Linear(4, 5)

    def forward(self, x):
        return self.out(self.up(self.down(x).relu()).movedim(1, -1))


#: Name -> model, targets, the input of one row.
KINDS = {
    "convolutions": (Convolutions, "*", lambda: torch.randn(3, 4, 4)),
    "bitsandbytes": (lambda: two("bitsandbytes nf4"), None, lambda: torch.randn(5, WIDTH)),
    "HQQ": (lambda: two("HQQ 4 bits"), None, lambda: torch.randn(5, WIDTH)),
}
EVERY = pytest.mark.parametrize("kind", KINDS)


def adapted(kind, **settings):
    torch.manual_seed(0)
    make, targets, _ = KINDS[kind]
    return tcur.adapt(make().eval(), **{"targets": targets, "rank": 2, **settings})


def some(adapter, count):
    """Cores of adapters."""
    torch.manual_seed(1)
    return [
        {name: 0.3 * torch.randn_like(stack.core) for name, stack in adapter.stacks.items()}
        for _ in range(count)
    ]


def rows_of(kind, count=4):
    torch.manual_seed(2)
    return torch.stack([KINDS[kind][2]() for _ in range(count)])


@torch.no_grad()
def alone(adapter, core, row):
    """A row by one adapter; None is the base."""
    if core is None:
        with adapter.disable():
            return adapter.model(row[None])[0]
    for name, stack in adapter.stacks.items():
        stack.core.copy_(core[name])
    y = adapter.model(row[None])[0]
    for stack in adapter.stacks.values():
        stack.core.zero_()
    return y


def check(adapter, y, x, cores):
    for own, row, core in zip(y, x, cores, strict=True):
        assert same_mathematics(own, alone(adapter, core, row))


@EVERY
def test_a_store_and_rows_without_an_adapter(kind):
    adapter = adapted(kind)
    (one, other, third), x = some(adapter, 3), rows_of(kind)
    store = adapter.store(slots=2)
    for name, cores in (("one", one), ("other", other), ("third", third)):
        store.add(name, cores)
    with torch.no_grad():
        for names, cores in (
            (("other", None, "one", "other"), (other, None, one, other)),
            (("third", "one", None, "third"), (third, one, None, third)),
        ):
            with store.batch(names):
                y = adapter.model(x)
            check(adapter, y, x, cores)


@EVERY
def test_groups_of_other_slices(kind, tmp_path):
    adapter, other = adapted(kind), adapted(kind, rank=3, selection="leverage")
    randomise(other, 0.3)
    other.save(tmp_path / "other")
    own, x = some(adapter, 2), rows_of(kind)
    grouped = adapter.stack_groups([*own, tmp_path / "other"])
    assert len(grouped.groups) == 2
    with torch.no_grad(), adapter.batch(grouped, torch.tensor([2, 0, -1, 1])):
        y = adapter.model(x)
    check(adapter, y[1:], x[1:], [own[0], None, own[1]])
    with torch.no_grad():
        assert same_mathematics(y[0], other.model(x[:1])[0])
    trained = x.clone().requires_grad_()
    with adapter.batch(grouped, torch.tensor([2, 2, 2, 2])):
        adapter.model(trained).square().sum().backward()
    wanted = x.clone().requires_grad_()
    other.model(wanted).square().sum().backward()
    assert same_mathematics(trained.grad, wanted.grad)


@EVERY
def test_tenants_are_trained_as_if_they_were_alone(kind):
    adapter = adapted(kind)
    cores, x = dict(zip("ab", some(adapter, 2), strict=True)), rows_of(kind)
    tenants = adapter.tenants(2)
    for name, core in cores.items():
        tenants.join(name, core)
    optimizers = {n: torch.optim.AdamW(tenants.parameters(n), lr=0.01) for n in tenants}
    for _ in range(2):
        with tenants.batch(["a", "b", None, "a"]):
            adapter.model(x).square().sum().backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
    for name, own in (("a", [0, 3]), ("b", [1])):
        for stack_name, stack in adapter.stacks.items():
            stack.core.data.copy_(cores[name][stack_name])
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
        for _ in range(2):
            adapter.model(x[own]).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        for stack_name, core in tenants.cores(name).items():
            assert same_mathematics(core, adapter.stacks[stack_name].core)


@pytest.mark.parametrize("kind", ["bitsandbytes", "HQQ"])
def test_tokens_of_a_quantised_model_by_packed_sequences(kind):
    adapter = adapted(kind, targets=["blocks.0.q"], stacks="layer")
    layer, (one, other), x = adapter.model.blocks[0].q, some(adapter, 2), rows_of(kind, 1)
    starts = torch.tensor([0, 2, 5])
    with torch.no_grad():
        ids = torch.tensor([1, 0])
        with adapter.batch(adapter.stack_cores([one, other]), ids, cu_seqlens=starts):
            y = layer(x)
        for core, part in ((other, slice(0, 2)), (one, slice(2, 5))):
            (stack,) = adapter.stacks.values()
            stack.core.copy_(core[stack.name])
            assert same_mathematics(y[0, part], layer(x[0, part]))
            stack.core.zero_()


@pytest.mark.parametrize("kind", ["bitsandbytes", "HQQ"])
def test_lora_of_a_quantised_base(kind, tmp_path):
    from safetensors.torch import load_file

    adapter = adapted(kind)
    randomise(adapter, 0.3)
    written = adapter.to_lora(tmp_path)
    assert max(written.errors.values()) < 1e-6
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (stack,) = adapter.stacks.values()
    for place in stack.places:
        start = f"base_model.model.{place.name}.lora_"
        b, a = (tensors[f"{start}{side}.weight"].double() for side in "BA")
        assert same_mathematics((b @ a).float(), stack.update(place).detach())


@pytest.mark.parametrize("kind", [*KINDS, "experts"])
def test_the_mean_of_files(kind, tmp_path):
    def fresh():
        if kind != "experts":
            return adapted(kind)
        return tcur.adapt(Model(), ["experts.rows", "first"], rank=2, stacks="layer")

    cores = []
    for number, name in enumerate("ab"):
        adapter = fresh()
        torch.manual_seed(number)
        randomise(adapter, 0.3)
        cores.append({n: stack.core.detach().double() for n, stack in adapter.stacks.items()})
        adapter.save(tmp_path / name)
    tcur.Adapter.average({tmp_path / "a": 3, tmp_path / "b": 1}, tmp_path / "mean")
    torch.manual_seed(0)
    base = Model() if kind == "experts" else KINDS[kind][0]().eval()
    loaded = tcur.load_adapter(base, tmp_path / "mean")
    for name, stack in loaded.stacks.items():
        wanted = 0.75 * cores[0][name] + 0.25 * cores[1][name]
        assert torch.equal(stack.core, wanted.float())
