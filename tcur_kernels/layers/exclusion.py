"""Changes to what all threads share: never while another thread is inside the model.

A model computes layer by layer. If another adapter became active meanwhile, some layers would have
used the one and some the other. So a change is refused while another thread is inside a call of the
model, and a call that begins meanwhile waits at its first adapted layer until the change is done.

A backward reads the weights, too. torch checks that nobody wrote to them since the forward, but a
kernel that runs already would go on with half of each. So a backward of the model counts as a call.

Calls leave no trace of their own: whether a thread is inside one is read off its stack of Python
frames, when somebody wants to change something. A backward does not name its model. It is one of
this model if its thread ever called the model with gradients, or if it reaches a parameter of the
model.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager
from types import FrameType

import torch
from torch import Tensor, nn
from torch.autograd import graph

from ..processes import tell_of_forks

#: What runs a module, or goes through its parts for a checkpoint, and has it as ``self``.
_CALLS = tuple(
    function.__code__
    for function in (
        nn.Module._call_impl,
        nn.Module._wrapped_call_impl,
        nn.Module.state_dict,
        nn.Module.load_state_dict,
    )
)
#: What runs every backward; its ``t_outputs`` are what is differentiated.
_BACKWARD = graph._engine_run_backward.__code__


class Gate:
    """Lets one thread change what all threads share; those stacks that change together share it.

    Attributes:
        is_closed: whether a change is under way.
        differentiated_in: numbers of the threads that ever passed with gradients.
    """

    def __init__(self) -> None:
        self.is_closed = False
        self.differentiated_in: set[int] = set()
        self._lock = threading.RLock()
        self._owner = 0
        self._is_broken = False
        tell_of_forks(self)

    def __reduce__(self) -> tuple[type[Gate], tuple[()]]:
        return Gate, ()  # a copy of a model is another model

    def was_forked(self, is_child: bool) -> None:
        """In a child nobody ends a change that another thread had begun."""
        if is_child:
            self._is_broken = self.is_closed and self._owner != threading.get_ident()
            self._lock = threading.RLock()

    def let_through(self) -> None:
        """Waits until a change is done, unless it is this thread's own; called by every layer.

        Raises:
            RuntimeError: the process was forked meanwhile, so that nobody will end the change.
        """
        if self.is_closed:
            with self._lock:
                self._check_whole()
        if torch.is_grad_enabled():
            self.differentiated_in.add(threading.get_ident())

    def _check_whole(self) -> None:
        if self._is_broken:
            raise RuntimeError(
                "fork: expected a model that no other thread changes, got one in the middle of a "
                "change of its adapter, of which this process has a part; fork before, or spawn"
            )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Context in which no other thread changes anything; layers go on."""
        with self._lock:
            yield

    @contextmanager
    def closed(
        self, caller: str, model: nn.Module, adapted: Iterable[nn.Module], is_undone: bool = False
    ) -> Iterator[None]:
        """Context of a change, during which layers of other threads wait.

        Args:
            caller: what messages call the change.
            model: whose calls are looked for.
            adapted: its modules that are adapted.
            is_undone: whether this is the end of a change. It is then made in any case, and the
                error comes after that.

        Raises:
            RuntimeError: another thread is inside a call of a module that has adapted layers, or
                inside a backward of one. Nothing has changed then.
        """
        with self._lock:
            self._check_whole()
            before, self._owner = self.is_closed, threading.get_ident()
            self.is_closed = True
            refused = None
            try:
                try:
                    if not before:  # else this is part of a change, for which others wait
                        refuse_others_inside(caller, model, adapted, self.differentiated_in)
                except RuntimeError as error:
                    if not is_undone:
                        raise
                    refused = error
                yield
            finally:
                self.is_closed = before
        if refused is not None:
            raise refused


def refuse_others_inside(
    caller: str, model: nn.Module, adapted: Iterable[nn.Module], differentiated_in: Set[int]
) -> None:
    """Refuses to go on while another thread is inside a call of a module with adapted layers.

    A backward of the model is one, too; see `Gate.differentiated_in`.

    Raises:
        RuntimeError: one is; the message names the thread and the module.
    """
    here = threading.get_ident()
    others = {ident: frame for ident, frame in sys._current_frames().items() if ident != here}
    if not others:
        return
    numbers = {id(module) for module in adapted}
    around: dict[int, str] = {}
    names = dict(model.named_modules())
    for name, module in names.items():
        if id(module) in numbers:
            parts = name.split(".") if name else []
            for end in range(len(parts) + 1):
                part = ".".join(parts[:end])
                around[id(names[part])] = part
    threads = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, top in others.items():
        frame: FrameType | None = top
        while frame is not None:
            if frame.f_code in _CALLS:
                module = frame.f_locals.get("self")
                name = around.get(id(getattr(module, "_orig_mod", module)))
                if name is not None:
                    raise RuntimeError(
                        f"{caller}: expected no other thread inside the model, got thread "
                        f"{threads.get(ident, ident)!r} in {name or 'it'}; wait until its call has "
                        "ended, or give rows adapters by batch, which belongs to a thread"
                    )
            elif frame.f_code is _BACKWARD and (
                ident in differentiated_in
                or reaches(frame.f_locals.get("t_outputs", ()), model.parameters())
            ):
                raise RuntimeError(
                    f"{caller}: expected no other thread inside the model, got thread "
                    f"{threads.get(ident, ident)!r} in a backward; wait until that has ended"
                )
            frame = frame.f_back


def reaches(outputs: Iterable[Tensor | graph.GradientEdge], leaves: Iterable[Tensor]) -> bool:
    """Whether a backward from these outputs has gradients for one of these leaves."""
    wanted = {id(leaf) for leaf in leaves}
    if any(id(output) in wanted for output in outputs):
        return True
    nodes = [each.grad_fn if isinstance(each, Tensor) else each.node for each in outputs]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if id(getattr(node, "variable", None)) in wanted:
            return True
        seen.add(node)
        nodes += [before for before, _ in node.next_functions]
    return False
