"""What a stack keeps from one call to the next, and how it knows that this is still valid."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import TensorWeakRef

from ..operators import streams
from ..operators.eager import project
from .weights import Place, version_of


class Effective:
    """W_eff for one state of the core; knows whether the core is still in that state.

    On the CPU the values of the core are compared. Writes through ``core.data`` do not change its
    version, but the core is small and no device has to be waited for. On other devices the version
    is compared, and `Kept` adds what it learns from gradients and captures.

    Args:
        buffer: memory to fill with the layers' weights one after the other, each laid out as it is
            stored. Its shape is ``[n3, n1, n2]``, or ``[n3, n2, n1]`` if transposed. If a
            transposed weight has several slices side by side, the buffer is flat.
        transposed: whether weights are stored (in, out).
    """

    def __init__(self, buffer: Tensor, transposed: bool) -> None:
        self.buffer, self.transposed = buffer, transposed
        self._views: dict[tuple[int, int], Tensor] = {}

    def filled(self, core: Tensor, capture: int) -> None:
        """Called when the buffer was filled, with its core and the capture (0: none)."""
        device = core.device
        self.capture = capture
        is_by_value = device.type == "cpu" and not streams.are_used(device)
        #: Whether the core may have been written since, without a trace.
        self.is_doubtful = False
        #: Whether the contents are no longer valid.
        self.is_void = False
        #: The first slice of each layer that has used it.
        self.taken: set[int] = set()
        self._requires_grad = core.requires_grad
        self._value = core.detach().clone() if is_by_value else None
        self._core = TensorWeakRef(core)
        self._core_version = version_of(core)
        self._written = self.buffer._version
        self._mark = streams.mark(device) if streams.are_used(device) else None
        # The streams that use the buffer. Each has waited until it was filled. All of them are
        # waited for before it is overwritten.
        self._users: dict[int, Any] = {}
        if self._mark is not None:
            self._users[streams.current(device)] = self._mark.stream

    def is_of(self, dtype: torch.dtype, core: Tensor) -> bool:
        """Whether this is W_eff of ``core`` in ``dtype``; the base is checked elsewhere."""
        if self.is_void or dtype != self.buffer.dtype:
            return False
        if self.buffer._version != self._written:
            raise RuntimeError(
                "weight: expected W_eff as it was built, got one that was written in place through "
                "a view of it; write to the base_weight of the layer"
            )
        if self._value is not None:
            return torch.equal(core, self._value)
        if version_of(core) != self._core_version or self._core() is not core:
            return False
        if core.requires_grad and not self._requires_grad:  # no hook has watched its gradient
            return False
        # No optimizer steps within a backward. The second forward of a checkpoint therefore uses
        # the same W_eff as the first.
        return not self.is_doubtful or is_within_backward()

    def w_eff(self, layers: Sequence[Place]) -> Tensor:
        """``[n3, n1, n2]`` of all layers; a copy if slices of one weight lie side by side."""
        if self.buffer.ndim == 3:
            return self.buffer.mT if self.transposed else self.buffer
        return torch.cat([self._part(each).unflatten(0, (each.slices, -1)) for each in layers])

    @property
    def is_by_value(self) -> bool:
        """Whether the values of the core are compared, not its version."""
        return self._value is not None

    def _part(self, layer: Place) -> Tensor:
        out, in_ = layer.out_features, layer.in_features
        first = layer.slice_index * (out // layer.slices) * in_
        part = self.buffer.view(-1)[first : first + out * in_]
        return part.view(in_, out).T if self.transposed else part.view(out, in_)

    def view_of(self, layer: Place) -> Tensor:
        """The slices of one layer, ``[out_features, in_features]``, for the current stream.

        The view has the strides of the layer's weight.
        """
        key = (layer.slice_index, layer.slices)  # the first expert begins where all experts do
        view = self._views.get(key)
        if view is None:
            view = self._views[key] = self._part(layer)
        if self._mark is not None:
            stream = streams.current(self.buffer.device)
            if stream not in self._users:
                self._users[stream] = streams.wait_for(self._mark, self.buffer)
        self.taken.add(layer.slice_index)
        return view

    def reclaim(
        self, dtype: torch.dtype, device: torch.device, transposed: bool, capture: int
    ) -> bool:
        """Whether the buffer can be filled again: it fits, and no pending backward holds a view.

        If so, the current stream waits for the other streams that have used it. It does not wait
        for streams of another capture, because captured work runs only when it is replayed.
        """
        views = self._views.values()  # torch counts references from C++, sys those from Python
        if (self.buffer.dtype, self.buffer.device, self.transposed) != (dtype, device, transposed):
            return False
        if views and (
            max(view._use_count() for view in views) > 1  # type: ignore[attr-defined]
            or max(map(sys.getrefcount, views)) > _ALONE
        ):
            return False
        # Readers of weights may have made views of the views. Every tensor counts as a user of the
        # storage. Besides our views, the buffer and the local ``storage`` make two.
        storage = self.buffer.untyped_storage()
        if torch._C._storage_Use_Count(storage._cdata) > len(self._views) + 2:
            return False
        if capture == self.capture:
            here = streams.current(device)
            for number, stream in self._users.items():
                if number != here:
                    streams.wait_for_stream(stream)
        return True


#: The `sys.getrefcount` of a tensor that only the dict of views refers to.
_ALONE = max(map(sys.getrefcount, {0: object()}.values()))


class Kept:
    """Keeps W_eff of one stack, so that it is built once per state of the core, not in each call.

    There are two. One is for eager code. The other is for captured graphs: every graph that reads
    it also rebuilds it, at each replay. The two are never mixed up. A graph may be replayed, and
    read its buffer, at any later time, so that buffer lives as long as the stack. All captures
    share it, because each fills it before reading.

    Some code writes the core without a trace. On the CPU this needs no care, because values are
    compared. On other devices:

    - Fused optimizers, old ones and third-party ones do not change the version counter. Every
      optimizer step follows a gradient. So a gradient puts W_eff in doubt, and the next forward
      rebuilds it.
    - An optimizer within a captured graph runs at each replay, which is not announced. From the
      first capture on, a layer that meets the same W_eff a second time has it rebuilt.
    - Averaged weights may be swapped in for an evaluation, so ``train`` and ``eval`` raise doubt.
    """

    __slots__ = ("_captured", "_eager", "_handle", "_watched", "_worn", "has_graphs")

    def __init__(self) -> None:
        self._eager: Effective | None = None
        self._captured: Effective | None = None
        self._worn: list[Tensor] = []  # captured graphs read these; new captures do not fill them
        self._handle: RemovableHandle | None = None
        self._watched: TensorWeakRef | None = None
        #: Whether a captured graph may change the core.
        self.has_graphs = False

    def capture_of(self, device: torch.device) -> int:
        """The capture in progress, 0 if none; must be asked in every forward."""
        capture = streams.capture_of(device)
        if capture:
            self.has_graphs = True
            if self._eager is not None:
                self._eager.is_doubtful = True
        return capture

    def doubt(self) -> None:
        """Notes that from now on the core may be written without a trace."""
        if self._eager is not None:
            self._eager.is_doubtful = True
        if self._captured is not None:
            self._captured.is_doubtful = True

    def invalidate(self) -> None:
        """Requests that W_eff be rebuilt before it is used again."""
        for built in (self._eager, self._captured):
            if built is not None:
                built.is_void = True

    def release(self) -> None:
        """Frees W_eff of eager code; that of captured graphs stays for their replays."""
        self._eager = None

    def forget(self) -> None:
        """Frees everything: core and factors have moved, so captured graphs are useless."""
        self._eager = self._captured = None
        self._worn.clear()

    def find(
        self, dtype: torch.dtype, core: Tensor, layer: Place, capture: int
    ) -> Effective | None:
        """W_eff of the present core, if one is kept that this layer may use."""
        built = self._captured if capture else self._eager
        if built is None or built.capture != capture:
            return None
        if self.has_graphs and layer.slice_index in built.taken and not is_within_backward():
            return None
        return built if built.is_of(dtype, core) else None

    def to_fill(
        self,
        dtype: torch.dtype,
        device: torch.device,
        shape: tuple[int, ...],
        transposed: bool,
        capture: int,
    ) -> Effective:
        """A buffer of that shape, see `Effective`: the last one if it is free, else a new one."""
        last = self._captured if capture else self._eager
        if last is not None:
            if last.reclaim(dtype, device, transposed, capture):
                last.is_void = True
                return last
            if capture:
                self._worn.append(last.buffer)
            else:
                self._eager = last = None  # frees its memory before more is allocated
        return Effective(torch.empty(shape, dtype=dtype, device=device), transposed)

    def put(self, built: Effective, core: Tensor, capture: int) -> None:
        """Stores W_eff, whose buffer was just filled."""
        built.filled(core, capture)
        if capture:
            self._captured = built
        else:
            self._eager = built
        if not built.is_by_value and core.requires_grad and core.is_leaf:
            self._watch(core)

    def _watch(self, core: Tensor) -> None:
        if self._watched is not None and self._watched() is core:
            return
        if self._handle is not None:
            self._handle.remove()
        self._handle = core.register_post_accumulate_grad_hook(self._has_gradient)
        self._watched = TensorWeakRef(core)

    def _has_gradient(self, core: Tensor) -> None:
        self.capture_of(core.device)
        self.doubt()


class Projected:
    """z of the latest input, for the next layer with the same input. Keeps neither alive.

    Several threads may use it at the same time. All facts about the latest input are therefore in
    one object, which is read and replaced as a whole.
    """

    __slots__ = ("_latest", "held")

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Forgets the latest input."""
        self._latest: tuple[Any, ...] | None = None
        #: z itself, if no graph keeps it alive.
        self.held: Tensor | None = None

    def of(
        self,
        source: Tensor,
        x: Tensor,
        horizontal_hat: Tensor,
        bf16_operands: bool,
        capture: int,
        hold: bool,
    ) -> Tensor:
        """z of ``x``, which was made from ``source``; layers with the same input share z."""
        z = self.z_of(source, horizontal_hat, capture)
        if z is None:
            z = project(x, horizontal_hat, bf16_operands)
            self.put(source, z, horizontal_hat, capture, hold)
        return z

    def put(self, x: Tensor, z: Tensor, horizontal_hat: Tensor, capture: int, hold: bool) -> None:
        """Stores z of ``x`` for these packed factors; ``hold`` keeps z alive until the next one."""
        where = (version_of(x), capture, streams.current(z.device), z.requires_grad)
        self._latest = (TensorWeakRef(x), TensorWeakRef(z), horizontal_hat, where)
        self.held = z if hold else None

    def z_of(self, x: Tensor, horizontal_hat: Tensor, capture: int) -> Tensor | None:
        """z, if ``x`` is the same tensor, unchanged, and z still exists; else None.

        Also None on another stream or in another capture: computing z again costs less than
        waiting.
        """
        latest = self._latest
        if latest is None:
            return None
        latest_x, latest_z, latest_hat, where = latest
        if latest_x() is not x or latest_hat is not horizontal_hat:
            return None
        if x.is_inference():  # has no version counter, so writes in place would go unnoticed
            return None
        if where != (version_of(x), capture, streams.current(x.device), x.requires_grad):
            return None
        z: Tensor | None = latest_z()
        return z


def is_within_backward() -> bool:
    """Whether a backward is running in this thread."""
    return torch._C._current_graph_task_id() != -1
