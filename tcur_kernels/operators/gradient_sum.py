"""The gradient of a core, formed once by one node of autograd for all layers of its stack.

A layer hands its share to the node in one of two ways. By tokens it passes on its packed ∂Û. By
G = dyᵀx it writes G into a buffer of the whole stack, and the node transforms that buffer in one
pass. Projected layer by layer, each G would be multiplied by factors of all n3 frequencies, which
is n3 / 2 times the work.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import streams
from .contract import CoreGradDense, CoreOfPacked
from .core_gradient import add_over_tokens
from .factors import CURFactors
from .guards import kernels_alone


class Ending(NamedTuple):
    """What the node computes with: operators, and the factors, not rounded."""

    core_of_packed: torch._ops.OpOverload
    core_grad_dense: torch._ops.OpOverload
    factors: CURFactors


class Gathered:
    """G = dyᵀx of the layers of a stack, in one buffer ``[n3, n1, n2]`` per backward pass.

    Several passes may be under way, one within the other (reentrant checkpoints) or in several
    threads. Each has its own buffer, from its first layer until the node takes it.
    """

    __slots__ = ("_passes", "ending", "n3")

    def __init__(self, ending: Ending, n3: int) -> None:
        self.ending, self.n3 = ending, n3
        #: number of a pass -> the buffer, and the first and last row of every part written to it.
        self._passes: dict[int, tuple[Tensor, dict[int, int]]] = {}

    @property
    def is_empty(self) -> bool:
        """Whether no pass has left anything here, neither one under way nor one that failed."""
        return not self._passes

    def add(self, grad_y: Tensor, x: Tensor, slice_index: int) -> None:
        """Adds dyᵀx to the slices of a layer, in the backward pass that is under way."""
        number = torch._C._current_graph_task_id()
        entry = self._passes.get(number)
        if entry is None:
            entry = self._passes[number] = (self._new(), {})
        buffer, written = entry
        first = slice_index * (buffer.shape[0] // self.n3)
        last = first + grad_y.shape[-1]
        add_over_tokens(buffer[first:last], grad_y, x, is_first=first not in written)
        written[first] = last

    def _new(self) -> Tensor:
        factors = self.ending.factors
        return factors.horizontal_hat.new_empty(self.n3 * factors.n1, factors.n2)

    def take(self) -> Tensor | None:
        """The gradient of the core by what this pass has gathered, which is then forgotten."""
        entry = self._passes.pop(torch._C._current_graph_task_id(), None)
        if entry is None:
            return None
        buffer, written = entry
        row = 0
        for first, last in (*sorted(written.items()), (buffer.shape[0], buffer.shape[0])):
            buffer[row:first].zero_()  # of layers without a gradient
            row = last
        factors = self.ending.factors
        of_stack = CoreGradDense(
            grad=buffer.view(self.n3, factors.n1, factors.n2),
            lateral_hat=factors.lateral_hat,
            horizontal_hat=factors.horizontal_hat,
            panels=factors.panels(),
        )
        grad_core: Tensor = self.ending.core_grad_dense(*of_stack)
        return grad_core


class GradientSum:
    """One node that forms the gradient of a core from what all layers that share it hand on.

    The node adds up packed ∂Û, transforms the sum and scales it, once for all layers. It saves no
    tensors, so it serves any number of calls and backward passes. Every layer is connected to an
    output of its own. If a layer is called several times, autograd adds up the gradients that
    arrive at its output. A layer that goes by G passes nothing on. Its connection only makes the
    node wait for it.

    Args:
        core: [n3, r, r], a leaf.
        scale: alpha.
        ending: what the node computes with.
        where: the stream and the capture that it is made in. Autograd runs the node there.

    Attributes:
        addends: what `eager._Layer` takes for the core's gradient, by the first slice of a layer.
        gathered: G of the layers.
        is_done: whether a backward pass has run this node.
    """

    __slots__ = ("__weakref__", "addends", "core", "gathered", "is_done", "scale", "where")

    def __init__(self, core: Tensor, scale: float, ending: Ending, where: tuple[int, int]) -> None:
        self.core, self.scale, self.where = core, scale, where
        self.is_done = False
        self.gathered = Gathered(ending, core.shape[0])
        self.addends: tuple[Tensor, ...] = _apply_gradient_sum(
            core, scale, self.gathered, weakref.ref(self)
        )

    def is_for(self, core: Tensor, scale: float, ending: Ending, where: tuple[int, int]) -> bool:
        """Whether a layer that computes with these may join."""
        return (
            self.core is core
            and self.scale == scale
            and self.where == where
            and self.gathered.ending.factors is ending.factors
            # Left by a pass in another thread, or by one that failed: it goes when its graph goes.
            and (self.gathered.is_empty or torch._C._current_graph_task_id() != -1)
        )

    def gather(self, grad_y: Tensor, x: Tensor, slice_index: int) -> bool:
        """Adds dyᵀx of a layer; False if no pass of autograd's engine is under way."""
        node = self.addends[0].grad_fn
        if node is None or torch._C._current_graph_task_id() == -1:
            return False
        # A pass that does not reach the node, of the gradient of x alone, needs no G.
        if torch._C._will_engine_execute_node(node):
            self.gathered.add(grad_y, x, slice_index)
        return True


