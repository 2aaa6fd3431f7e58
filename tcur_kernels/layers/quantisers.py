"""The quantised layers of other libraries: how they are known, and how their weights are read.

A library multiplies by its quantised weights itself, and it turns them back into numbers. There is
no quantiser here, and none is imported: types are known by their names, and what a library does is
asked of the module at hand.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .weights import held


class Quantiser(ABC):
    """How one library keeps the weight of a linear layer ``[out, in]``.

    Attributes:
        parameter: the name of the parameter that holds the packed weight.
        switched_off: switches of a layer that are turned off when it is adapted.
    """

    parameter = "weight"
    switched_off: tuple[str, ...] = ()

    @abstractmethod
    def is_of(self, module: nn.Module) -> bool:
        """Whether a module is a layer of this library."""

    @abstractmethod
    def kind(self, module: nn.Module) -> str:
        """The library and its format, such as "bitsandbytes nf4"."""

    @abstractmethod
    def why_not(self, module: nn.Module) -> str | None:
        """Why the weight cannot be turned back into numbers; None if it can."""

    @abstractmethod
    def shape(self, module: nn.Module) -> tuple[int, int]:
        """Rows and columns of the weight, ``[out, in]``."""

    @abstractmethod
    def dtype(self, module: nn.Module) -> torch.dtype:
        """The dtype of the numbers that `dequantised` returns."""

    @abstractmethod
    def dequantised(self, module: nn.Module) -> Tensor:
        """The weight as numbers ``[out, in]``, a new tensor, by the library's own function."""

    @abstractmethod
    def parts(self, module: nn.Module) -> list[Tensor]:
        """The plain tensors that hold the weight; the first one is on its device."""

    def prepare(self, module: nn.Module) -> None:
        """Called when the layer is adapted."""
        for name in self.switched_off:
            if hasattr(module, name):
                setattr(module, name, False)


class Bnb4Bit(Quantiser):
    """``bitsandbytes.nn.Linear4bit``."""

    # It repacks the weight in an evaluation on some CPUs. That rounds the scales, and the product
    # then has no gradient.
    switched_off = ("support_avx512bf16_for_cpu",)

    def is_of(self, module: nn.Module) -> bool:
        """Whether it is one, or one of its two variants."""
        return _is_named(
            module, "bitsandbytes.nn.modules", ("Linear4bit", "LinearFP4", "LinearNF4")
        )

    def kind(self, module: nn.Module) -> str:
        """ "bitsandbytes nf4" or "bitsandbytes fp4"."""
        return f"bitsandbytes {self._state(module).quant_type}"

    def why_not(self, module: nn.Module) -> str | None:
        """It may not be quantised yet, or may be repacked for inference on a CPU."""
        state = self._state(module)
        if state is None:
            return "its weight is not quantised yet: move the model to a device first"
        if getattr(state, "packing_format_for_cpu", False):
            return (
                "bitsandbytes repacked its weight with less precision, as it does when a layer "
                "is evaluated on a CPU that has AVX512-BF16: load the model again and adapt it "
                "before it runs"
            )
        if tuple(state.shape) != self.shape(module):
            return f"its weight was quantised as {list(state.shape)}, not as (out, in)"
        return None

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """As the layer says."""
        return _features(module)

    def dtype(self, module: nn.Module) -> torch.dtype:
        """The dtype that the weight had."""
        dtype: torch.dtype = self._state(module).dtype
        return dtype

    def dequantised(self, module: nn.Module) -> Tensor:
        """By ``dequantize_4bit``."""
        weight = held(module, "weight")
        numbers: Tensor = _bnb().dequantize_4bit(weight.data, self._state(module))
        return numbers

    def parts(self, module: nn.Module) -> list[Tensor]:
        """The packed weight, and the statistics of its blocks."""
        state = self._state(module)
        nested = [state.state2.absmax] if getattr(state, "nested", False) else []
        return [held(module, "weight"), state.absmax, *nested]

    def _state(self, module: Any) -> Any:
        # The weight loses its state when code makes a new parameter of it; the module keeps it.
        own = getattr(held(module, "weight"), "quant_state", None)
        return module.quant_state if own is None else own


