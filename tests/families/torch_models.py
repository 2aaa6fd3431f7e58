"""Families of torch itself, and small models for various ways of using layers."""

import functools

import torch
from torch import nn

from .subject import family

WIDTH, HEADS = 16, 4


def _encoder_layer(**settings):
    settings = {"dropout": 0.0, "dim_feedforward": 24, **settings}
    return nn.TransformerEncoderLayer(WIDTH, HEADS, **settings)


def _encoder(train=False, nested=True, norm=False, **settings):
    norm = nn.LayerNorm(WIDTH) if norm else None
    model = nn.TransformerEncoder(_encoder_layer(**settings), 2, norm, enable_nested_tensor=nested)
    return model.train(train)


def _decoder(**settings):
    settings = {"dropout": 0.0, "dim_feedforward": 24, **settings}
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, HEADS, **settings), 2).eval()


def _transformer(train=False, **settings):
    settings = {"dropout": 0.0, "dim_feedforward": 24, **settings}
    model = nn.Transformer(WIDTH, HEADS, num_encoder_layers=2, num_decoder_layers=2, **settings)
    return model.train(train)


def _padding(batch=3, length=6):
    """True where a sequence has ended: at 6, 4 and 3 tokens."""
    return torch.arange(length) >= torch.tensor([6, 4, 3])[:batch, None]


def _tokens(batch_first=True, length=6):
    return torch.randn(*((3, length) if batch_first else (length, 3)), WIDTH)


class Attending(nn.Module):
    """Self-attention and cross-attention, with the options of `nn.MultiheadAttention`."""

    def __init__(self, memory=WIDTH, **settings):
        super().__init__()
        self.first = nn.MultiheadAttention(WIDTH, HEADS, **settings)
        self.second = nn.MultiheadAttention(WIDTH, HEADS, kdim=memory, vdim=memory, **settings)
        self.third = nn.MultiheadAttention(WIDTH, HEADS, kdim=memory, vdim=memory, **settings)

    def forward(self, x, memory, **call):
        y, weights = self.first(x, x, x, **call)
        y = self.third(x + self.second(y, memory, memory)[0], memory, memory)[0]
        return y if weights is None else (y, weights)


def _attention(call=None, **settings):
    def inputs():
        first = settings.get("batch_first", False)
        memory = torch.randn(*((3, 5) if first else (5, 3)), settings.get("memory", WIDTH))
        return {"x": _tokens(first), "memory": memory, **(call or {})}

    return functools.partial(lambda **s: Attending(**s).eval(), **settings), inputs


class Recurrent(nn.Module):
    """Recurrent layers beside linear ones; only the latter can be adapted."""

    def __init__(self):
        super().__init__()
        self.lift = nn.Linear(8, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, 2, batch_first=True)
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.out = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        return self.out(self.gru(self.lstm(self.lift(x))[0])[0])


class Reading(nn.Module):
    """A model that reads the weights of its layers instead of calling them."""

    def __init__(self):
        super().__init__()
        self.called = nn.Linear(WIDTH, WIDTH)
        self.read = nn.Linear(WIDTH, WIDTH)
        self.transposed = nn.Linear(WIDTH, WIDTH, bias=False)
        self.summed = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        x = nn.functional.linear(self.called(x).tanh(), self.read.weight, self.read.bias)
        x = x.relu() @ self.transposed.weight
        return x + torch.einsum("bti,oi->bto", x.sin(), self.summed.weight)


class Twice(nn.Module):
    """One block called three times, and lists, dictionaries and names that share layers."""

    def __init__(self):
        super().__init__()
        block = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH))
        self.blocks = nn.ModuleList([block, block])
        self.named = nn.ModuleDict({"again": block, "own": nn.Linear(WIDTH, 24)})
        self.back = nn.Linear(24, WIDTH)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x + self.named["again"](x) + self.back(self.named["own"](x))


class Skipping(nn.Module):
    """Layers that a call does not reach."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.spare = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, use=(0, 1, 3)):
        for index in use:
            x = x + self.layers[index](x).tanh()
        return x


class InPlace(nn.Module):
    """Overwrites the results of layers, and views of them, in place."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        y = self.a(x)
        y += 0.5
        z = self.b(y.transpose(0, 1))
        z[:, :2] *= 2
        z = nn.functional.relu_(z)
        u = self.c(z[0])
        u.view(-1)[::3] = 1.0
        v = self.d(x[0, 0])
        v[3:].zero_()
        return y, z, u, v


