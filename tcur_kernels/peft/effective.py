"""The weight of an adapted layer as a tensor that is computed when its values are asked for.

Many models read ``layer.weight.dtype`` at every call, and some compute with ``layer.weight`` and
never call the layer. The former must cost nothing, the latter must see the adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

#: What is known without the values.
_METADATA = frozenset(
    getattr(torch.Tensor, name) if callable(getattr(torch.Tensor, name)) else
    getattr(torch.Tensor, name).__get__
    for name in (
        "__len__", "device", "dim", "dtype", "element_size", "get_device", "is_complex", "is_cpu",
        "is_cuda", "is_floating_point", "is_meta", "itemsize", "layout", "ndim", "ndimension",
        "nelement", "numel", "shape", "size",
    )
)  # fmt: skip


class EffectiveWeight(torch.Tensor):
    """W + alpha * C * U * R of one layer, computed anew by every operation that reads it.

    Args:
        base: the weight, of which this has shape, dtype and device.
        value: computes it, so that the gradient reaches the cores.
    """

    value: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, base: Tensor, value: Callable[[], Tensor]) -> EffectiveWeight:
        """A tensor without memory of its own."""
        made: EffectiveWeight = torch.Tensor._make_wrapper_subclass(
            cls, base.shape, strides=base.stride(), dtype=base.dtype, device=base.device
        )
        made.value = value
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Operations get the values; what asks for shape, dtype and the like does not."""
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)

        def computed(each: Any) -> Any:
            return each.value() if isinstance(each, cls) else each

        return func(*tree_map(computed, args), **tree_map(computed, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Past torch's functions the gradient would be lost: refused."""
        raise RuntimeError(
            f"weight: expected a function of torch to read the weight of an adapted layer, got "
            f"{func}; pass layer.weight.clone()"
        )
