"""Adapted forms of the layers that keep their weights in another way than ``nn.Linear``.

Each takes the place of a module and has its parameters, attributes and state_dict; only the linear
maps inside go through a stack.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .kept import Stack
from .linear import TProductLinear
from .places import Place

_Module = TypeVar("_Module", bound=nn.Module)
_Linear = TypeVar("_Linear", bound=nn.Linear)


def twin(module: nn.Module, kind: type[_Module]) -> _Module:
    """A module of another type with the parameters, submodules and attributes of ``module``."""
    made = kind.__new__(kind)
    made.__dict__.update(module.__dict__)
    for held in ("_parameters", "_buffers", "_modules"):
        made.__dict__[held] = dict(module.__dict__[held])
    return made


class TProductConv1D(nn.Module):
    """GPT-2's ``Conv1D``, whose weight is stored (in, out), on slices of a stack."""

    place: Place
    stack: Stack
    base_class: type[nn.Module]

    @classmethod
    def from_conv1d(cls, conv1d: nn.Module, stack: Stack, place: Place) -> TProductConv1D:
        """The layer that takes the place of ``conv1d``; ``place`` then refers to it."""
        layer = twin(conv1d, cls)
        # Not registered as a submodule: the core must have one name and one owner.
        object.__setattr__(layer, "stack", stack)
        layer.place = Place(layer, place.slice_index, place.slices, transposed=True)
        layer.base_class = type(conv1d)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., in] -> [..., out], with the stack's update."""
        return self.stack.forward_slices(x, self.place)

    def extra_repr(self) -> str:
        """Sizes, and the place in the stack."""
        place = self.place
        return f"nf={place.out_features}, nx={place.in_features}, slice={place.slice_index}"


class TProductMultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with projections on slices of stacks.

    Made by `from_attention`. The in-projections run functionally, each on its slice, and the output
    projection is called as a module: nothing is merged. What depends on how torch groups products
    (the fused inference path, one product for q, k and v) differs from the base by rounding.
    """

    places: dict[str, tuple[Stack, Place]]

    @classmethod
    def from_attention(
        cls,
        attention: nn.MultiheadAttention,
        projections: Mapping[str, tuple[Stack, Place]],
        out_proj: TProductLinear | None,
    ) -> TProductMultiheadAttention:
        """The layer that takes the place of ``attention``; the places then refer to it."""
        layer = twin(attention, cls)
        layer.places = {}
        for name, (stack, place) in projections.items():
            own = Place(layer, place.slice_index, place.slices, name)
            layer.places[name] = (stack, own)
        if out_proj is not None:
            layer.out_proj = out_proj  # type: ignore[assignment]
        return layer

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention``; no nested tensors."""
        batched = query.dim() == 3
        q_in = self._batch_first(query, batched)
        # Inputs that are one tensor stay one: their projections share z.
        k_in = q_in if key is query else self._batch_first(key, batched)
        v_in = k_in if value is key else self._batch_first(value, batched)
        causal = is_causal and key_padding_mask is None and not need_weights
        if is_causal and attn_mask is None:
            raise RuntimeError("attn_mask: expected the causal mask with is_causal=True, got None")

        q = self._project("q_proj", q_in)
        k = self._project("k_proj", k_in)
        v = self._project("v_proj", v_in)
        mask = None if causal else self._mask(attn_mask, key_padding_mask, q)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.to(k.dtype).expand(len(k), 1, -1)], 1)
            v = torch.cat([v, self.bias_v.to(v.dtype).expand(len(v), 1, -1)], 1)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        if mask is not None:
            mask = F.pad(mask, (0, k.shape[2] - mask.shape[-1]))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1.0 / self.head_dim)) @ k.mT
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout)
            out = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _batch_first(self, x: Tensor, batched: bool) -> Tensor:
        """[N, L, E]."""
        if not batched:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _project(self, name: str, x: Tensor) -> Tensor:
        if name in self.places:
            stack, place = self.places[name]
            return stack.forward_slices(x, place)
        base = Place(self, projection=name)
        return F.linear(x, base.weight, base.bias)

    def _mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor
    ) -> Tensor | None:
        """What is added to the scores, broadcast to [N, heads, L, S], or None."""
        total: Tensor | None = None
        if attn_mask is not None:
            total = _additive(attn_mask, q.dtype)
            if total.dim() == 3:
                total = total.unflatten(0, (-1, self.num_heads))
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, q.dtype)
            padding = padding.reshape(-1, 1, 1, padding.shape[-1])
            total = padding if total is None else total + padding
        return total


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask that is added: -inf where a boolean one is True."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


def plain(module: nn.Module) -> nn.Module:
    """The module that an adapted layer stands for, with the parameters that the layer has now."""
    if isinstance(module, TProductConv1D):
        conv1d = twin(module, module.base_class)
        for name in ("place", "stack", "base_class"):
            del conv1d.__dict__[name]
        return conv1d
    if isinstance(module, TProductMultiheadAttention):
        attention = twin(module, nn.MultiheadAttention)
        del attention.__dict__["places"]
        if isinstance(module.out_proj, TProductLinear):
            attention.out_proj = _unadapted(module.out_proj, NonDynamicallyQuantizableLinear)
        return attention
    assert isinstance(module, TProductLinear)
    return _unadapted(module, nn.Linear)


def _unadapted(layer: TProductLinear, kind: type[_Linear]) -> _Linear:
    linear = kind(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight, linear.bias = layer.weight, layer.bias
    return linear.train(layer.training)
