"""What a stack keeps from one call to the next, and what tells whether it still holds."""

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
from .base import version_of
from .weights import Place


class Effective:
    """W_eff of one state of the core, and what tells whether it is still that of the present one.

    On the CPU by value: writes through ``core.data`` leave the version as it was, the core is
    small, and nothing has to wait for a comparison. Elsewhere by version, and by what `Kept` hears
    of gradients and captures.

    Args:
        buffer: to be filled: the layers' weights one after the other, as each lies in memory. That
            is ``[n3, n1, n2]``; or transposed, ``[n3, n2, n1]``; or where a transposed weight has
            several slices side by side, flat.
        transposed: whether weights are stored (in, out).
    """

    def __init__(self, buffer: Tensor, transposed: bool) -> None:
        self.buffer, self.transposed = buffer, transposed
        self._views: dict[int, Tensor] = {}

    def filled(self, core: Tensor, capture: int) -> None:
        """To be said when the buffer was filled: of what, and in which capture (0: in none)."""
        device = core.device
        self.capture = capture
        is_by_value = device.type == "cpu" and not streams.are_used(device)
        #: The core may have been written since, without a trace.
        self.is_doubtful = False
        #: Nothing of it holds any more.
        self.is_void = False
        #: First slices of the layers that have used it.
        self.taken: set[int] = set()
        self._requires_grad = core.requires_grad
        self._value = core.detach().clone() if is_by_value else None
        self._core = TensorWeakRef(core)
        self._core_version = version_of(core)
        self._written = self.buffer._version
        self._mark = streams.mark(device) if streams.are_used(device) else None
        # The streams that use it: they know it is whole, and are waited for before it is not.
        self._users: dict[int, Any] = {}
        if self._mark is not None:
            self._users[streams.current(device)] = self._mark.stream

    def is_of(self, dtype: torch.dtype, core: Tensor) -> bool:
        """Whether this is W_eff of ``core`` in ``dtype``, as far as the core is concerned."""
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
        if core.requires_grad and not self._requires_grad:  # nobody listened for its gradient
            return False
        # No optimizer steps within a backward: a checkpoint's second forward takes what the first
        # one took.
        return not self.is_doubtful or is_within_backward()

    def w_eff(self, layers: Sequence[Place]) -> Tensor:
        """``[n3, n1, n2]`` of all layers; a copy where slices of one lie side by side."""
        if self.buffer.ndim == 3:
            return self.buffer.mT if self.transposed else self.buffer
        return torch.cat([self._part(each).unflatten(0, (each.slices, -1)) for each in layers])

    @property
    def is_by_value(self) -> bool:
        """Whether values of the core are compared."""
        return self._value is not None

    def _part(self, layer: Place) -> Tensor:
        out, in_ = layer.out_features, layer.in_features
        first = layer.slice_index * (out // layer.slices) * in_
        part = self.buffer.view(-1)[first : first + out * in_]
        return part.view(in_, out).T if self.transposed else part.view(out, in_)

    def view_of(self, layer: Place) -> Tensor:
        """The slices of one layer, ``[out_features, in_features]``, for the current stream.

        Its strides are those of the layer's weight.
        """
        view = self._views.get(layer.slice_index)
        if view is None:
            with torch.inference_mode(False):
                view = self._part(layer)
            self._views[layer.slice_index] = view
        if self._mark is not None:
            stream = streams.current(self.buffer.device)
            if stream not in self._users:
                self._users[stream] = streams.wait_for(self._mark, self.buffer)
        self.taken.add(layer.slice_index)
        return view

    def reclaim(
        self, dtype: torch.dtype, device: torch.device, transposed: bool, capture: int
    ) -> bool:
        """Whether the buffer can be filled anew: it fits, no pending backward holds a view of it.

        If so, the current stream waits for the others that have used it. Of another capture it
        waits for none: what graphs do, they do when they are replayed.
        """
        views = self._views.values()  # those who hold one in C++ have a count of their own in torch
        if (self.buffer.dtype, self.buffer.device, self.transposed) != (dtype, device, transposed):
            return False
        if views and (
            max(view._use_count() for view in views) > 1  # type: ignore[attr-defined]
            or max(map(sys.getrefcount, views)) > _ALONE
        ):
            return False
        # Views of the views, which readers of weights make: each tensor counts for its memory. The
        # buffer and the storage that is asked here are two.
        storage = self.buffer.untyped_storage()
        if torch._C._storage_Use_Count(storage._cdata) > len(self._views) + 2:
            return False
        if capture == self.capture:
            here = streams.current(device)
            for number, stream in self._users.items():
                if number != here:
                    streams.wait_for_stream(stream)
        return True


#: What `sys.getrefcount` says of a tensor that the dict of views alone refers to.
_ALONE = max(map(sys.getrefcount, {0: object()}.values()))


class Kept:
    """W_eff of one stack, so that it is built when the core has changed and not at each call.

    There are two: one for eager code, and one that is made anew within every captured graph that
    reads it, at each replay. Neither is ever taken for the other. A graph reads its buffer as long
    as there is a replay, so it lives as long as the stack; all captures share it, since each fills
    it before it reads.

    What may write the core without a trace, and what is done about it (on the CPU nothing, there
    values are compared):

    - Fused optimizers, those of old and foreign ones do not count versions. Before an optimizer
      steps there is a gradient: from then on W_eff is in doubt, and the next forward builds it.
    - An optimizer within a captured graph runs when the graph is replayed, which nobody is told.
      From the first capture on, a layer that meets the same W_eff a second time has it built.
    - Averages of weights are swapped in for an evaluation: ``train`` and ``eval`` raise doubt.
    """

    __slots__ = ("_captured", "_eager", "_handle", "_watched", "_worn", "has_graphs")

    def __init__(self) -> None:
        self._eager: Effective | None = None
        self._captured: Effective | None = None
        self._worn: list[Tensor] = []  # read by a captured graph, not written any more
        self._handle: RemovableHandle | None = None
        self._watched: TensorWeakRef | None = None
        #: Whether a captured graph may change the core.
        self.has_graphs = False

    def capture_of(self, device: torch.device) -> int:
        """The capture that is going on, 0 for none; to be asked in every forward."""
        capture = streams.capture_of(device)
        if capture:
            self.has_graphs = True
            if self._eager is not None:
                self._eager.is_doubtful = True
        return capture

    def doubt(self) -> None:
        """From now on the core may be written without a trace."""
        if self._eager is not None:
            self._eager.is_doubtful = True
        if self._captured is not None:
            self._captured.is_doubtful = True

    def invalidate(self) -> None:
        """W_eff is built before it is used again."""
        for built in (self._eager, self._captured):
            if built is not None:
                built.is_void = True

    def release(self) -> None:
        """Gives back what eager code reads; a captured graph may be replayed yet."""
        self._eager = None

    def forget(self) -> None:
        """Gives everything back: core and factors are in other memory, graphs read the old one."""
        self._eager = self._captured = None
        self._worn.clear()

    def find(
        self, dtype: torch.dtype, core: Tensor, layer: Place, capture: int
    ) -> Effective | None:
        """W_eff of the present core, as far as one layer is concerned, if it is there."""
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
        """A buffer of that shape, see `Effective`: the last one if free, else a new one."""
        last = self._captured if capture else self._eager
        if last is not None:
            if last.reclaim(dtype, device, transposed, capture):
                last.is_void = True
                return last
            if capture:
                self._worn.append(last.buffer)
            else:
                self._eager = last = None  # gives its memory back before more is asked for
        return Effective(torch.empty(shape, dtype=dtype, device=device), transposed)

    def put(self, built: Effective, core: Tensor, capture: int) -> None:
        """Keeps W_eff, whose buffer was just filled."""
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
    """z of the latest input, for the next layer that has the same one. Keeps neither alive.

    Threads may use it at a time: what is known of the latest is one object, read and put at once.
    """

    __slots__ = ("_latest", "held")

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """As if nothing had been projected yet."""
        self._latest: tuple[Any, ...] | None = None
        #: z itself, where no graph keeps it.
        self.held: Tensor | None = None

    def of(
        self, source: Tensor, x: Tensor, horizontal_hat: Tensor, capture: int, hold: bool
    ) -> Tensor:
        """z of ``x``, made of ``source``; layers that share their input (q, k, v) share it."""
        z = self.z_of(source, horizontal_hat, capture)
        if z is None:
            z = project(x, horizontal_hat)
            self.put(source, z, horizontal_hat, capture, hold)
        return z

    def put(self, x: Tensor, z: Tensor, horizontal_hat: Tensor, capture: int, hold: bool) -> None:
        """z of ``x`` by these packed factors; ``hold``: kept alive until the next one."""
        where = (version_of(x), capture, streams.current(z.device), z.requires_grad)
        self._latest = (TensorWeakRef(x), TensorWeakRef(z), horizontal_hat, where)
        self.held = z if hold else None

    def z_of(self, x: Tensor, horizontal_hat: Tensor, capture: int) -> Tensor | None:
        """z, if ``x`` is that very tensor, unchanged, and z is still around.

        On another stream or in another capture z is formed anew, which is less than to wait.
        """
        latest = self._latest
        if latest is None:
            return None
        latest_x, latest_z, latest_hat, where = latest
        if latest_x() is not x or latest_hat is not horizontal_hat:
            return None
        if x.is_inference():  # counts no versions: written to in place, it would look the same
            return None
        if where != (version_of(x), capture, streams.current(x.device), x.requires_grad):
            return None
        z: Tensor | None = latest_z()
        return z


def is_within_backward() -> bool:
    """Whether a backward is going on in this thread."""
    return torch._C._current_graph_task_id() != -1
