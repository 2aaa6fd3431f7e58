"""The adapted ``nn.MultiheadAttention``; how modules are adapted in place and restored."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .convolution import ADAPTED
from .experts import adapted_experts, parameters_of_experts
from .linear import Adapted, adapted_class, base, effective
from .quantised_linear import quantised_class
from .rows import rows_of
from .weights import Place


class TProductMultiheadAttention(Adapted, nn.MultiheadAttention):
    """``nn.MultiheadAttention`` whose projections are slices of stacks.

    This is the same module object as before it was adapted; only its class has changed. Reading one
    of its weights gives W_eff. Its own forward and torch's fused paths therefore work unchanged.
    ``base_in_proj_weight`` and the like are the base weights.
    """

    in_proj_weight = effective("in_proj_weight")
    q_proj_weight = effective("q_proj_weight")
    k_proj_weight = effective("k_proj_weight")
    v_proj_weight = effective("v_proj_weight")
    base_in_proj_weight = base("in_proj_weight")
    base_q_proj_weight = base("q_proj_weight")
    base_k_proj_weight = base("k_proj_weight")
    base_v_proj_weight = base("v_proj_weight")

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
        """Like ``nn.MultiheadAttention.forward``, which reads the weights and so gets W_eff.

        In a batch of many adapters each row has its own W_eff. Every projection then goes through
        its stack.
        """
        if all(rows_of(place.stack) is None for place in self._every_place()):
            return super().forward(
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        batched = query.dim() == 3
        q_in = self._batch_first(query, batched)
        # If query, key and value are the same tensor, keep them so: their projections share z.
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
        """Reorders ``x`` to [N, L, E]."""
        if not batched:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _project(self, name: str, x: Tensor) -> Tensor:
        place = self.tcur_places.get(name)
        if place is not None:
            projected: Tensor = place.stack.forward_slices(x, place)
            return projected
        base = Place(self, projection=name)
        return F.linear(x, base.weight, base.bias)

    def _every_place(self) -> Iterator[Place]:
        yield from self.tcur_places.values()
        if isinstance(self.out_proj, Adapted):
            yield from self.out_proj.tcur_places.values()

    def _mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor
    ) -> Tensor | None:
        """The mask to add to the scores, broadcastable to [N, heads, L, S], or None."""
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
    """Turns a mask into one that is added to scores: a boolean True becomes -inf."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


def adapt_in_place(places: Sequence[Place]) -> None:
    """Turns the modules that hold these weights into adapted layers, as the same objects."""
    for place in places:
        module = place.module
        place.was_trained = place.stored.requires_grad
        if not isinstance(module, Adapted):
            plain = type(module)
            kind: type[Adapted]
            if place.quantiser is not None:
                kind = quantised_class(module)
                place.quantiser.prepare(module)
            elif place.layout == "experts":
                kind = adapted_experts(plain, parameters_of_experts(module))
            else:
                kind = TProductMultiheadAttention if place.projection else _adapted_class(module)
            module.__dict__["tcur_places"] = {}
            module.__dict__["__module__"] = nn.Linear.__module__  # torch.fx makes it one node
            module.__class__ = kind
            _rebind(module, plain)
        assert isinstance(module, Adapted)
        module.tcur_places[place.key] = place


def _adapted_class(module: nn.Module) -> type[Adapted]:
    return ADAPTED.get(type(module)) or adapted_class(module)


def put_back(module: Adapted) -> None:
    """Gives the layer back its original class; it keeps the weights that it holds now."""
    adapted = type(module)
    del module.__dict__["tcur_places"], module.__dict__["__module__"]
    # The last base class is the one that the module had before.
    module.__class__ = adapted.__bases__[-1]
    _rebind(module, adapted)


def _rebind(module: nn.Module, former: type[nn.Module]) -> None:
    """Points accelerate's hooks, which stored the former class's forward, to the present one."""
    found = module.__dict__.get("_old_forward")
    if getattr(found, "__func__", None) is former.forward:
        module._old_forward = type(module).forward.__get__(module)
