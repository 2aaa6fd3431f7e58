"""Layers of every kind, and models that hold them in ways of their own."""

import copy

import pytest
import torch
from torch import nn

import tcur_kernels as tcur
from plain import Plain
from tcur_kernels.adapters.plan import make_plan
from tolerance import assert_composition_close, assert_equal_in_float64

WIDTH, HEADS = 8, 2


def randomise(adapter):
    with torch.no_grad():
        for stack in adapter.stacks.values():
            stack.core.normal_(std=0.1)


def members(plan):
    return {stack.name: [(m.module, m.slices) for m in stack.members] for stack in plan.stacks}


class Attending(nn.Module):
    """Two attentions, one of them across, as `nn.MultiheadAttention` offers."""

    def __init__(self, **kwargs):
        super().__init__()
        self.first = nn.MultiheadAttention(WIDTH, HEADS, **kwargs)
        self.second = nn.MultiheadAttention(WIDTH, HEADS, **kwargs)

    def forward(self, x, memory, **kwargs):
        x, weights = self.first(x, x, x, **kwargs)
        y, _ = self.second(x, memory, memory)
        return y if weights is None else (y, weights)


def both_ways(make, inputs, targets=None, **call):
    """Values and core gradients of an adapted model, and of the base with W_eff in float64."""
    torch.manual_seed(0)
    model = make().double()
    base = copy.deepcopy(model)
    adapter = tcur.adapt(model, targets, rank=2, alpha=0.5)
    randomise(adapter)

    plain = Plain(adapter, torch.float64, base)

    def run(function, cores):
        torch.manual_seed(1)  # dropout
        out = function(*inputs, **call)
        out = out if isinstance(out, tuple) else (out,)
        return *out, *torch.autograd.grad(out[0].square().sum(), cores)

    own = [stack.core for stack in adapter.stacks.values()]
    return adapter, run(model, own), run(plain, list(plain.cores.values()))


ATTENTIONS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "extra keys": {"add_bias_kv": True, "add_zero_attn": True},
    "other widths": {"kdim": 6, "vdim": 6},
    "dropout": {"dropout": 0.5},
}
CALLS = {
    "weights": {},
    "no weights": {"need_weights": False},
    "weights of heads": {"average_attn_weights": False},
    "boolean mask": {"attn_mask": torch.ones(5, 5).triu(1).bool()},
    "float mask": {"attn_mask": torch.linspace(-2, 2, 25).view(5, 5).double()},
    "mask of heads": {"attn_mask": torch.linspace(-2, 2, 150).view(6, 5, 5).double()},
    "padding": {"key_padding_mask": torch.tensor([[0, 0, 0, 1, 1]] * 3).bool()},
    "both": {
        "attn_mask": torch.ones(5, 5).triu(1).bool(),
        "key_padding_mask": torch.tensor([[0, 0, 0, 1, 1]] * 3).bool(),
        "need_weights": False,
    },
    "causal": {
        "attn_mask": torch.ones(5, 5).triu(1).bool(),
        "is_causal": True,
        "need_weights": False,
    },
}


@pytest.mark.parametrize("kind", ATTENTIONS.values(), ids=ATTENTIONS)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_multihead_attention(kind, call):
    """Values and gradients as if in_proj_weight and out_proj were W_eff, whatever the arguments."""
    if "kdim" in kind:
        # Of one attention alone: q, k, v of other widths do not fit self-attention.
        x, memory = torch.randn(5, 3, WIDTH).double(), torch.randn(5, 3, 6).double()
        adapter, actual, wanted = both_ways(
            lambda: Wrapped(nn.MultiheadAttention(WIDTH, HEADS, **kind)), (x, memory), **call
        )
        assert members(adapter.plan) == {
            "8x8": [("a.q_proj", 1), ("a.out_proj", 1)],
            "8x6": [("a.k_proj", 1), ("a.v_proj", 1)],
        }
    else:
        x = torch.randn(5, 3, WIDTH).double()
        memory = torch.randn(7, 3, WIDTH).double()
        if kind.get("batch_first"):
            x, memory = x.transpose(0, 1), memory.transpose(0, 1)
        adapter, actual, wanted = both_ways(lambda: Attending(**kind), (x, memory), **call)
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        expected = [(f"{a}.{n}", 1) for a in ("first", "second") for n in names]
        assert members(adapter.plan) == {"8x8": expected}
    assert_equal_in_float64(actual, wanted)
    assert all(p.grad is None for n, p in adapter.model.named_parameters() if "tcur" not in n)


