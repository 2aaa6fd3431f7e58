"""The two bases of a core: they span the same updates, and only one of them is isometric."""

import copy
import json

import pytest
import torch
from torch import nn

import hf_models
import oracle
import tcur_kernels as tcur
from adapted import randomise
from models import Tiny
from rewriting import rewritten
from tcur_kernels.operators.basis import DEPENDENT, LOST, orthonormal, scale_of
from tolerance import assert_equal_in_float64, relative_error, same_mathematics

LENGTHS = (1, 2, 3, 4, 7, 12, 47, 48)
BASES = ("orthonormal", "slices")
EPS = torch.finfo(torch.float32).eps


def slices(n3, n1=9, n2=11, rank=3, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    sizes = (n3, n1, rank), (n3, rank, n2)
    return tuple(torch.randn(size, generator=generator, dtype=dtype) for size in sizes)


def real(spectrum):
    return torch.view_as_real(spectrum.resolve_conj())


def spectra(sides):
    return tuple(torch.fft.rfft(side.double(), dim=0) for side in sides)


# -- the factors


@pytest.mark.parametrize("n3", LENGTHS)
def test_the_norm_of_an_update_is_that_of_its_core(n3):
    factors = tcur.CURFactors(*slices(n3), basis="orthonormal")
    core = torch.randn(n3, 3, 3, dtype=torch.float64)
    update = oracle.cur_product(factors.lateral, core, factors.horizontal)
    assert abs(update.norm() / core.norm() - 1) < 8 * EPS  # C and R are rounded to fp32
    unit = oracle.t_product(oracle.t_transpose(factors.lateral), factors.lateral)
    assert (unit - tcur.t_identity(3, n3, dtype=torch.float64)).norm() < 8 * EPS


@pytest.mark.parametrize("n3", LENGTHS)
def test_both_bases_span_the_same_at_every_frequency(n3):
    given = slices(n3, dtype=torch.float64)
    factors = tcur.CURFactors(*given, basis="orthonormal")
    assert factors.slices[0] is not factors.lateral
    q, qr = spectra((factors.lateral, factors.horizontal))
    c, r = spectra(given)
    assert_equal_in_float64(real(q @ (q.mH @ c)), real(c))
    assert_equal_in_float64(real((r @ qr.mH) @ qr), real(r))


@pytest.mark.parametrize("n3", [1, 4, 7])
def test_packed_spectra_are_those_of_the_factors(n3):
    factors = tcur.CURFactors(*slices(n3), basis="orthonormal")
    again = tcur.CURFactors(factors.lateral, factors.horizontal)
    for ours, plain in (
        (factors, again),
        (factors.transposed(), again.transposed()),
        (factors.to("cpu"), again),
    ):
        assert torch.equal(ours.lateral_hat, plain.lateral_hat)
        assert torch.equal(ours.horizontal_hat, plain.horizontal_hat)
        assert ours.basis == "orthonormal"
    turned = factors.transposed().slices
    assert torch.equal(turned[0], factors.slices[1].mT)
    assert torch.equal(turned[1], factors.slices[0].mT)


def test_scaling_a_slice_changes_nothing():
    lateral, horizontal = slices(6)
    factors = tcur.CURFactors(lateral, horizontal, basis="orthonormal")
    scaled = tcur.CURFactors(
        lateral * torch.tensor([1.0, 128.0, 2**-9]),
        horizontal * torch.tensor([[2**-7], [1.0], [64.0]]),
        basis="orthonormal",
    )
    # Powers of two change no rounding at all.
    assert torch.equal(scaled.lateral, factors.lateral)
    assert torch.equal(scaled.horizontal, factors.horizontal)
    by_hundred = tcur.CURFactors(lateral.double() * 100, horizontal.double(), basis="orthonormal")
    assert (by_hundred.lateral - factors.lateral).abs().max() < EPS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_slices_have_wide_factors(dtype):
    given = tuple(side.to(dtype) for side in slices(5))
    factors = tcur.CURFactors(*given, basis="orthonormal")
    assert factors.lateral.dtype == factors.horizontal.dtype == torch.float32
    assert factors.slices[0].dtype == dtype
    wide = tcur.CURFactors(*(side.float() for side in given), basis="orthonormal")
    assert torch.equal(wide.lateral, factors.lateral)


def dependent(case):
    """Slices that are dependent at some frequency, and the frequencies where that is so."""
    lateral, horizontal = slices(6)
    if case == "a column is zero":
        lateral[:, :, 1] = 0
        return (lateral, horizontal), 4
    if case == "two columns are equal":
        lateral[:, :, 2] = lateral[:, :, 0]
        return (lateral, horizontal), 4
    if case == "all layers are equal":  # then every frequency but the first is zero
        lateral[:] = lateral[0]
        return (lateral, horizontal), 3
    assert case == "one column is equal in all layers"
    lateral[:, :, 1] = lateral[0, :, 1]
    return (lateral, horizontal), 3


CASES = (
    "a column is zero",
    "two columns are equal",
    "all layers are equal",
    "one column is equal in all layers",
)


@pytest.mark.parametrize("case", CASES)
def test_dependent_slices_give_no_direction(case):
    given, bins = dependent(case)
    factors = tcur.CURFactors(*given, basis="orthonormal")
    q = spectra((factors.lateral, factors.horizontal))[0]
    sizes = q.norm(dim=1)  # [K, r]: one for a direction, zero without
    gone = sizes < 0.5
    assert int(gone.any(1).sum()) == bins
    assert (sizes[gone] < 8 * EPS).all()
    assert (sizes[~gone] - 1).abs().max() < 8 * EPS
    c = spectra(given)[0]
    assert relative_error(real(q @ (q.mH @ c)), real(c)) < 8 * EPS  # the span is still the same


def test_what_rounding_leaves_of_a_dependent_column_is_no_direction():
    lateral, horizontal = slices(5, dtype=torch.float64)
    lateral[:, :, 2] = lateral[:, :, :2] @ torch.tensor([0.3, -0.7], dtype=torch.float64)
    lateral[:, :, 2] += DEPENDENT / 100 * torch.randn(5, 9, dtype=torch.float64)
    factors = tcur.CURFactors(lateral, horizontal, basis="orthonormal")
    assert not factors.lateral[:, :, 2].any()
    lateral[:, :, 2] += 100 * DEPENDENT * torch.randn(5, 9, dtype=torch.float64)
    factors = tcur.CURFactors(lateral, horizontal, basis="orthonormal")
    assert factors.lateral[:, :, 2].norm() > 0.5


@pytest.mark.parametrize("apart", [1.0, 1e-3, 4 * DEPENDENT], ids=["far", "near", "nearest"])
def test_the_order_of_sums_decides_no_more_than_a_last_bit(apart):
    """Householder's QR has other sums than Gram-Schmidt, as another machine would have."""
    lateral, _ = slices(8, n1=200, rank=6, dtype=torch.float64)
    lateral[:, :, 5] = lateral[:, :, 0] + apart * lateral[:, :, 5]
    ours = orthonormal(lateral)
    q, r = torch.linalg.qr(torch.fft.rfft(lateral, dim=0))
    q = q * torch.sgn(r.diagonal(dim1=1, dim2=2))[:, None]
    assert (ours - torch.fft.irfft(q, n=8, dim=0)).abs().max() < 1e-8


# -- stacks and adapters


def model(seed=0):
    torch.manual_seed(seed)
    return Tiny().eval()


@pytest.fixture
def inputs():
    return torch.randn(4, 7, 6, generator=torch.Generator().manual_seed(1))


def test_the_published_method_is_exactly_that():
    base = model()
    adapter = tcur.adapt(base, rank=2, basis="slices", selection="norm", alpha=1.0)
    randomise(adapter)
    for stack in adapter.stacks.values():
        weights = [place.weight.split(stack.n1) for place in stack.places]
        stacked = torch.stack([piece for pieces in weights for piece in pieces])
        d = tcur.tensor_cur(stacked, 2, selection="norm", core="zero")
        assert torch.equal(stack.lateral, d.lateral)
        assert torch.equal(stack.horizontal, d.horizontal)
        assert stack.scale == 1
        exact = oracle.w_eff(stacked, d.lateral, stack.core.detach(), d.horizontal, 1.0)
        got = stack.effective(torch.float32)
        assert relative_error(got - stacked.double(), exact - stacked) < 1e-5


@pytest.mark.parametrize("basis", BASES)
def test_the_update_is_the_scale_times_the_product(basis):
    adapter = tcur.adapt(model(), rank=3, alpha=0.5, basis=basis)
    randomise(adapter)
    for stack in adapter.stacks.values():
        assert stack.basis == stack.factors.basis == basis
        assert stack.scale == scale_of(basis, 0.5, stack.n1, stack.n2, 3)
        update = torch.cat([stack.update(place) for place in stack.places])
        parts = (stack.lateral, stack.core.detach(), stack.horizontal)
        exact = stack.scale * oracle.cur_product(*parts)
        assert relative_error(update.reshape(exact.shape), exact) < 1e-6
    assert scale_of("slices", 0.5, 8, 32, 4) == 0.5
    assert scale_of("orthonormal", 0.5, 8, 32, 4) == 1.0  # 0.5 * 16 / 8


@pytest.mark.parametrize("basis", BASES)
def test_what_is_saved_is_what_was_trained(basis, inputs, tmp_path):
    base = model()
    adapter = tcur.adapt(copy.deepcopy(base), rank=2, basis=basis)
    randomise(adapter)
    wanted = adapter.model(inputs)
    for factors in (False, True):
        adapter.save(tmp_path / "a.safetensors", factors=factors)
        loaded = tcur.load_adapter(copy.deepcopy(base), tmp_path / "a.safetensors")
        assert {stack.basis for stack in loaded.stacks.values()} == {basis}
        assert torch.equal(loaded.model(inputs), wanted)
    twin = tcur.adapt(copy.deepcopy(base), rank=2, basis=basis)
    twin.model.load_state_dict(adapter.model.state_dict())
    assert torch.equal(twin.model(inputs), wanted)
    same_mathematics(adapter.merge(inplace=False)(inputs), wanted)


def test_factors_of_another_base_are_made_of_the_slices_in_the_file(inputs, tmp_path):
    adapter = tcur.adapt(model(), rank=2)
    randomise(adapter)
    adapter.save(tmp_path / "a.safetensors", factors=True)
    other = model(seed=3)
    loaded = tcur.load_adapter(other, tmp_path / "a.safetensors", strict=False)
    for name, stack in loaded.stacks.items():
        assert torch.equal(stack.lateral, adapter.stacks[name].lateral)
        assert stack.base.is_own is False
    state = copy.deepcopy(other.state_dict())
    before = other(inputs)
    other.load_state_dict(state)
    assert torch.equal(other(inputs), before)


def test_files_from_before_there_was_a_basis_are_in_slices(inputs, tmp_path):
    base = model()
    adapter = tcur.adapt(copy.deepcopy(base), rank=2, basis="slices")
    randomise(adapter)
    path = tmp_path / "a.safetensors"
    adapter.save(path)

    def without(header):
        for entry in header["stacks"]:
            assert entry.pop("basis") == "slices"

    def with_another(header):
        for entry in header["stacks"]:
            entry["basis"] = "fourier"

    rewritten(path, without, version=2)
    loaded = tcur.load_adapter(copy.deepcopy(base), path)
    assert torch.equal(loaded.model(inputs), adapter.model(inputs))
    rewritten(path, with_another)
    with pytest.raises(ValueError, match=r"one of orthonormal, slices as basis of .* got 'f"):
        tcur.load_adapter(copy.deepcopy(base), path)


def test_a_file_in_another_basis_is_refused(inputs, tmp_path):
    path = tmp_path / "a.safetensors"
    adapter = tcur.adapt(model(), rank=2, basis="slices")
    randomise(adapter)
    adapter.save(path)
    other = tcur.adapt(model(), rank=2, basis="orthonormal")
    before = other.model(inputs)
    message = "path: expected basis orthonormal in stack 8x8, .* got slices"
    for load in (other.load, lambda path: other.stack_cores([path])):
        with pytest.raises(ValueError, match=message):
            load(path)
    assert torch.equal(other.model(inputs), before)
    other.change_basis("slices")
    other.load(path)
    assert torch.equal(other.model(inputs), adapter.model(inputs))


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("own", "other"), [BASES, BASES[::-1]])
def test_a_state_dict_in_another_basis_is_refused(own, other, strict, direct, inputs):
    def made(basis):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)) if direct else Tiny().eval()
        randomise(tcur.adapt(base, rank=2, basis=basis))
        return base

    ours, theirs = made(own), made(other)
    before = ours(inputs)
    with pytest.raises(ValueError, match=f"expected cores in basis '{own}' .* got them in"):
        ours.load_state_dict(theirs.state_dict(), strict=strict)
    assert torch.equal(ours(inputs), before)
    whole = nn.ModuleDict({"part": ours})
    with pytest.raises(ValueError, match=f"expected cores in basis '{own}'"):
        whole.load_state_dict(nn.ModuleDict({"part": theirs}).state_dict(), strict=strict)
    ours.load_state_dict(ours.state_dict())


