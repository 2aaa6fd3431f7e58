"""The part of an adapter's handle that serves and trains many adapters in one batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..layers.rows import Per, Repeat
from ..layers.stack import TProductStack
from .batch import StackedCores, check_batch_first, check_finite
from .groups import GroupedCores
from .plan import Plan
from .store import AdapterStore
from .tenants import Tenants


class Serving(ABC):
    """The part of `Adapter` for batches; `Adapter` sets and documents the attributes."""

    model: nn.Module
    plan: Plan
    stacks: dict[str, TProductStack]
    train_also: tuple[str, ...]

    @property
    @abstractmethod
    def is_merged(self) -> bool:
        """Whether the layers' weights hold W_eff at present."""

    @abstractmethod
    def _cores(self, entry: str | Path | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The cores of an entry of `stack_cores`, by stack name."""

    @abstractmethod
    def _save_cores(
        self, cores: Mapping[str, Tensor], path: str | Path, metadata: dict[str, Any]
    ) -> None:
        """Writes cores that belong to no adapter of this model, as `Adapter.save` does."""

    def stack_cores(self, adapters: Sequence[str | Path | Mapping[str, Tensor]]) -> StackedCores:
        """Puts the cores of many adapters side by side for `batch`; they need not be added first.

        Args:
            adapters: each a name of an adapter of this model, a file (as ``Path``), or
                ``{stack name: core [n3, r, r]}``. The slices of a file may be some of those of this
                model (a smaller rank), and its alpha may be another: its cores are then written in
                the slices of this model.

        Raises:
            FileNotFoundError, TypeError, ValueError: an entry is wrong; the message says which and
                why. Also if the adapters train more than cores, since only cores can differ
                between rows.
        """
        self._check_cores_alone("stack_cores")
        for index, entry in enumerate(adapters):
            if isinstance(entry, Mapping):
                check_finite(f"adapters[{index}]", entry)
        return StackedCores.of(self.stacks, [self._cores(entry) for entry in adapters])

    def stack_groups(self, adapters: Sequence[str | Path | Mapping[str, Tensor]]) -> GroupedCores:
        """Like `stack_cores`, also for files of other slices, bases of cores or larger ranks.

        The files must be for the base and the layers of this model. Adapters of one choice of
        slices form a group, and each group of rows computes with C and R of its own. `batch` takes
        the result in place of stacked cores.

        Args:
            adapters: as for `stack_cores`. What `stack_cores` can take forms the first group.

        Raises:
            FileNotFoundError, TypeError, ValueError: as for `stack_cores`; the model is merged.
        """
        self._check_cores_alone("stack_groups")
        return GroupedCores.of(self.stacks, self.plan, adapters, self._cores)

    def store(
        self,
        slots: int | None = None,
        max_bytes: int | None = None,
        directory: str | Path | None = None,
    ) -> AdapterStore:
        """A store of many adapters for this model, which serves rows by their names.

        Args:
            slots: how many adapters can be on the device at the same time.
            max_bytes: in place of ``slots``: how much memory of the device they may take.
            directory: where a temporary file holds the cores that wait. By default they wait in
                memory.

        Raises:
            FileNotFoundError: there is no such directory.
            TypeError, ValueError: neither or both of ``slots`` and ``max_bytes`` are given, or they
                are too small; or the adapters train more than cores.
        """
        self._check_cores_alone("store")
        return AdapterStore(self.stacks, self._cores, self.batch, slots, max_bytes, directory)

    def tenants(self, capacity: int) -> Tenants:
        """Room for ``capacity`` adapters that are trained together, each by its own optimizer.

        Raises:
            TypeError, ValueError: ``capacity`` is not a positive int, or the adapters train more
                than cores.
        """
        self._check_cores_alone("tenants")
        return Tenants(self.stacks, self._cores, self.batch, self._save_cores, capacity)

    @contextmanager
    def batch(
        self,
        cores: StackedCores | GroupedCores,
        adapter_ids: Tensor,
        repeat: Repeat | None = None,
        per: Per = "row",
        cu_seqlens: Tensor | None = None,
    ) -> Iterator[None]:
        """Context in which each row of a batch uses its own adapter.

        All rows share the products with C and R; between them row b uses core ``adapter_ids[b]``.
        This affects only calls of the model in this thread or task.

        Args:
            cores: the result of `stack_cores` or `stack_groups`.
            adapter_ids: int64 ``[B]``, on the device of the cores, each the number of an adapter,
                or -1 for a row without one. The batch must be the first axis of every input of an
                adapted layer.
            repeat: how rows repeat if layers get k times as many rows as there are ids. "each": row
                by row, each k times (beams, windows of an image, a decoder beside its encoder).
                "all": the whole batch k times (classifier-free guidance). By default a layer
                refuses any other number of rows.
            per: "token": ids are ``[B, T]``, one for each token of inputs ``[B, T, features]``, or
                ``[T]`` for inputs ``[T, features]`` and ``[1, T, features]``. A layer refuses
                tokens in any other arrangement.
            cu_seqlens: int32 or int64 ``[S + 1]``, for S sequences that are packed in one row of
                cu_seqlens[-1] tokens: where each begins. There is then an id for each sequence.

        Raises:
            TypeError, ValueError: bad ids, ``repeat``, ``per`` or ``cu_seqlens``; the model is
                merged, or has an attention whose batch is not the first axis.
        """
        if self.is_merged:
            raise ValueError("batch: expected an unmerged adapter, got one that is merged")
        check_batch_first(self.model)
        ids, per = cores.check(self.stacks, adapter_ids, per, cu_seqlens, repeat)
        with cores.rows(self.stacks, ids, repeat, per):
            yield

    def _check_cores_alone(self, caller: str) -> None:
        if self.train_also:
            raise ValueError(
                f"{caller}: expected adapters of cores alone, got train_also = "
                f"{', '.join(self.train_also)}"
            )
