"""Small models with quantised layers of bitsandbytes, torchao and HQQ, and of others by name.

The libraries are imported when the first layer is made. peft and transformers behave otherwise
where they are installed, and importing them warns. So `make test` puts them beside the others.
"""

import functools
import importlib
import sys
import warnings
from pathlib import Path

import torch
from torch import nn

#: Where `make test` installs the libraries.
APART = Path(sys.prefix) / "quantised"

WIDTH = 64


@functools.cache
def library(name):
    """A module of one of the libraries."""
    if APART.is_dir() and str(APART) not in sys.path:
        sys.path.append(str(APART))
    with warnings.catch_warnings():  # about torch.jit, docstrings, extensions for GPUs
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def bnb():
    return library("bitsandbytes")


def torchao():
    return library("torchao.quantization")


def bnb4(linear, quant_type="nf4", double=True):
    made = bnb().nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        compute_dtype=linear.weight.dtype,
        quant_type=quant_type,
        compress_statistics=double,
    )
    made.load_state_dict(linear.state_dict())
    made.to(linear.weight.dtype)
    made.support_avx512bf16_for_cpu = False  # it would round the weight once more
    return made.to("cpu")


def bnb8(linear):
    size = linear.in_features, linear.out_features, linear.bias is not None
    made = bnb().nn.Linear8bitLt(*size, has_fp16_weights=False)
    made.load_state_dict(linear.state_dict())
    return made.to(linear.weight.dtype).to("cpu")


def torchao8(linear):
    holder = nn.Sequential(linear.requires_grad_(False))
    torchao().quantize_(holder, torchao().Int8WeightOnlyConfig())
    return holder[0]


def torchao4(linear):
    holder = nn.Sequential(linear.requires_grad_(False))
    config = torchao().IntxWeightOnlyConfig(weight_dtype=torch.int4)
    torchao().quantize_(holder, config)
    return holder[0]


def hqq(linear):
    core, dtype = library("hqq.core.quantize"), linear.weight.dtype
    config = core.BaseQuantizeConfig(nbits=4, group_size=32)
    return core.HQQLinear(linear.requires_grad_(False), config, compute_dtype=dtype, device="cpu")


#: Name -> makes a quantised layer of an ``nn.Linear``.
QUANTISERS = {
    "bitsandbytes nf4": bnb4,
    "bitsandbytes int8": bnb8,
    "torchao Int8Tensor": torchao8,
    "torchao IntxUnpackedToInt8Tensor": torchao4,
    "HQQ 4 bits": hqq,
}


def quantised(model, name, keep=()):
    """The model with all its linear layers quantised, but for those of these names."""
    make = QUANTISERS[name]
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and path not in keep:
            owner, _, key = path.rpartition(".")
            setattr(model.get_submodule(owner), key, make(module))
    return model


class Attention(nn.Module):
    """Three projections of one input, which share z, and one of what they make."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v)


class Two(nn.Module):
    """Two attentions, one after the other."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Attention(), Attention()])

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def two(name, dtype=torch.float32, seed=0):
    """The model, always the same for a seed, with quantised layers."""
    torch.manual_seed(seed)
    return quantised(Two().to(dtype), name)


def dequantised(layer):
    """The weight of a layer that is not adapted, by the library's own function."""
    kind = type(layer).__name__
    if kind == "Linear4bit":
        return bnb().functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    if kind == "Linear8bitLt":
        scales = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
        return bnb().functional.int8_vectorwise_dequant(layer.weight.data, scales)
    return layer.dequantize() if kind == "HQQLinear" else layer.weight.dequantize()


def packed(model):
    """Copies of all tensors that the quantised weights consist of, by the names of their layers."""
    found = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("W_q", module._parameters.get("weight"))
        state = getattr(weight, "quant_state", None)
        parts = [weight] if state is None else [weight, state.absmax]
        if hasattr(weight, "__tensor_flatten__"):
            parts = [weight.qdata, weight.scale]
        if (weight is not None and not weight.is_floating_point()) or len(parts) > 1:
            found[name] = [part.detach().clone() for part in parts]
    return found


class Foreign(nn.Module):
    """Stands for a layer of a library that is not installed; `foreign` names its type."""

    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(8, 8, dtype=torch.int32))


def foreign(package, name):
    """A layer whose type says that it is of another package."""
    kind = type(name, (Foreign,), {"__module__": f"{package}.layers"})
    return kind()