def test_an_unknown_basis_is_named():
    base, given = model(), slices(3)
    message = "basis: expected one of orthonormal, slices, got 'svd'"
    for make in (
        lambda: tcur.adapt(base, rank=2, basis="svd"),
        lambda: tcur.CURFactors(*given, basis="svd"),
        lambda: tcur.TProductStack(
            [nn.Linear(4, 4, bias=False).requires_grad_(False)], 2, basis="svd"
        ),
        lambda: tcur.adapt(model(), rank=2).change_basis("svd"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    assert not any(name.startswith("tcur") for name, _ in base.named_modules())


# -- peft


IDS = {"input_ids": torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))}


def gpt2():
    torch.manual_seed(0)
    return hf_models.gpt2().eval()


def config_in(**settings):
    pytest.importorskip("peft")
    from tcur_kernels.peft import TCURConfig

    targets = ["c_attn", "c_proj"]
    return TCURConfig(rank=2, target_modules=targets, init_weights=False, **settings)


def wrapped(**settings):
    """A language model of peft with random cores."""
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(gpt2(), config_in(**settings)).eval()


@pytest.mark.filterwarnings(*hf_models.PEFT_SAYS)
@pytest.mark.parametrize("basis", [None, *BASES])
def test_a_config_of_peft_records_the_basis(basis, tmp_path):
    peft = pytest.importorskip("peft")
    model = wrapped() if basis is None else wrapped(basis=basis)
    wanted = hf_models.output(model, IDS)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["basis"] == basis or (basis is None and config["basis"] == "orthonormal")
    loaded = peft.PeftModel.from_pretrained(gpt2(), tmp_path).eval()
    assert torch.equal(hf_models.output(loaded, IDS), wanted)
    same_mathematics(hf_models.output(loaded.merge_and_unload(), IDS), wanted)


