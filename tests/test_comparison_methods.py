"""benchmarks.comparison.methods: where they start, what they train, what they save, and counts."""

import copy
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from benchmarks.comparison.methods import METHODS, by_peft, method, ours, plain, small
from benchmarks.comparison.methods.base import RefusedError
from benchmarks.comparison.tasks.base import Task
from tolerance import assert_equal_in_float64, same_mathematics

BY_PEFT = [name for name in METHODS if METHODS[name].source == "peft"]


class Small(Task):
    """Fits numbers with two blocks, whose layers have two shapes."""

    head, head_rate, layers, norms, steps = ("head",), 1e-2, ["body.*"], ["body.*"], 3

    def __init__(self, linear=nn.Linear, narrow=32, wide=64):
        block = (nn.LayerNorm(narrow), linear(narrow, wide), nn.GELU(), linear(wide, narrow))
        body = nn.Sequential(*block, *copy.deepcopy(block))
        self.base = nn.ModuleDict({"body": body, "head": nn.Linear(narrow, 2)})
        for parameter in body.parameters():
            nn.init.normal_(parameter, std=0.3)
        self.inputs, self.targets = torch.randn(40, narrow), torch.randn(40, 2)

    def output(self, model):
        return model["head"](model["body"](self.inputs))

    def loss(self, model, generator):
        rows = torch.randint(40, (8,), generator=generator)
        return (self.output(model)[rows] - self.targets[rows]).square().mean()

    def score(self, model, part):
        return 0.0

    def kept(self, model):
        return math.nan


def conv1d(inputs, outputs):
    return Conv1D(outputs, inputs)


def prepare(task, name, seed=0):
    model = task.model().requires_grad_(False)
    return model, method(name).prepare(model, task, seed)