class Pending:
    """For a graph that reads weights and has no `GradientSum`: whether its backward has run."""

    __slots__ = ("__weakref__", "is_done")

    def __init__(self) -> None:
        self.is_done = False


class LatestSum:
    """Finds the `GradientSum` of a stack's latest graph, for the next layer.

    It holds weak references, so only the graphs keep a sum alive. If it held the sum itself, the
    sum would outlive its graph. It would then keep a core that has been exchanged, and the node
    that accumulates that core's gradient. Autograd runs that node on the stream on which it was
    made, and a later capture uses another stream.
    """

    __slots__ = ("_former", "_latest", "_reading")

    def __init__(self) -> None:
        self._former: list[weakref.ref[Any]] = []
        self.forget()

    def forget(self) -> None:
        """Makes the next layer begin a new sum."""
        self._latest: weakref.ref[GradientSum] | None = None
        self._reading: weakref.ref[Pending] | None = None

    def reading(self) -> Pending:
        """What a graph that reads a weight keeps."""
        pending = None if self._reading is None else self._reading()
        if pending is None:
            pending = Pending()
            self._reading = weakref.ref(pending)
        pending.is_done = False
        return pending

    def retire(self) -> None:
        """Notes that another core replaces this one, whose graphs may still wait for a backward."""
        every = (*self._former, self._latest, self._reading)
        self._former = [each for each in every if each is not None and each() is not None]
        self.forget()

    def is_former_pending(self) -> bool:
        """Whether a graph of a retired core still waits for its backward."""
        return any(map(_is_pending, self._former))

    def is_pending(self) -> bool:
        """Whether any graph of this stack still waits for its backward."""
        return any(map(_is_pending, (*self._former, self._latest, self._reading)))

    def of(self, core: Tensor, scale: float, ending: Ending, capture: int) -> GradientSum:
        """The sum for ``core``, a leaf that requires grad, on the current stream."""
        gradient_sum = None if self._latest is None else self._latest()
        how = (core, scale, ending, (streams.current(core.device), capture))
        if gradient_sum is None or not gradient_sum.is_for(*how):
            gradient_sum = GradientSum(*how)
            self._latest = weakref.ref(gradient_sum)
        gradient_sum.is_done = False
        return gradient_sum


def _is_pending(ref: weakref.ref[Any] | None) -> bool:
    gradient_sum = None if ref is None else ref()
    return gradient_sum is not None and not gradient_sum.is_done


class _GradientSum(torch.autograd.Function):
    """Returns one stand-in for the core per slice. Layers are connected to it but never read it."""

    @staticmethod
    def forward(
        ctx: Any,
        core: Tensor,
        scale: float,
        gathered: Gathered,
        whole: weakref.ref[GradientSum],
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.how = (gathered, scale)
        ctx.whole = whole
        return core.new_empty(()).expand(core.shape[0], *core.shape).unbind()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        if (whole := ctx.whole()) is not None:
            whole.is_done = True
        gathered, scale = ctx.how
        packed = [grad for grad in grads if grad is not None]
        # Neither, if all layers were differentiated by the operators.
        grad_core = None
        with kernels_alone():
            if packed:
                arguments = CoreOfPacked(torch.stack(packed), scale)
                grad_core = gathered.ending.core_of_packed(*arguments)
            if (by_dense := gathered.take()) is not None:
                by_dense.mul_(scale)
                grad_core = by_dense if grad_core is None else by_dense.add_(grad_core)
        return grad_core, None, None, None


_apply_gradient_sum = super(torch.autograd.Function, _GradientSum).apply