@pytest.mark.filterwarnings(*hf_models.PEFT_SAYS)
def test_a_config_from_before_is_in_slices(tmp_path):
    peft = pytest.importorskip("peft")
    model = wrapped(basis="slices")
    wanted = hf_models.output(model, IDS)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    del config["basis"], config["settings_sha256"], config["tensors_sha256"]
    file.write_text(json.dumps(config))
    loaded = peft.PeftModel.from_pretrained(gpt2(), tmp_path).eval()
    assert loaded.peft_config["default"].basis == "slices"
    assert torch.equal(hf_models.output(loaded, IDS), wanted)


@pytest.mark.filterwarnings(*hf_models.PEFT_SAYS)
def test_adapters_in_two_bases_in_one_model_of_peft():
    model = wrapped(basis="slices")
    model.add_adapter("b", config_in())
    alone = {}
    for name in ("default", "b"):
        model.set_adapter(name)
        alone[name] = hf_models.output(model, IDS)
    mixed = model(**IDS, adapter_names=["default", "b"]).logits
    same_mathematics(mixed[0], alone["default"][0])
    same_mathematics(mixed[1], alone["b"][1])
    model.base_model.set_adapter(["default", "b"])
    both = hf_models.output(model, IDS)
    model.merge_adapter()
    same_mathematics(hf_models.output(model, IDS), both)
    with pytest.raises(ValueError, match="basis: expected one of orthonormal, slices, got 'svd'"):
        config_in(basis="svd")