def train(task, model, prepared, rate, steps):
    trained = [*prepared.parameters, *model["head"].parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(trained, lr=rate)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        loss = task.loss(model, generator)
        if prepared.penalty is not None:
            loss = loss + prepared.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if prepared.after_step is not None:
            prepared.after_step(step)


SIDES, OUTPUTS, LAYERS = 4 * (32 + 64), 2 * (32 + 64), 4
TRAINED = {
    "head": 0,
    "full": 2 * (2 * 32 + 2 * 32 * 64 + 32 + 64),
    "lora:1": SIDES,
    "lora:8": 8 * SIDES,
    "adalora": 12 * (SIDES + LAYERS),
    "pissa": 8 * SIDES,
    "vera": LAYERS * 64 + OUTPUTS,
    "fourierft": LAYERS * 1000,
    "tinylora": LAYERS * 64,
    "psoft": LAYERS * (32 * 31 // 2 + 2 * 32),
    "road": OUTPUTS,
    "miss": 8 * OUTPUTS,
    "adapter": 2 * 32 * OUTPUTS,
    "ssf": 2 * (OUTPUTS + 2 * 32),
    "lotr": 8 * SIDES // 2 + LAYERS * 8**2,
    "curlora": LAYERS * 8**2,
    "tcurlora:published": LAYERS * 8**2,
    "tcurlora:8": LAYERS * 8**2,
    "tcurlora:32": LAYERS * 32**2,
}


def test_the_methods_have_labels_and_rates():
    assert list(METHODS) == list(TRAINED)
    assert len({one.label for one in METHODS.values()}) == len(METHODS)
    with pytest.raises(ValueError, match=r"expected one of head, full, .*, got 'lora'"):
        method("lora")


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_and_saves_what_it_says(name, tmp_path):
    task = Small()
    start, exact = task.base.state_dict(), name != "pissa"
    state = torch.get_rng_state()
    model, prepared = prepare(task, name)
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(p.numel() for p in prepared.parameters) == TRAINED[name]
    assert len({id(p) for p in prepared.parameters}) == len(prepared.parameters)
    first = task.output(model)
    if exact:
        assert torch.equal(first, task.output(task.base))
    else:
        assert same_mathematics(first, task.output(task.base))

    before = [p.detach().clone() for p in prepared.parameters]
    others = unchanged(model, prepared)
    train(task, model, prepared, METHODS[name].rate, task.steps)
    assert not any(map(torch.equal, before, prepared.parameters))
    assert not torch.equal(model["head"].weight, start["head.weight"])
    assert all(map(torch.equal, others.values(), unchanged(model, prepared).values()))
    with torch.no_grad():
        model["head"].load_state_dict(task.base["head"].state_dict())
        assert torch.equal(task.output(model), first) == (name == "head")
    if exact and name != "full":  # PiSSA takes a part out of the base, by design
        for tensor in start.values():
            assert any(equal(tensor, other) for other in model.state_dict().values())

    prepared.save(tmp_path / "saved")
    if name in BY_PEFT:
        saved = list(load_file(tmp_path / "saved" / "adapter_model.safetensors").values())
        if name != "adalora":  # it saves the ranks that are left, see below
            assert all(any(equal(p, one) for one in saved) for p in prepared.parameters)
    else:
        saved = list(load_file(tmp_path / "saved").values())
        assert len(saved) == len(prepared.parameters)
        assert all(any(equal(p, one) for one in saved) for p in prepared.parameters)


def unchanged(model, prepared):
    """What a training of the method should not change."""
    trained = {p.data_ptr() for p in (*prepared.parameters, *model["head"].parameters())}
    return {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if tensor.data_ptr() not in trained
    }


def equal(a, b):
    return a.shape == b.shape and torch.equal(a, b)


@pytest.mark.parametrize("name", METHODS)
def test_a_seed_draws_the_same_again(name):
    task = Small()
    first = prepare(task, name, seed=1)[0].state_dict()
    torch.manual_seed(7)
    again = prepare(task, name, seed=1)[0].state_dict()
    assert all(map(torch.equal, first.values(), again.values()))
    other = prepare(task, name, seed=2)[0].state_dict()
    draws = ("lora:1", "lora:8", "adalora", "vera", "tinylora", "adapter", "lotr")
    if name in draws:
        assert not all(map(torch.equal, first.values(), other.values()))


def test_the_frequencies_of_fourierft_and_the_slices_of_curlora_are_drawn():
    task = Small()
    frequencies = [prepare(task, "fourierft", seed)[0]["body"][1].indices for seed in (1, 1, 2)]
    assert torch.equal(frequencies[0]["default"], frequencies[1]["default"])
    assert not torch.equal(frequencies[0]["default"], frequencies[2]["default"])
    saves = [prepare(task, "curlora", seed)[1].save for seed in (1, 1, 2)]
    slices = [save.__self__.stacks["body_1"].rows for save in saves]
    assert slices[0] == slices[1] != slices[2]


def test_curlora_takes_slices_of_small_norm_and_tcurlora_of_large():
    model = nn.ModuleDict({str(number): nn.Linear(16, 16) for number in range(2)})
    for layer in model.values():
        layer.weight.data[::2] *= 1e4
        layer.weight.data[:, 1::2] *= 1e4
    task = SimpleNamespace(layers=None, head=())
    chosen = []
    for adapted in (ours.curlora, ours.tcurlora):
        save = adapted(copy.deepcopy(model), task, 0, rank=4).save
        chosen += [(s.rows, s.columns) for s in save.__self__.stacks.values()]
    small_rows = [sum(row % 2 for row in rows) for rows, _ in chosen]
    small_columns = [sum(1 - column % 2 for column in columns) for _, columns in chosen]
    for own, other, shared in (small_rows, small_columns):
        assert min(own, other) >= 3  # of 4, which are drawn
        assert shared == 0


def test_pissa_takes_out_what_it_adds():
    """W_res + BA = W, up to the roundings of the product of rank r, and of the difference."""
    task = Small()
    model, _ = prepare(task, "pissa")
    unit = torch.finfo(torch.float32).eps / 2
    for number in (1, 3, 5, 7):
        layer, weight = model["body"][number], task.base["body"][number].weight.double()
        left = layer.base_layer.weight.double()
        b, a = layer.lora_B["default"].weight.double(), layer.lora_A["default"].weight.double()
        terms = a.shape[0]
        roundings = terms * unit / (1 - terms * unit)
        bound = roundings * b.abs() @ a.abs() + unit * left.abs() / (1 - unit)
        assert ((left + b @ a - weight).abs() <= bound).all()
        assert torch.linalg.matrix_rank(weight - left, rtol=1e-5) == 8
        largest = torch.linalg.svdvals(weight)[:8].norm()
        assert 0.98 * largest < (weight - left).norm() <= (1 + 1e-6) * largest


def test_the_penalty_of_adalora_is_that_of_peft():
    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8))

        def forward(self, x):
            return SimpleNamespace(loss=self.body(x).square().mean())

    model, x = WithLoss(), torch.randn(5, 8)
    prepared = method("adalora").prepare(model, Small(), 0)
    whole = prepared.after_step.__self__(x).loss
    assert torch.equal(model(x).loss + prepared.penalty(), whole)
    squares = [p.double() @ p.double().T for n, p in model.named_parameters() if "lora_A" in n]
    squares += [p.double().T @ p.double() for n, p in model.named_parameters() if "lora_B" in n]
    norms = [torch.linalg.matrix_norm(one - torch.eye(12)) for one in squares]
    assert len(norms) == 4
    assert same_mathematics(prepared.penalty().double(), sum(norms) / 4 / 2)