class Bnb8Bit(Quantiser):
    """``bitsandbytes.nn.Linear8bitLt``."""

    def is_of(self, module: nn.Module) -> bool:
        """Whether it is one."""
        return _is_named(module, "bitsandbytes.nn.modules", ("Linear8bitLt",))

    def kind(self, module: nn.Module) -> str:
        """ "bitsandbytes int8"."""
        return "bitsandbytes int8"

    def why_not(self, module: nn.Module) -> str | None:
        """It may keep its weight in 16 bits, or not be quantised yet."""
        if module.state.has_fp16_weights:  # type: ignore[union-attr]
            return "it quantises its weight anew in every call (has_fp16_weights=True)"
        if held(module, "weight").dtype != torch.int8 or self._scales(module) is None:
            return "its weight is not quantised yet: move the model to a device first"
        return None

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """As the layer says."""
        return _features(module)

    def dtype(self, module: nn.Module) -> torch.dtype:
        """The library gives fp32."""
        return torch.float32

    def dequantised(self, module: nn.Module) -> Tensor:
        """By ``int8_vectorwise_dequant``."""
        weight = held(module, "weight")
        numbers: Tensor = _bnb().int8_vectorwise_dequant(weight.data, self._scales(module))
        return numbers

    def parts(self, module: nn.Module) -> list[Tensor]:
        """The integers, and the scales of their rows."""
        return [held(module, "weight"), self._scales(module)]

    def _scales(self, module: Any) -> Any:
        # They move from the weight to the state of the layer in its first call.
        own = getattr(held(module, "weight"), "SCB", None)
        return module.state.SCB if own is None else own


class Torchao(Quantiser):
    """An ``nn.Linear`` whose weight is a tensor class of torchao."""

    #: Classes of which a weight was dequantised already.
    _known: set[type] = set()  # noqa: RUF012

    def is_of(self, module: nn.Module) -> bool:
        """Whether it has such a weight."""
        weight = module._parameters.get("weight") if type(module) is nn.Linear else None
        return weight is not None and _package(type(weight)) == "torchao"

    def kind(self, module: nn.Module) -> str:
        """ "torchao" and the class of the weight."""
        return f"torchao {type(held(module, 'weight')).__name__}"

    def why_not(self, module: nn.Module) -> str | None:
        """Some classes cannot be dequantised."""
        weight = held(module, "weight")
        kind = type(weight)
        if kind in self._known:
            return None
        why = f"its weight is a {kind.__name__}, which torchao cannot turn back into numbers"
        if not hasattr(weight, "__tensor_flatten__"):
            return why
        try:
            numbers = self.dequantised(module)
        except (AttributeError, NotImplementedError):
            return why
        if numbers.shape != weight.shape:
            return why
        self._known.add(kind)
        return None

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """As the weight says."""
        rows, columns = held(module, "weight").shape
        return rows, columns

    def dtype(self, module: nn.Module) -> torch.dtype:
        """As the weight says."""
        dtype: torch.dtype = held(module, "weight").dtype
        return dtype

    def dequantised(self, module: nn.Module) -> Tensor:
        """By the weight's own ``dequantize``."""
        numbers: Tensor = held(module, "weight").dequantize()
        return numbers

    def parts(self, module: nn.Module) -> list[Tensor]:
        """The tensors that the weight is made of."""
        return parts_of(held(module, "weight"))