# -- conversion


def update_of(adapter):
    return {
        name: torch.cat([stack.update(place).detach() for place in stack.places])
        for name, stack in adapter.stacks.items()
    }


@pytest.mark.parametrize("first", BASES)
def test_a_converted_core_gives_the_same_weights(first, inputs):
    adapter = tcur.adapt(model(), rank=3, alpha=0.7, basis=first)
    adapter.add("other")
    randomise(adapter)
    adapter.activate("other")
    randomise(adapter)
    wanted, updates = adapter.model(inputs), update_of(adapter)
    adapter.activate("default")
    wanted_too = adapter.model(inputs)
    for basis in (BASES[first == "orthonormal"], first, first):
        adapter.change_basis(basis)
        assert {stack.basis for stack in adapter.stacks.values()} == {basis}
        same_mathematics(adapter.model(inputs), wanted_too)
        adapter.activate("other")
        for name, update in update_of(adapter).items():
            assert relative_error(update, updates[name].double()) < 1e-5
        same_mathematics(adapter.model(inputs), wanted)
        adapter.activate("default")
    names = [key for key in adapter.model.state_dict() if key.endswith("indices")]
    assert len(names) == len(adapter.stacks)
    assert all(("orthonormal" in name) == (first == "orthonormal") for name in names)