def test_adalora_ends_with_a_mean_rank_of_8(tmp_path):
    task = Small()
    task.steps = 20
    model, prepared = prepare(task, "adalora")
    train(task, model, prepared, 1e-3, task.steps)
    prepared.save(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert sum(len(one) for name, one in saved.items() if "lora_E" in name) == LAYERS * 8


def filled(task, prepared_by):
    """A model of float64 with what the method trains filled with random numbers."""
    model = task.model().double()
    prepared = prepared_by(model, task, 0)
    with torch.no_grad():
        for parameter in prepared.parameters:
            parameter.normal_()
    return model, prepared, torch.randn(5, 32, dtype=torch.float64)


@pytest.mark.parametrize("linear", [nn.Linear, conv1d])
def test_the_output_of_an_adapter(linear):
    task = Small(linear)
    model, _, x = filled(task, partial(small.adapter, width=3))
    base, layer = task.base["body"][1].double(), model["body"][1]
    down, up = layer.adaptation.down, layer.adaptation.up
    assert down.shape == (3, 64)
    assert up.shape == (64, 3)
    y = base(x)
    assert_equal_in_float64(layer(x), y + torch.relu(y @ down.T) @ up.T)


@pytest.mark.parametrize("linear", [nn.Linear, conv1d])
def test_the_output_of_ssf(linear):
    task = Small(linear)
    model, _, x = filled(task, small.ssf)
    for number in (0, 1):  # a normalisation, and a layer
        base, layer = task.base["body"][number].double(), model["body"][number]
        own = layer.adaptation
        assert_equal_in_float64(layer(x), own.gamma * base(x) + own.beta)


@pytest.mark.parametrize("linear", [nn.Linear, conv1d])
def test_the_output_of_lotr(linear):
    task = Small(linear)
    model, prepared, x = filled(task, partial(small.lotr, rank=3))
    a, b = model.lotr_64x32_a, model.lotr_64x32_b
    assert a.shape == (64, 3)
    assert b.shape == (32, 3)
    for number in (1, 5):
        base, layer = task.base["body"][number].double(), model["body"][number]
        update = a @ layer.adaptation.core @ b.T
        assert_equal_in_float64(layer(x), base(x) + x @ update.T)
    assert not torch.equal(model["body"][1].adaptation.core, model["body"][5].adaptation.core)
    ids = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    assert all(ids.count(id(parameter)) == 1 for parameter in prepared.parameters)


def test_the_shared_factors_of_lotr_are_normal_numbers():
    model = nn.ModuleDict({"body": nn.Linear(400, 500)})
    small.lotr(model, SimpleNamespace(layers=None, head=()), 0)
    for factor in (model.lotr_500x400_a, model.lotr_500x400_b):
        assert (factor.norm(dim=0) - 1).abs().max() < 0.2
        assert factor.abs().max() < 6 / len(factor) ** 0.5


@pytest.mark.parametrize("name", ["adapter", "ssf", "lotr"])
def test_a_copy_of_a_model_computes_with_its_own_numbers(name):
    task = Small()
    model, prepared = prepare(task, name)
    copied = copy.deepcopy(model)
    assert torch.equal(task.output(copied), task.output(model))
    with torch.no_grad():
        for parameter in prepared.parameters:
            parameter.normal_()
    assert torch.equal(task.output(copied), task.output(task.base))
    assert not torch.equal(task.output(copied), task.output(model))


class Attention(Small):
    """A fused projection of q, k and v, and another layer of its shape that is none."""

    layers, norms = None, None

    def __init__(self, linear=nn.Linear, name="qkv"):
        self.base = nn.ModuleDict(
            {name: linear(8, 24), "wide": linear(8, 24), "head": nn.Linear(24, 2)}
        )


@pytest.mark.parametrize("linear", [nn.Linear, conv1d])
@pytest.mark.parametrize("name", ["qkv", "c_attn"])
def test_a_fused_projection_has_an_adapter_for_each_third(linear, name):
    task = Attention(linear, name)
    model = task.model().double()
    prepared = small.adapter(model, task, 0, width=3)
    assert sum(p.numel() for p in prepared.parameters) == 2 * 2 * 3 * 24
    x = torch.randn(5, 8, dtype=torch.float64)
    y = task.base[name].double()(x)
    assert torch.equal(model[name](x), y)
    wanted = []
    for part, third in zip(model[name].adaptation.parts, y.split(8, dim=-1), strict=True):
        nn.init.normal_(part.up)
        wanted.append(third + torch.relu(third @ part.down.T) @ part.up.T)
    assert_equal_in_float64(model[name](x), torch.cat(wanted, dim=-1))
    assert isinstance(model["wide"].adaptation, small.Bottleneck)


@pytest.mark.parametrize("linear", [nn.Linear, conv1d])
@pytest.mark.parametrize("has_bias", [True, False])
def test_curlora_has_cores_of_q_k_and_v(linear, has_bias, tmp_path):
    task = Attention(linear)
    if not has_bias and linear is nn.Linear:
        task.base["qkv"].bias = None
    model = task.model().double()
    x = torch.randn(5, 8, dtype=torch.float64)
    prepared = ours.curlora(model, task, 0, rank=2)
    assert [p.shape[-2:] for p in prepared.parameters] == [(2, 2)] * 4
    assert_equal_in_float64(model["qkv"](x), task.base["qkv"].double()(x))
    model["wide"](x)
    before = model["qkv"](x)
    nn.init.normal_(prepared.parameters[1])
    changed = (model["qkv"](x) != before).any(dim=0)
    assert changed.tolist() == 8 * [False] + 8 * [True] + 8 * [False]
    prepared.save(tmp_path / "saved")


@pytest.mark.parametrize("name", METHODS)
def test_on_the_layers_of_gpt2(name):
    """Half of the layers keep their weight transposed."""
    task = Small(conv1d)
    task.base["body"][3] = nn.Linear(64, 32)
    if name in ("psoft", "road", "miss"):
        with pytest.raises(RefusedError, match=r"^Target module Conv1D\(.*\) is not supported"):
            prepare(task, name)
        return
    model, prepared = prepare(task, name)
    assert sum(p.numel() for p in prepared.parameters) == TRAINED[name]
    assert same_mathematics(task.output(model), task.output(task.base))


def test_small_and_odd_layers():
    task = Small(narrow=8, wide=12)
    model, prepared = prepare(task, "fourierft")
    assert [p.numel() for p in prepared.parameters] == [96] * 4
    model, prepared = prepare(task, "psoft")
    assert [p.numel() for p in prepared.parameters] == [28, 8, 8] * 4
    assert torch.equal(task.output(model), task.output(task.base))
    model, prepared = prepare(task, "road")
    assert model["body"][1].group_size == {"default": 4}
    with pytest.raises(RefusedError, match="rank"):
        prepare(task, "tcurlora:32")
    with pytest.raises(RefusedError, match="must be divisible by 2"):
        prepare(Small(narrow=7, wide=12), "road")


def test_names_that_end_like_others():
    """Only the layers of the task are adapted, not those whose names end alike."""
    task = Attention()
    task.base = nn.ModuleDict({"fc": nn.Linear(8, 8), "more": nn.ModuleDict({"fc": task.base})})
    task.base["more"]["fc"] = nn.Linear(8, 8)
    task.layers = ["fc"]
    for name in BY_PEFT:
        model, prepared = prepare(task, name)
        assert type(model["more"]["fc"]) is nn.Linear
        assert type(model["fc"]) is not nn.Linear
        assert prepared.parameters


@pytest.mark.parametrize("name", ["adapter", "ssf", "lotr"])
def test_a_layer_that_is_never_called_is_refused(name):
    task = Attention()
    task.base = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    with pytest.raises(RefusedError, match=r"attn.out_proj: nn.MultiheadAttention"):
        prepare(task, name)


def test_ssf_gives_a_scale_to_a_normalisation_that_has_none():
    task = Attention()
    task.base["norm"] = nn.LayerNorm(8, elementwise_affine=False)
    model, prepared = prepare(task, "ssf")
    assert sum(p.numel() for p in prepared.parameters) == 2 * (24 + 24 + 8)
    assert model["norm"].adaptation.gamma.tolist() == 8 * [1.0]


def test_tied_weights_are_trained_and_saved_once(tmp_path):
    task = Attention()
    task.base["tied"] = nn.Linear(8, 24)
    task.base["tied"].weight = task.base["wide"].weight
    _, prepared = prepare(task, "full")
    assert sum(p.numel() for p in prepared.parameters) == 2 * 8 * 24 + 3 * 24
    prepared.save(tmp_path / "saved")
    saved = load_file(tmp_path / "saved")
    assert sorted(saved) == ["qkv.bias", "qkv.weight", "tied.bias", "wide.bias", "wide.weight"]


@pytest.fixture(scope="module")
def unetr():
    """UNETR of the size that the paper trains, made on the device that is asked for."""
    nets = pytest.importorskip("monai.networks.nets")
    options = {"in_channels": 1, "out_channels": 2, "img_size": (128, 128, 128)}
    options |= {"feature_size": 16, "hidden_size": 768, "mlp_dim": 3072, "num_heads": 12}
    with torch.device("meta"):
        meta = nets.UNETR(**options)
    real = copy.deepcopy(meta).to_empty(device="cpu")
    for parameter in real.parameters():
        nn.init.normal_(parameter, std=0.02)
    return {"meta": meta, "cpu": real}


UNETR = SimpleNamespace(
    layers=["vit.blocks.*.attn.*", "vit.blocks.*.mlp.*"],
    norms=["vit.blocks.*.norm1", "vit.blocks.*.norm2", "vit.norm"],
    head=("decoder*",),
    steps=100,
)


@pytest.mark.parametrize(
    ("prepare_it", "device", "trained"),
    [
        (plain.head, "meta", 2_678_528),
        (plain.full, "meta", 93_029_602),
        (small.adapter, "meta", 7_986_944),
        (small.ssf, "meta", 2_882_816),
        (partial(small.lotr, rank=2), "meta", 2_703_296),
        (partial(by_peft.prepare, config=partial(by_peft.lora, rank=32)), "meta", 7_397_120),
        (
            partial(by_peft.prepare, config=partial(by_peft.lora, rank=2, start="pissa_niter_4")),
            "cpu",
            2_973_440,
        ),
        (partial(ours.curlora, rank=2), "cpu", 2_678_816),
        (ours.tcurlora, "cpu", 2_683_136),
    ],
    ids=["head", "full", "adapter", "ssf", "lotr", "lora", "pissa", "curlora", "tcurlora"],
)
def test_the_numbers_that_the_paper_trains_of_unetr(unetr, prepare_it, device, trained):
    """With the decoder, as the paper counts."""
    model = copy.deepcopy(unetr[device]).requires_grad_(False)
    decoder = [p for name, p in model.named_parameters() if "decoder" in name]
    prepared = prepare_it(model, UNETR, 0)
    assert sum(p.numel() for p in (*decoder, *prepared.parameters)) == trained