class Layouts(nn.Module):
    """Layers whose inputs are transposed, broadcast, sliced or one-dimensional."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d, self.e = (nn.Linear(WIDTH, WIDTH) for _ in range(5))

    def forward(self, x):
        x = self.a(x.transpose(0, 1)).transpose(0, 1)
        y = self.b(x[:1].expand(4, -1, -1))
        z = self.c(x[:, ::2]) + self.c(x[0, 0])
        image = x.reshape(3, 2, 3, WIDTH).permute(0, 3, 1, 2)  # a map of WIDTH channels
        image = self.d(image.contiguous().permute(0, 2, 3, 1))
        return y, z, image, self.e(x[:0]), self.e(x[:, :, None])


def torch_families():
    make = functools.partial(family, library="torch", compiles=True)

    def both(batch_first=True):
        return {"src": _tokens(batch_first), "tgt": _tokens(batch_first, 5)}

    def padded(batch_first=True):
        return {"src": _tokens(batch_first), "src_key_padding_mask": _padding()}

    def causal():
        mask = nn.Transformer.generate_square_subsequent_mask(6)
        return {"src": _tokens(), "mask": mask, "is_causal": True}

    encoders = {
        "TransformerEncoder": ({"batch_first": True}, lambda: {"src": _tokens()}),
        "TransformerEncoder, padded": ({"batch_first": True}, padded),
        "TransformerEncoder, padded, without nested tensors": (
            {"batch_first": True, "nested": False}, padded,
        ),
        "TransformerEncoder, sequence first": ({}, lambda: {"src": _tokens(False)}),
        "TransformerEncoder, sequence first, padded": ({}, lambda: padded(False)),
        "TransformerEncoder, norm first": (
            {"batch_first": True, "norm_first": True, "norm": True, "nested": False}, padded,
        ),
        "TransformerEncoder, GELU, no bias": (
            {"batch_first": True, "activation": "gelu", "bias": False}, padded,
        ),
        "TransformerEncoder, causal": ({"batch_first": True}, causal),
        "TransformerEncoder, training": ({"batch_first": True, "train": True}, padded),
    }  # fmt: skip
    found = [
        # Compiled, torch's own encoder leaves no zeros at padded positions, unlike in eager mode.
        make(
            name,
            make=functools.partial(_encoder, **settings),
            inputs=inputs,
            compiles=name != "TransformerEncoder, padded",
        )
        for name, (settings, inputs) in encoders.items()
    ]
    memory = {"batch_first": True}
    found += [
        make(
            "TransformerDecoder",
            make=functools.partial(_decoder, **memory),
            inputs=lambda: {
                "tgt": _tokens(length=5), "memory": _tokens(), "memory_key_padding_mask": _padding()
            },
        ),
        make("Transformer", make=functools.partial(_transformer, **memory), inputs=both),
        make(
            "Transformer, sequence first",
            make=_transformer,
            inputs=lambda: {**both(False), "src_key_padding_mask": _padding()},
        ),
        make(
            "Transformer, norm first, training",
            make=functools.partial(_transformer, train=True, norm_first=True, **memory),
            inputs=both,
        ),
    ]  # fmt: skip
    mask = {"attn_mask": torch.ones(6, 6).triu(1).bool()}
    attentions = {
        "MultiheadAttention": _attention(),
        "MultiheadAttention, batch first": _attention({"need_weights": False}, batch_first=True),
        "MultiheadAttention, other widths": _attention(memory=10),
        "MultiheadAttention, extra keys": _attention(add_bias_kv=True, add_zero_attn=True),
        "MultiheadAttention, no bias": _attention(bias=False),
        "MultiheadAttention, mask": _attention(mask),
        "MultiheadAttention, weights of heads": _attention({"average_attn_weights": False}),
    }
    found += [make(name, make=m, inputs=i) for name, (m, i) in attentions.items()]
    x = {"inputs": lambda: {"x": _tokens()}}
    found += [
        make(
            "recurrent", make=lambda: Recurrent().eval(), inputs=lambda: {"x": torch.randn(3, 5, 8)}
        ),
        make("weights read", make=lambda: Reading().eval(), **x),
        make("layers shared", make=lambda: Twice().eval(), **x),
        make("layers skipped", make=lambda: Skipping().eval(), **x),
        make("outputs written", make=lambda: InPlace().eval(), **x),
        make("layouts", make=lambda: Layouts().eval(), **x),
    ]
    return found