@pytest.mark.parametrize("case", CASES)
def test_conversion_where_slices_are_dependent(case):
    given, _ = dependent(case)
    # Rows of the stack may hold anything: only the columns are dependent here.
    layers = [nn.Linear(11, 9, bias=False) for _ in range(6)]
    with torch.no_grad():
        for index, layer in enumerate(layers):
            layer.weight[:, 2:5] = given[0][index]
    nn.ModuleList(layers).requires_grad_(False)
    stack = tcur.TProductStack(layers, rank=3, selection=([0, 3, 8], [2, 3, 4]), basis="slices")
    nn.init.normal_(stack.core)
    before = torch.stack([stack.update(place) for place in stack.places]).detach()
    for basis in ("orthonormal", "slices", "orthonormal"):
        stack.adopt(basis, stack.converted(basis))
        after = torch.stack([stack.update(place) for place in stack.places]).detach()
        assert relative_error(after, before.double()) < 1e-5


def test_slices_of_very_different_norms_are_converted():
    base = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(5)))
    with torch.no_grad():
        for layer in base:
            layer.weight[:, 3] *= 100
            layer.weight[5] *= 1e-4
    adapter = tcur.adapt(base, rank=4, selection=([1, 5, 7, 9], [0, 3, 4, 11]))
    randomise(adapter)
    [before] = update_of(adapter).values()
    adapter.change_basis("slices")
    [after] = update_of(adapter).values()
    assert relative_error(after, before.double()) < 1e-5


def test_what_cannot_be_converted_is_refused_and_nothing_is_changed(inputs):
    base = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(4)))
    with torch.no_grad():
        for layer in base:  # dependent but for a millionth: fp32 cannot hold such a core
            layer.weight[:, 1] = layer.weight[:, 0] + 3e-6 * layer.weight[:, 1]
    adapter = tcur.adapt(base, rank=3, selection=([0, 1, 2], [0, 1, 2]))
    randomise(adapter)
    before, state = base(inputs), copy.deepcopy(base.state_dict())
    with pytest.raises(ValueError, match="stack 6x6: basis: expected slices in which the core"):
        adapter.change_basis("slices")
    assert torch.equal(base(inputs), before)
    assert state.keys() == base.state_dict().keys()
    assert LOST < 1e-3
    adapter.merge()
    with pytest.raises(ValueError, match="change_basis: expected an unmerged adapter"):
        adapter.change_basis("slices")
    adapter.unmerge()
    base.to("meta")
    with pytest.raises(ValueError, match=r"change_basis: expected whole cores, .* in stack 6x6"):
        adapter.change_basis("slices")


@pytest.mark.parametrize("basis", BASES)
def test_no_adapter_has_the_name_of_a_buffer(basis):
    adapter = tcur.adapt(model(), rank=2, basis=basis)
    for name in ("indices", "orthonormal_indices"):
        with pytest.raises(ValueError, match="name: expected a name that is free"):
            adapter.add(name)