class Wrapped(nn.Module):
    """One attention across."""

    def __init__(self, attention):
        super().__init__()
        self.a = attention

    def forward(self, x, memory, **kwargs):
        y, weights = self.a(x, memory, memory, **kwargs)
        return y if weights is None else (y, weights)


def test_multihead_attention_without_a_batch():
    x, memory = torch.randn(5, WIDTH).double(), torch.randn(7, WIDTH).double()
    _, actual, wanted = both_ways(Attending, (x, memory))
    assert_equal_in_float64(actual, wanted)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj", "v_proj"], ["first.q_proj", "first.v_proj", "second.q_proj", "second.v_proj"]),
        ("first.out_proj", ["first.out_proj"]),
        ("second", [f"second.{n}" for n in ("q_proj", "k_proj", "v_proj", "out_proj")]),
    ],
)
def test_parts_of_an_attention(targets, expected, tmp_path):
    x, memory = torch.randn(5, 3, WIDTH).double(), torch.randn(7, 3, WIDTH).double()
    adapter, actual, wanted = both_ways(Attending, (x, memory), targets)
    assert_equal_in_float64(actual, wanted)
    assert [m.module for stack in adapter.plan.stacks for m in stack.members] == expected

    torch.manual_seed(0)
    model = Attending().double()
    adapter.save(tmp_path / "a")
    tcur.load_adapter(model, tmp_path / "a")
    assert_equal_in_float64(model(x, memory), adapter.model(x, memory))
    merged = adapter.merge(inplace=False)
    assert_equal_in_float64(merged(x, memory), adapter.model(x, memory))
    assert [type(m) for m in merged.modules()] == [type(m) for m in Attending().modules()]
    other = Attending().double()
    other.load_state_dict(merged.state_dict())
    state = adapter.model.state_dict()
    adapter.merge()
    assert_equal_in_float64(adapter.model(x, memory), merged(x, memory))
    adapter.unmerge()
    for name, value in state.items():
        assert torch.equal(adapter.model.state_dict()[name], value)


def test_the_blocks_that_no_stack_holds_belong_to_the_base(tmp_path):
    torch.manual_seed(0)
    model = Attending()
    base = copy.deepcopy(model)
    adapter = tcur.adapt(model, ["q_proj", "v_proj"], rank=2)
    adapter.save(tmp_path / "a")
    tcur.load_adapter(copy.deepcopy(base), tmp_path / "a")
    base.first.in_proj_weight.data[WIDTH] += 1  # a row of k
    with pytest.raises(ValueError, match="frozen parameters outside of the stacks differ"):
        tcur.load_adapter(base, tmp_path / "a")


def test_a_causal_hint_needs_its_mask():
    model = Attending()
    tcur.adapt(model, rank=2)
    with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
        model(torch.ones(2, 1, WIDTH), torch.ones(2, 1, WIDTH), is_causal=True)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("targets", [None, "linear1", "self_attn"])
