"""The weights of linear maps in a model: where they are, and why one cannot be adapted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ..layers import TProductMultiheadAttention
from ..linear import Adapted
from ..places import PROJECTIONS, Place, is_attention, is_conv1d, is_plain_linear

#: Modules with a matrix or more that are no linear maps of tokens.
_OTHER_KINDS = (
    nn.Embedding,
    nn.EmbeddingBag,
    nn.Bilinear,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.modules.conv._ConvNd,
)

_TRAINED = "trained directly (train_also)"


@dataclass(frozen=True)
class Weight:
    """One linear map: its name in a plan, the name and the module of its owner, its place there.

    The projections of an attention are owned by the attention, ``out_proj`` too: without the
    forward of the attention it is never called.
    """

    name: str
    owner: str
    module: nn.Module
    place: Place

    @property
    def tensor(self) -> Tensor:
        """``[out, in]``."""
        return self.place.weight

    def parameter_names(self) -> tuple[str, str]:
        """Dotted names of the parameters that hold the weight and, if there is one, the bias."""
        # The output projection of an attention is a module of its own below it.
        holder = self.name if self.place.projection is None else self.owner
        return f"{holder}.{self.place.parameter}", f"{holder}.{self.place.bias_parameter}"

    def stored(self) -> tuple[str, bool, int]:
        """Name of the parameter, whether it is stored (in, out), and the first of its rows."""
        return self.parameter_names()[0], self.place.transposed, self.place.first_row


def find_weights(model: nn.Module) -> dict[str, Weight]:
    """All linear maps of a model that a stack may take, or has taken, by name, as registered."""
    found: dict[str, Weight] = {}
    for name, module in model.named_modules():
        if not name or name in found:
            continue
        if is_attention(module) or isinstance(module, TProductMultiheadAttention):
            assert isinstance(module, nn.MultiheadAttention)
            for projection in PROJECTIONS:
                part = f"{name}.{projection}"
                found[part] = Weight(part, name, module, _place(module, projection))
            out = f"{name}.out_proj"
            found[out] = Weight(out, name, module, _place(module.out_proj, None))
        elif is_plain_linear(module) or is_conv1d(module) or isinstance(module, Adapted):
            found[name] = Weight(name, name, module, _place(module, None))
    return found


def _place(module: nn.Module, projection: str | None) -> Place:
    """The place of a weight: that in its stack, if the module is adapted."""
    adapted = module.tcur_places.get(projection) if isinstance(module, Adapted) else None
    return Place(module, projection=projection) if adapted is None else adapted


def reasons_to_leave_out(
    model: nn.Module, weights: Mapping[str, Weight], trained: set[str], loaded: bool = True
) -> dict[str, str]:
    """Modules and linear maps that no stack can take, with the reason."""
    owners: dict[int, dict[tuple[int, str], str]] = defaultdict(dict)
    for name, module in model.named_modules(remove_duplicate=False):
        for key, parameter in module._parameters.items():
            if parameter is not None:  # a module with several names owns its parameters once
                full = f"{name}.{key}" if name else key
                owners[id(parameter)].setdefault((id(module), key), full)
    reasons = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in weights:
            reasons[name] = f"{type(module).__name__} is not a plain nn.Linear"
        elif isinstance(module, nn.MultiheadAttention) and not is_attention(module):
            reasons[name] = f"{type(module).__name__} is not a plain nn.MultiheadAttention"
        elif isinstance(module, _OTHER_KINDS):
            direct = any(f"{name}.{key}" in trained for key, _ in module.named_parameters())
            reasons[name] = _TRAINED if direct else f"{type(module).__name__} is not a linear layer"
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, weight in weights.items():
        held, bias = weight.parameter_names()
        tied = owners[id(parameters[held])]
        if len(tied) > 1:
            reasons[name] = f"its weight is tied: {', '.join(tied.values())}"
        elif {held, bias} & trained:
            reasons[name] = _TRAINED
        elif not weight.tensor.dtype.is_floating_point:
            reasons[name] = f"its weight is {weight.tensor.dtype}"
        elif loaded and weight.tensor.is_meta:
            reasons[name] = "its weight is on the meta device: C and R are slices of loaded weights"
    return reasons


def aliases(model: nn.Module, module: nn.Module) -> list[str]:
    """All names that a module goes by in a model."""
    return [n for n, m in model.named_modules(remove_duplicate=False) if m is module]