def test_training_goes_on_after_a_change_in_inference_mode(inputs):
    adapter = tcur.adapt(model(), rank=2)
    with torch.inference_mode():
        adapter.change_basis("slices")
    adapter.model(inputs).square().mean().backward()
    assert all(stack.core.grad is not None for stack in adapter.stacks.values())


def test_a_gradient_of_the_former_basis_is_dropped(inputs):
    adapter = tcur.adapt(model(), rank=2)
    randomise(adapter)
    adapter.model(inputs).square().mean().backward()
    assert all(stack.core.grad is not None for stack in adapter.stacks.values())
    adapter.change_basis("slices")
    assert all(stack.core.grad is None for stack in adapter.stacks.values())


# -- what it is for


def trained(base, targets, inputs, basis, rate, steps=60, rank=4, **settings):
    """Fits ``targets`` with Adam; returns the losses."""
    adapter = tcur.adapt(base, rank=rank, basis=basis, **settings)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=rate)
    losses = []
    for _ in range(steps):
        loss = (base(inputs) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def with_outliers(factor):
    """Layers like those of pretrained transformers: a few columns are much larger than the rest."""
    torch.manual_seed(0)
    base = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(32, 32), nn.Tanh())))
    with torch.no_grad():
        for layer in base[::2]:
            layer.weight[:, [3, 11]] *= factor
            layer.weight[[5, 17]] *= factor
    return base


@pytest.mark.parametrize("rank", [2, 8, 16])
def test_outliers_spoil_training_in_slices_and_not_in_the_orthonormal_basis(rank):
    """The rate is one for all ranks, as for LoRA."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(256, 32, generator=generator)
    base = with_outliers(30.0)
    target = copy.deepcopy(base)
    with torch.no_grad():
        for layer in target[::2]:
            layer.weight += 0.02 * torch.randn(32, 32, generator=generator)
        targets = target(inputs)
    rate = 1e-3
    ours = trained(copy.deepcopy(base), targets, inputs, "orthonormal", rate, rank=rank)
    slices = trained(copy.deepcopy(base), targets, inputs, "slices", rate, rank=rank)
    assert min(ours[-10:]) < 0.97 * ours[0]
    assert max(ours) < 1.05 * ours[0]
    assert min(slices[-10:]) > slices[0]


def test_training_does_not_depend_on_the_norms_of_columns():
    """Column 3 is a hundred times larger, and no input reaches it: it only has its part in C."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(4, 12, 12, generator=generator) / 12**0.5
    rows, columns = [0, 4, 7], [3, 5, 9]
    weights[:, rows, 3] = 0  # then R is the same, too
    inputs = torch.randn(64, 12, generator=generator)
    inputs[:, 3] = 0
    targets = torch.randn(64, 12, generator=generator)

    class Sum(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(12, 12, bias=False) for _ in range(4))
            with torch.no_grad():
                for layer, weight in zip(self.layers, weights, strict=True):
                    layer.weight.copy_(weight)
                    layer.weight[:, 3] *= factor

        def forward(self, x):
            return sum(layer(x) for layer in self.layers)

    def losses(factor, basis):
        settings = {"rank": 3, "selection": (rows, columns), "steps": 20}
        return torch.tensor(trained(Sum(factor), targets, inputs, basis, 1e-2, **settings))

    assert relative_error(losses(100.0, "orthonormal"), losses(1.0, "orthonormal").double()) < 1e-5
    assert relative_error(losses(100.0, "slices"), losses(1.0, "slices").double()) > 1e-2


@pytest.mark.parametrize("mode", ["factored", "materialized", "auto"])
def test_a_model_that_ran_follows_a_change_of_basis(mode):
    """What its calls have in common was made of the former C and R."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(9, 9) for _ in range(4)]).double()
    adapter, x = tcur.adapt(model, rank=2, mode=mode), torch.randn(3, 9, dtype=torch.float64)
    for core in adapter.parameters():
        nn.init.normal_(core, std=0.3)
    with torch.no_grad():
        wanted = model(x)
        for basis in ("slices", "orthonormal"):
            adapter.change_basis(basis)
            assert relative_error(model(x), wanted) < 1e-12