def test_transformer_encoders_do_not_go_past_their_layers(targets):
    """In evaluation torch's encoder reads weights directly and would leave the adapter out."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(3, 5, WIDTH)
    padding = torch.tensor([[False, False, False, True, True]] * 3)
    with torch.no_grad():
        before = model(x, src_key_padding_mask=padding)
    base = copy.deepcopy(model)
    adapter = tcur.adapt(model, targets, rank=2)
    valid = ~padding

    def check(y, rows=valid):
        """``y`` against the present adapter on the base, at these positions."""
        plain, exact = (Plain(adapter, dtype, base) for dtype in (torch.float32, torch.float64))
        wanted = exact(x.double(), src_key_padding_mask=padding)[rows]
        assert_composition_close(
            y[rows], lambda: plain(x, src_key_padding_mask=padding)[rows], wanted
        )

    with torch.no_grad():
        check(before)
        check(model(x, src_key_padding_mask=padding))
        randomise(adapter)
        quiet = model(x, src_key_padding_mask=padding)
        merged = adapter.merge(inplace=False)
        fused = merged(x, src_key_padding_mask=padding)
    recorded = model(x, src_key_padding_mask=padding)
    assert (quiet - before)[valid].abs().max() > 1e-3
    check(quiet)
    assert torch.equal(quiet[padding], before[padding])  # torch's encoder leaves zeros there
    check(recorded, ...)
    check(fused)
    assert merged.__dict__.keys() == base.__dict__.keys()


@pytest.fixture(scope="module")
def transformers():
    try:
        import transformers
    except Exception as error:
        pytest.skip(f"transformers: {error}")
    return transformers


class Gpt2(nn.Module):
    """The language model with its logits alone."""

    def __init__(self, transformers):
        super().__init__()
        config = transformers.GPT2Config(
            n_embd=WIDTH, n_layer=2, n_head=HEADS, n_positions=16, vocab_size=11,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        self.lm = transformers.GPT2LMHeadModel(config)

    def forward(self, ids):
        return self.lm(ids).logits


def test_gpt2(transformers, tmp_path):
    """Conv1D is stored (in, out) and told by its type: its square c_proj is no nn.Linear."""
    ids = torch.randint(11, (2, 6))
    adapter, actual, wanted = both_ways(lambda: Gpt2(transformers), (ids,))
    assert_equal_in_float64(actual, wanted)
    h = [f"lm.transformer.h.{i}" for i in range(2)]
    assert members(adapter.plan) == {
        "8x8": [(f"{b}.attn.{n}", k) for b in h for n, k in (("c_attn", 3), ("c_proj", 1))],
        "32x8": [(f"{b}.mlp.c_fc", 1) for b in h],
        "8x32": [(f"{b}.mlp.c_proj", 1) for b in h],
    }
    text = adapter.plan.describe()
    assert "lm.lm_head: its weight is tied: lm.transformer.wte.weight, lm.lm_head.weight" in text
    assert "lm.transformer.wpe: Embedding is not a linear layer" in text
    torch.manual_seed(0)
    model = Gpt2(transformers).double()
    adapter.save(tmp_path / "a")
    tcur.load_adapter(model, tmp_path / "a")
    assert torch.equal(model(ids), adapter.model(ids))
    merged = adapter.merge(inplace=False)
    assert_equal_in_float64(merged(ids), model(ids))
    assert [type(m) for m in merged.modules()] == [type(m) for m in Gpt2(transformers).modules()]
    before = adapter.model(ids)
    adapter.merge()
    assert_equal_in_float64(adapter.model(ids), before)
    adapter.unmerge()
    assert torch.equal(adapter.model(ids), before)
    assert "nf=24, nx=8, slice=0" in repr(adapter.model)


@pytest.mark.parametrize("mode", ["materialized", "factored"])
def test_gpt2_of_fp32(transformers, mode):
    """Its fused projections are read where they are: adapted, merged and plain agree."""
    torch.manual_seed(0)
    ids = torch.randint(11, (2, 6))
    model = Gpt2(transformers)
    base = copy.deepcopy(model)
    before = base(ids)
    adapter = tcur.adapt(model, rank=2, alpha=0.5, mode=mode)
    assert torch.equal(model(ids), before)
    randomise(adapter)
    plain, exact = (Plain(adapter, dtype, base) for dtype in (torch.float32, torch.float64))
    merged = adapter.merge(inplace=False)
    for each in (model, merged):
        assert_composition_close(each(ids), lambda: plain(ids), exact(ids))
    if mode == "materialized":
        assert torch.equal(model(ids), merged(ids))


def test_grouped_query_attention(transformers):
    """Keys and values are narrower than queries: they form a stack of their own."""
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=11, max_position_embeddings=16,
    )  # fmt: skip

    class Llama(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm = transformers.LlamaForCausalLM(config)

        def forward(self, ids):
            return self.lm(ids).logits

    adapter, actual, wanted = both_ways(Llama, (torch.randint(11, (2, 6)),))
    assert_equal_in_float64(actual, wanted)
    assert {s.name: s.n3 for s in adapter.plan.stacks} == {
        "16x16": 4,
        "8x16": 4,
        "24x16": 4,
        "16x24": 2,
    }
    assert "lm.lm_head: the only slice of its shape" in str(adapter.plan)


class Recurrent(nn.Module):
    """One block that goes by two names, and two layers that share a weight."""

    def __init__(self):
        super().__init__()
        self.once = nn.Linear(WIDTH, WIDTH)
        self.again = self.once
        self.left = nn.Linear(WIDTH, WIDTH, bias=False)
        self.right = nn.Linear(WIDTH, WIDTH, bias=False)
        self.right.weight = self.left.weight
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.last(self.right(self.left(self.again(self.once(x)).sin())))


def test_shared_modules_and_tied_weights():
    x = torch.randn(4, WIDTH).double()
    adapter, actual, wanted = both_ways(Recurrent, (x,))
    assert_equal_in_float64(actual, wanted)
    assert members(adapter.plan) == {"8x8": [("once", 1), ("last", 1)]}
    assert adapter.model.again is adapter.model.once
    reasons = {item.module: item.reason for item in adapter.plan.left_out}
    assert reasons["left"] == reasons["right"] == "its weight is tied: left.weight, right.weight"
    merged = adapter.merge(inplace=False)
    assert merged.again is merged.once
    assert_equal_in_float64(merged(x), adapter.model(x))


def mlp():
    return nn.Sequential(
        nn.Linear(6, 10), nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 6), nn.Linear(6, 10)
    )


def test_settings_per_stack():
    model = mlp()
    adapter = tcur.adapt(
        model,
        rank={"10x10": 5, "*": 2},
        alpha={"10x*": 0.25},
        selection={"10x10": ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9]), "10x6": "norm"},
    )
    shapes = {name: (s.rank, s.alpha, s.n3) for name, s in adapter.stacks.items()}
    assert shapes == {"10x6": (2, 0.25, 2), "10x10": (5, 0.25, 2)}
    assert adapter.stacks["10x10"].columns == (5, 6, 7, 8, 9)
    assert "rank 5, W_eff from " in adapter.plan.describe()
    assert "of 2 x 5 x 5 numbers: 1-2\n" in str(adapter.plan)  # the usual way needs no note


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rank": {"10x10": 2}}, ValueError, "rank: expected a value for stack '10x6', got"),
        ({"rank": {"*": 2, "9x9": 2}}, ValueError, r"rank: expected names .*10x6.*, got '9x9'"),
        ({"rank": {"*": "2"}}, TypeError, "rank, mode: expected an int and a str"),
        ({"rank": {"*": 11}, "targets": ["0", "4"]}, ValueError, "rank: expected 1 to"),
        ({"alpha": {"x": 1.0}}, ValueError, "alpha: expected names or patterns of stacks"),
        ({"selection": {"10x10": "norm"}}, ValueError, "selection: expected a value for stack"),
        ({"stacks": "row"}, ValueError, "stacks: expected one of shape, layer, got 'row'"),
        (
            {"stacks": "layer", "targets": {"a": "0"}},
            ValueError,
            "stacks: expected 'shape' where targets name the stacks, got 'layer'",
        ),
        ({"targets": lambda name, module: 1}, TypeError, "expected the function to return a bool"),
        ({"targets": lambda name, module: False}, ValueError, "targets: expected at least one"),
        (
            {"targets": lambda name, module: "a" if name == "0" else True},
            ValueError,
            "targets: expected the function to name a stack for all layers or for none",
        ),
        ({"targets": lambda name, module: "a b"}, ValueError, "expected identifiers as stack"),
    ],
)  # fmt: skip
def test_settings_and_functions_are_checked(change, error, message):
    with pytest.raises(error, match=message):
        tcur.adapt(mlp(), **{"rank": 2, **change})


def test_targets_by_function():
    model = mlp()
    plan = make_plan(model, lambda name, module: module.in_features == 10, 2)
    assert members(plan) == {"10x10": [("1", 1), ("2", 1)], "6x10": [("3", 1)]}

    def by_depth(name, module):
        return None if name == "3" else "deep" if name in "12" else "wide"

    plan = make_plan(model, by_depth, 2)
    assert members(plan) == {"wide": [("0", 1), ("4", 1)], "deep": [("1", 1), ("2", 1)]}
    # Names are taken as they are: "0" is not every layer called 0 somewhere below.
    nested = nn.ModuleDict({"a": mlp(), "b": mlp()})
    plan = make_plan(nested, lambda name, module: name == "a.1", 2)
    assert members(plan) == {"10x10": [("a.1", 1)]}


def test_a_stack_per_layer_is_matrix_cur():
    x = torch.randn(4, 6)
    model = mlp()
    weights = {name: m.weight.detach().clone() for name, m in model.named_children()}
    adapter = tcur.adapt(model, rank=2, stacks="layer", alpha=0.5, basis="slices")
    assert members(adapter.plan) == {name: [(name, 1)] for name in "01234"}
    randomise(adapter)

    def by_definition(h):
        for name, stack in adapter.stacks.items():
            own = (weights[name], stack.core[0].detach(), getattr(model, name).bias.detach())
            weight, core, bias = (tensor.to(h.dtype) for tensor in own)
            update = weight[:, list(stack.columns)] @ core @ weight[list(stack.rows)]
            h = nn.functional.linear(h, weight + 0.5 * update, bias)
        return h

    assert_composition_close(model(x), lambda: by_definition(x), by_definition(x.double()))


def test_names_of_a_stack_per_layer_are_of_their_own():
    """Also where one begins with another: two underscores divide a stack from its cores."""
    nested = nn.Module()
    nested.a_b, nested.a, nested.keys = nn.Linear(4, 12), nn.Module(), nn.Linear(4, 4)
    nested.a.b, nested.a.qkv, nested.a._b = nn.Linear(4, 4), nn.Linear(4, 12), nn.Linear(4, 4)
    adapter = tcur.adapt(nested, rank=2, stacks="layer")
    assert members(adapter.plan) == {
        "a_b": [("a_b", 1)],
        "a_b_2": [("a.b", 1)],
        "a_qkv": [("a.qkv", 1)],
        "a_b_3": [("a._b", 1)],
        "keys_2": [("keys", 1)],
    }
    adapter.add("second")


def test_what_is_left_out_is_counted_when_it_is_much():
    convolutions = [nn.Conv2d(3, 3, 1) for _ in range(7)]
    layers = [nn.Linear(4, 4), nn.Linear(4, 4), nn.LSTM(4, 4), *convolutions, nn.Embedding(3, 3)]
    plan = make_plan(nn.Sequential(*layers), None, 2)
    assert len(plan.left_out) == 9
    assert str(plan).splitlines()[1:] == [
        "left out: 9 modules, which plan.describe() names: "
        "7 x Conv2d is not a linear layer (targets may name it); "
        "1 x LSTM is not a linear layer; 1 x Embedding is not a linear layer"
    ]
    assert plan.describe().splitlines()[3:] == [
        "left out:",
        "  2: LSTM is not a linear layer",
        *[f"  {i}: Conv2d is not a linear layer (targets may name it)" for i in range(3, 10)],
        "  10: Embedding is not a linear layer",
    ]
    layers += [nn.GRU(4, 4), nn.RNN(4, 4), nn.Conv1d(3, 3, 1)]
    plan = make_plan(nn.Sequential(*layers), None, 2)
    assert "; 1 x GRU is not a linear layer; 2 for other reasons" in str(plan)
    assert "  13: Conv1d is not a linear layer (targets may name it)" in plan.describe()
    three = nn.Sequential(*layers[:4], layers[-1])
    assert str(make_plan(three, None, 2)).splitlines()[1:] == [
        "left out:",
        "  2: LSTM is not a linear layer",
        "  3: Conv2d is not a linear layer (targets may name it)",
        "  4: Conv1d is not a linear layer (targets may name it)",
    ]


def test_weights_on_the_meta_device_are_left_out():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, device="meta"))
    plan = make_plan(model, None, 2)
    assert "2: its weight is on the meta device" in str(plan)