class Hqq(Quantiser):
    """``hqq.core.quantize.HQQLinear``."""

    parameter = "W_q"

    def is_of(self, module: nn.Module) -> bool:
        """Whether it is one."""
        return _is_named(module, "hqq.core.quantize", ("HQQLinear",))

    def kind(self, module: nn.Module) -> str:
        """ "HQQ" and the number of bits."""
        return f"HQQ {module.meta['nbits']} bits"  # type: ignore[index]

    def why_not(self, module: nn.Module) -> str | None:
        """It may not be quantised yet."""
        if held(module, "W_q") is None or not module.ready:
            return "its weight is not quantised yet"
        return None

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """As the layer says."""
        rows, columns = module.meta["shape"]  # type: ignore[index]
        return rows, columns

    def dtype(self, module: nn.Module) -> torch.dtype:
        """The dtype that the layer computes in."""
        dtype: torch.dtype = module.compute_dtype  # type: ignore[assignment]
        return dtype

    def dequantised(self, module: nn.Module) -> Tensor:
        """By the layer's own ``dequantize``."""
        numbers: Tensor = module.dequantize()  # type: ignore[operator]
        return numbers.to(self.dtype(module))

    def parts(self, module: Any) -> list[Tensor]:
        """The packed weight, and the tensors of its groups."""
        others = [each for each in module.meta.values() if isinstance(each, Tensor)]
        return [held(module, "W_q"), *others]


QUANTISERS: tuple[Quantiser, ...] = (Bnb4Bit(), Bnb8Bit(), Torchao(), Hqq())

#: Packages whose layers compute with weights that they do not turn back into numbers, or not by a
#: function that is known here.
_OTHERS = {
    "gptqmodel": "GPTQModel",
    "auto_gptq": "AutoGPTQ",
    "awq": "AutoAWQ",
    "aqlm": "AQLM",
    "eetq": "EETQ",
    "vptq": "VPTQ",
    "spqr_quant": "SpQR",
    "quark": "Quark",
    "compressed_tensors": "compressed-tensors",
    "neural_compressor": "Neural Compressor",
    "bitsandbytes": "bitsandbytes",
    "hqq": "HQQ",
}

#: Modules of transformers with such layers.
_OF_TRANSFORMERS = (
    "awq",
    "bitnet",
    "eetq",
    "fbgemm_fp8",
    "finegrained_fp8",
    "fp_quant",
    "higgs",
    "mxfp4",
    "quanto",
    "spqr",
    "vptq",
)


def quantiser_of(module: nn.Module) -> Quantiser | None:
    """The quantiser of a layer that is not adapted; None for any other module."""
    for quantiser in QUANTISERS:
        if quantiser.is_of(module):
            return quantiser
    return None


def why_packed(module: nn.Module) -> str | None:
    """Why the weight of a quantised layer cannot be read; None if it can, or if there is none."""
    quantiser = quantiser_of(module)
    if quantiser is not None:
        return quantiser.why_not(module)
    kind = type(module)
    package, where = _package(kind), kind.__module__.split(".")
    library = "Quanto" if where[:2] == ["optimum", "quanto"] else _OTHERS.get(package)
    if library is None and where[:2] == ["transformers", "integrations"]:
        library = where[2] if len(where) > 2 and where[2] in _OF_TRANSFORMERS else None
    own = [
        each
        for each in (*module._parameters.values(), *module._buffers.values())
        if each is not None
    ]
    if library is None or isinstance(module, nn.Embedding) or not own:
        return None
    return (
        f"{kind.__name__} of {library} has a quantised weight, which this package cannot turn back "
        "into numbers"
    )


def parts_of(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor of another class is made of; a plain one is its only part."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return [tensor]
    inner = [getattr(tensor, name) for name in flatten()[0]]
    return [part for each in inner if isinstance(each, Tensor) for part in parts_of(each)]


def _bnb() -> Any:
    """The functions of bitsandbytes, which is imported since one of its layers is at hand."""
    return sys.modules["bitsandbytes"].functional


def _features(module: Any) -> tuple[int, int]:
    return module.out_features, module.in_features


def _is_named(module: nn.Module, where: str, names: Sequence[str]) -> bool:
    kind = type(module)
    return kind.__module__ == where and kind.__name__ in names


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]
