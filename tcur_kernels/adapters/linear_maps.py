"""Finds the weights of linear maps in a model, and says why one cannot be adapted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from ..layers.attention import TProductMultiheadAttention
from ..layers.cores import Cores
from ..layers.experts import AdaptedExperts, is_of_experts, parameters_of_experts
from ..layers.linear import Adapted
from ..layers.quantised import Form, QuantisedPlace, form_of
from ..layers.quantisers import quantiser_of, why_packed
from ..layers.weights import (
    CONVOLUTIONS,
    PROJECTIONS,
    Place,
    is_attention,
    is_conv1d,
    is_convolution,
    is_plain_linear,
)
from ..matrices import Layout
from ..processes import is_sharded
from .holding import PREFIXES, HeldCores

#: Modules that hold matrices but are not linear maps of tokens.
_OTHER_KINDS = (
    nn.Embedding,
    nn.EmbeddingBag,
    nn.Bilinear,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.modules.conv._ConvNd,
)

#: Modules whose parameters only scale and shift, even if they have several axes.
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)

#: Modules whose parameters with three axes are no matrices of experts.
_KNOWN = (*_OTHER_KINDS, *_NORMS, nn.Linear, nn.MultiheadAttention)

#: The dtypes of weights that can form stacks.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

#: How many bare parameters of one module are named; further ones are only counted.
_NAMED = 3

#: The reason for what is trained itself.
TRAINED = "trained directly (train_also)"

#: Last components of the usual names of fused q, k, v projections. Only the name can tell: other
#: layers, too, may have three times as many outputs as inputs.
_FUSED_QKV = ("qkv", "qkv_proj", "Wqkv", "in_proj", "query_key_value", "c_attn")


@dataclass(frozen=True)
class Weight:
    """One linear map: its name in a plan, the name and the module of its owner, its place.

    An attention owns its projections. That includes ``out_proj``, which only the forward of the
    attention uses.
    """

    name: str
    owner: str
    module: nn.Module
    place: Place

    @property
    def tensor(self) -> Tensor:
        """The weight, ``[out, in]``; a quantised one is dequantised anew at each use."""
        return self.place.weight

    @property
    def form(self) -> Tensor | Form:
        """What a plan needs to know of the weight, without the numbers of a quantised one."""
        form: Tensor | Form = form_of(self.place)
        return form

    @property
    def is_only_named(self) -> bool:
        """Whether it is adapted only where ``targets`` name it, as convolutions are."""
        return self.place.layout == "convolution"

    @property
    def is_of_experts(self) -> bool:
        """Whether it is a parameter with a matrix for each expert, named like the parameter.

        Such a weight is adapted only if the targets name it.
        """
        return self.place.layout == "experts"

    def parameter_names(self) -> tuple[str, str]:
        """Dotted names of the parameters that hold the weight and, if there is one, the bias."""
        if self.is_of_experts:
            return self.name, self.name
        # The output projection of an attention is a submodule, so the parameter is below that.
        holder = self.name if self.place.projection is None else self.owner
        return f"{holder}.{self.place.parameter}", f"{holder}.{self.place.bias_parameter}"

    def stored(self) -> tuple[str, Layout, int]:
        """Name of the parameter, how it holds the matrix, and the first of its rows.

        Of a quantised weight it is the parameter that holds it in the model in full precision.
        """
        if self.place.quantiser is not None:
            return f"{self.name}.weight", "matrix", 0
        return self.parameter_names()[0], self.place.layout, self.place.first_row


def find_weights(model: nn.Module) -> dict[str, Weight]:
    """All linear maps of a model that can be or are in a stack, by name, in registration order."""
    found: dict[str, Weight] = {}
    for name, module in model.named_modules():
        if not name or name in found or why_unreadable(module) is not None:
            continue
        if quantiser_of(module) is not None:
            found[name] = Weight(name, name, module, QuantisedPlace(module))
            continue
        if is_attention(module) or isinstance(module, TProductMultiheadAttention):
            assert isinstance(module, nn.MultiheadAttention)
            for projection in PROJECTIONS:
                part = f"{name}.{projection}"
                found[part] = Weight(part, name, module, _place(module, projection))
            out = f"{name}.out_proj"
            found[out] = Weight(out, name, module, _place(module.out_proj, None))
        elif isinstance(module, AdaptedExperts):
            found |= _weights_of_experts(name, module)
        elif _has_one_weight(module) or isinstance(module, Adapted):
            found[name] = Weight(name, name, module, _place(module, None))
        elif not isinstance(module, _KNOWN):
            found |= _weights_of_experts(name, module)
    return found


def _has_one_weight(module: nn.Module) -> bool:
    return is_plain_linear(module) or is_conv1d(module) or is_convolution(module)


def find_places(model: nn.Module) -> dict[str, Place]:
    """Maps the name of each linear map to the place of its weight."""
    return {name: weight.place for name, weight in find_weights(model).items()}


def _place(module: nn.Module, projection: str | None) -> Place:
    """The place of a weight; if the module is adapted, the place in its stack."""
    adapted = module.tcur_places.get(projection) if isinstance(module, Adapted) else None
    return Place(module, projection=projection) if adapted is None else adapted


def holds_experts(module: nn.Module, name: str) -> bool:
    """Whether a parameter of a module has a matrix for each expert."""
    known = isinstance(module, _KNOWN) or is_conv1d(module)
    return not known and is_of_experts(module._parameters.get(name))


def _weights_of_experts(owner: str, module: nn.Module) -> dict[str, Weight]:
    if isinstance(module, Cores | HeldCores):
        return {}
    keys = [key for key in parameters_of_experts(module) if not key.startswith(PREFIXES)]
    names = {key: f"{owner}.{key}" for key in keys}
    return {n: Weight(n, owner, module, place_of_experts(module, k)) for k, n in names.items()}


def place_of_experts(module: nn.Module, name: str) -> Place:
    """The place of a parameter ``[experts, n1, n2]``; if it is adapted, that in its stack."""
    places = module.tcur_places if isinstance(module, AdaptedExperts) else {}
    made = Place(module, layout="experts", own=name)
    made.slices = made.stored.shape[0]
    return places.get(made.key, made)


def why_unreadable(module: nn.Module) -> str | None:
    """Why the weights of a layer or an attention cannot be used; None if they can.

    The weights may be computed from other parameters (``torch.nn.utils.prune``, the hooks of
    ``weight_norm``, FSDP1), or may have no shape yet. For any other module the result is None.
    """
    if quantiser_of(module) is not None:
        return why_packed(module)
    if _has_one_weight(module):
        return why_computed(module)
    if not is_attention(module):
        return None
    # If in_proj_weight is None, the projections are three weights.
    fused = module._parameters.get("in_proj_weight", module) is not None
    names = ("in_proj_weight",) if fused else tuple(f"{p}_weight" for p in PROJECTIONS)
    why = why_computed(module, (*names, "in_proj_bias"))
    if why is None:
        out: nn.Module = module.out_proj  # type: ignore[assignment]
        why = _parametrised(out) or why_computed(out)
        why = why and f"out_proj: {why}"
    return why


def why_computed(module: nn.Module, names: Sequence[str] = ("weight", "bias")) -> str | None:
    """Why these names of a module are not all parameters with a shape; None if they are."""
    for name in names:
        if name not in module._parameters:
            made = [key for key in module._parameters if key.startswith(f"{name}_")]
            origin = f", computed from {' and '.join(made)}" if made else ""
            return f"its {name} is no parameter{origin}"
        if isinstance(module._parameters[name], UninitializedParameter):
            return f"its {name} is not initialised yet: run a batch through the model first"
    return None


def _parametrised(module: nn.Module) -> str | None:
    """The reason to leave out a module that torch.nn.utils.parametrize changed; else None."""
    if not parametrize.is_parametrized(module):
        return None
    parts = [
        f"{name} by {' and '.join(type(part).__name__ for part in chain)}"
        for name, chain in module.parametrizations.items()  # type: ignore[union-attr, operator]
    ]
    return f"parametrised: its {', '.join(parts)} is no parameter"


def reasons_to_leave_out(
    model: nn.Module, weights: Mapping[str, Weight], trained: set[str], loaded: bool = True
) -> dict[str, str]:
    """Modules, linear maps and bare matrices that no stack can take, each with the reason."""
    owners: dict[int, dict[tuple[int, str], str]] = defaultdict(dict)
    for name, module in model.named_modules(remove_duplicate=False):
        for key, parameter in module._parameters.items():
            if parameter is not None:  # a module with several names owns its parameters once
                full = f"{name}.{key}" if name else key
                owners[id(parameter)].setdefault((id(module), key), full)
    maps = [weight for weight in weights.values() if not weight.is_of_experts]
    seen = {id(part) for weight in maps for part in weight.module.modules()}
    reasons = {}
    for name, module in model.named_modules():
        if not name or id(module) in seen:
            continue
        why = _of_module(name, module, trained)
        if why is not None:  # its submodules are covered by the same reason
            reasons[name] = why
            seen |= {id(part) for part in module.modules()}
    reasons |= _bare_matrices(model, seen, trained)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, weight in weights.items():
        held, bias = weight.parameter_names()
        tied = owners[id(parameters[held])]
        if len(tied) > 1:
            reasons[name] = f"its weight is tied: {', '.join(tied.values())}"
        elif {held, bias} & trained:
            reasons[name] = TRAINED
        elif why := _of_weight(weight, parameters[held]) or _of_parameter(
            "bias", parameters.get(bias)
        ):
            reasons[name] = why
        elif loaded and weight.place.base.is_meta:
            reasons[name] = "its weight is on the meta device: C and R are slices of loaded weights"
    return reasons


def _of_module(name: str, module: nn.Module, trained: set[str]) -> str | None:
    """Why a module that `find_weights` does not find is left out."""
    kind = type(module).__name__
    if why := why_packed(module):
        return why
    if isinstance(module, nn.LazyLinear):
        return why_computed(module, ("weight",))
    if isinstance(module, _OTHER_KINDS):
        direct = any(f"{name}.{key}" in trained for key, _ in module.named_parameters())
        return TRAINED if direct else _of_convolution(module) or f"{kind} is not a linear layer"
    if isinstance(module, nn.Linear | nn.MultiheadAttention):
        plain = "nn.Linear" if isinstance(module, nn.Linear) else "nn.MultiheadAttention"
        why = why_unreadable(module) or _parametrised(module)
        return why or f"{kind} is not a plain {plain}"
    return why_unreadable(module)


def _of_convolution(module: nn.Module) -> str | None:
    """What keeps a convolution from being adapted, whether targets name it or not; else None."""
    if not isinstance(module, CONVOLUTIONS):
        return None
    if isinstance(module, LazyModuleMixin):
        return why_computed(module, ("weight",))
    why = why_unreadable(module) or _parametrised(module)
    is_plain = is_convolution(module)
    return why or (None if is_plain else f"{type(module).__name__} is not a plain convolution")


def _of_weight(weight: Weight, parameter: Tensor) -> str | None:
    """Why a stack cannot contain the weight that this parameter holds; None if it can."""
    if weight.place.quantiser is None:
        return _of_parameter("weight", parameter)
    return "its weight is sharded: adapt first" if is_sharded(weight.place.base) else None


def _of_parameter(name: str, parameter: Tensor | None) -> str | None:
    """Why a stack cannot contain this parameter; None if it can."""
    if parameter is None:
        return None
    if is_sharded(parameter):
        return f"its {name} is sharded: adapt first, then fully_shard"
    if type(parameter) not in (nn.Parameter, Tensor):
        return f"its {name} is a {type(parameter).__name__}, no plain tensor"
    if parameter.layout != torch.strided:
        return f"its {name} is {parameter.layout}"
    if parameter.dtype not in _DTYPES:
        return f"its {name} is {parameter.dtype}"
    if parameter.numel() == 0:
        return f"its {name} has no elements: {list(parameter.shape)}"
    return None


def _bare_matrices(model: nn.Module, seen: set[int], trained: set[str]) -> dict[str, str]:
    """Modules that hold matrices as their own parameters (experts, position embeddings).

    An entry has the name of the module; a matrix of the model itself has its own name. A vector is
    not a matrix, even if it has more axes of length one. ``seen`` has the ids of modules that are
    dealt with already.
    """
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if id(module) in seen or isinstance(module, _NORMS):
            continue
        bare = {
            f"{name}.{key}" if name else key: f"{key} {list(parameter.shape)}"
            for key, parameter in module._parameters.items()
            if parameter is not None and _is_matrix(parameter)
        }
        left = {full: what for full, what in bare.items() if full not in trained}
        if not name:
            kind = type(module).__name__
            found |= dict.fromkeys(left, f"a bare parameter of {kind}, not a linear layer")
            found |= dict.fromkeys(bare.keys() - left.keys(), TRAINED)
        elif left:
            listed = list(left.values())
            more = f" and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
            what = "bare parameters, not as linear layers"
            if len(listed) == 1:
                what = "a bare parameter, not as a linear layer"
            found[name] = (
                f"{type(module).__name__} holds {', '.join(listed[:_NAMED])}{more} as {what}"
            )
            if not isinstance(module, _KNOWN) and any(
                is_of_experts(module._parameters[full.rpartition(".")[2]]) for full in left
            ):
                found[name] += "; parameters [experts, n1, n2] are adapted if the targets name them"
        elif bare:
            found[name] = TRAINED
    return found


def _is_matrix(parameter: Tensor) -> bool:
    if isinstance(parameter, UninitializedParameter):
        return False
    return parameter.is_floating_point() and sum(size > 1 for size in parameter.shape) > 1


def aliases(model: nn.Module, module: nn.Module) -> list[str]:
    """All names of a module in a model."""
    return [n for n, m in model.named_modules(remove_duplicate=False) if m is module]


def is_fused(name: str) -> bool:
    """Whether a linear map has a usual name of a fused q, k, v projection."""
    return name.rpartition(".")[2] in _FUSED_QKV
