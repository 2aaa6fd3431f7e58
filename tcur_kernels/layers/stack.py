"""The stack: equally shaped weights with one trained core, which their layers compute through."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..autocast import is_autocast
from ..decompose import MAX_WORKSPACE, Selection, Stack, as_stack, check_rank, select_slices
from ..operators import cost, streams
from ..operators.checks import check_cores
from ..operators.dispatch import check_precision
from ..operators.eager import (
    BY_FACTORS,
    BY_W_EFF,
    Call,
    LatestSum,
    Pending,
    is_traced,
    run_layer,
    without_autocast,
)
from ..operators.factors import CURFactors, Precision
from ..operators.functional import cur_linear, materialize, prepare, slice_update
from ..processes import ReentrantGuard, whole
from .base import Base, check_one_base, is_here
from .cores import Cores
from .linear import check_weights, places_of
from .reading import effective_weight
from .rows import Repeat, Rows, check_repeat, rows_of, using_rows
from .switching import ForwardCore, warn_of_unused
from .w_eff import Effective, Kept, Projected
from .weights import Place


class TProductStack(Cores):
    """All slices of one shape: owns the trained core, the frozen factors and W_eff.

    The weights stay with their layers; the stack refers to them, never copies or changes them
    (`merge` apart). With l the position of a layer's weight in the stack, the layer computes with
    ``W_l + alpha * (C * U * R)_l``; the core U starts at zero.

    Args:
        linears: layers in the order of their slices, which matters: the t-product is a circular
            convolution along it. Same in_features, dtype and device; their weights must not
            require grad. A layer whose out_features is a multiple m of the smallest one takes m
            consecutive slices (a fused q, k, v projection takes three). Or places of weights in
            modules that are adapted in place, see `places.Place` and `layers.adapt_in_place`.
        rank: r, 1 to min(n1, n2).
        alpha: scale of the update.
        selection: rule for the slices, see `tensor_cur`.
        mode: "auto" (see `cost`), "materialized" or "factored".
        generator: for rules that draw.
        n1: rows of a slice, default the smallest out_features.
        precision: of the products of tokens with the factors: "ieee", or "bf16" for operands
            rounded to bf16 (a gradient error of about 4e-3). Under autocast to bf16 it is "bf16".
        factors: C and R where they are not to be slices of these weights (a base in another dtype);
            the selection then only says which slices they were.
        source: where the weights are read to choose slices, C and R, for layers on the meta device;
            default the layers themselves.
        max_workspace, progress: of that reading, see `tensor_cur`.
        name: of the stack, for messages.

    Attributes:
        core: Parameter ``[n3, r, r]``, fp32 (fp64 for fp64 weights), whatever dtype the model is
            cast to. Of several cores (`add_core`) the active one; the others are frozen.
        layers: the modules that hold the weights; of layers given as ``linears``, `TProductLinear`
            layers that share their parameters.
        places: where the weights are, in the order of their slices.
        is_unsettled: whether a checkpoint brought what was not looked at yet.
        base: C and R, and whether they are of the weights that are there now.
        rows, columns: the chosen indices I and J.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        linears: Sequence[nn.Linear] | Sequence[Place],
        rank: int = 8,
        alpha: float = 1.0,
        selection: Selection = "norm",
        mode: str = "auto",
        generator: torch.Generator | None = None,
        n1: int | None = None,
        precision: str = "ieee",
        factors: CURFactors | None = None,
        source: Stack | None = None,
        max_workspace: int = MAX_WORKSPACE,
        progress: bool = False,
        name: str = "",
    ) -> None:
        super().__init__()
        self.mode = cost.check_mode(mode)
        places: list[Place] = []
        for each in linears:
            if not isinstance(each, Place):
                places = places_of(linears, n1)  # type: ignore[arg-type]
                break
            places.append(each)
        if not places:
            raise ValueError("linears: expected at least one nn.Linear, got none")
        check_weights(places)
        self.name, self.places = name, places
        self.n1, self.n2 = places[0].out_features // places[0].slices, places[0].in_features
        self.n3 = sum(place.slices for place in places)
        self.rank, self.alpha = rank, float(alpha)
        check_rank("rank", rank, self.n1, self.n2)
        if not torch.isfinite(torch.tensor(self.alpha)):
            raise ValueError(f"alpha: expected a finite number, got {alpha}")

        if source is None:
            weights = [place.weight.detach() for place in places]
            source = as_stack("linears", weights, max_workspace, progress, self.n1)
        self.precision = check_precision(precision, source.device)
        chosen = select_slices(source, rank, selection, generator)
        source.check_finite()
        is_own = factors is None
        if factors is None:
            factors = CURFactors(source.columns(chosen[1]), source.rows(chosen[0]))
        sizes = (self.n3, self.n1, self.n2, rank)
        if (factors.n3, factors.n1, factors.n2, factors.rank) != sizes:
            raise ValueError(
                f"factors: expected n3, n1, n2, rank {', '.join(map(str, sizes))}, got {factors}"
            )
        indices = (chosen[0].tolist(), chosen[1].tolist())
        self.base = Base(name, places, indices, factors.to(source.device), is_own)
        core = torch.zeros(self.n3, rank, rank, dtype=factors.dtype, device=source.device)
        self.register_parameter("core", nn.Parameter(core))

        self.enabled = True
        self._guard = ReentrantGuard()
        self._is_looked_over = self.is_unsettled = False
        self._reset()
        for place in places:
            place.stack = self
            place.remember()

    def _reset(self) -> None:
        """Nothing is kept yet, for the factors that there are now."""
        self._lock = threading.RLock()
        self._kept = Kept()
        self._calls: dict[tuple[int, str, torch.dtype], Call] = {}
        self._projected = Projected()
        self._gradient_sum = LatestSum()
        self._generation = self.base.generation
        self._forward_core = ForwardCore()

    # -- C, R and the base

    @property
    def layers(self) -> list[nn.Module]:
        """The modules that hold the weights, in the order of their slices."""
        return list(dict.fromkeys(place.module for place in self.places))

    @property
    def factors(self) -> CURFactors:
        """The frozen C and R, of the base weights that are there now."""
        if not torch.compiler.is_compiling():
            self._look()
        return self.base.factors

    @property
    def lateral(self) -> Tensor:
        """C ``[n3, n1, r]``."""
        return self.factors.lateral

    @property
    def horizontal(self) -> Tensor:
        """R ``[n3, r, n2]``."""
        return self.factors.horizontal

    @property
    def rows(self) -> tuple[int, ...]:
        """The indices I of the rows that R is made of."""
        return self.base.rows

    @property
    def columns(self) -> tuple[int, ...]:
        """The indices J of the columns that C is made of."""
        return self.base.columns

    def _look(self) -> None:
        """Takes C and R anew if the base weights changed; what was made of the old ones goes."""
        with self._lock:
            # A comparison would wait for the device, which a capture does not allow.
            if not self.base.is_known and not streams.capture_of(self.base.factors.device):
                indices = self.holder._buffers.get(f"{self._key}__indices")
                if indices is not None and not indices.is_meta:
                    self.base.choose(*indices.tolist())
                self.base.look()
            self._forget_former()

    def certify(self) -> None:
        """Refuses C and R that are not of the base, for code that vouches for them; see `Base`."""
        self._look()
        self.base.certify()

    def _forget_former(self) -> None:
        if self._generation != self.base.generation:
            self._generation = self.base.generation
            self._kept.invalidate()
            self._projected.forget()
            self._calls.clear()

    def activate_core(self, name: str, former: str) -> None:
        """As of `Cores`; graphs of the former core may wait for their backward."""
        super().activate_core(name, former)
        self._gradient_sum.retire()

    def doubt(self) -> None:
        """From now on the core may have been written unseen."""
        self._kept.doubt()

    def was_misused(self, place: Place) -> None:
        """To be said when W_eff was written through a view of what a read of a weight gave."""
        self._kept.invalidate()
        self.base.misuse = (
            f"weight: expected a view of W_eff that is not written to, got a write in place to a "
            f"part of the weight of {place.name or 'a layer'}, which would be lost; write to its "
            "base_weight"
        )
        self.base.suspect()

    def loaded(self, place: Place) -> None:
        """To be said when a checkpoint brought the base weight of a place."""
        self.base.suspect(place)
        self._kept.invalidate()
        self.is_unsettled = True

    def settle(self) -> None:
        """Takes in what a checkpoint brought: C and R of the new base, and W_eff where merged."""
        self._look()
        if self.is_unsettled and self.is_merged:
            self._write_w_eff()
        self.is_unsettled = False

    @property
    def is_merged(self) -> bool:
        """Whether the layers' weights hold W_eff now."""
        return self.places[0].backup is not None

    def each_base_slice(self) -> Iterator[Tensor]:
        """The n3 base slices ``[n1, n2]``; sharded weights are gathered one at a time."""
        for place in self.places:
            yield from whole(place.weight.detach()).split(self.n1)

    def effective(self, dtype: torch.dtype) -> Tensor:
        """W_eff ``[n3, n1, n2]`` for the present core, rebuilt only when it changed.

        The buffer is reused from version to version: fresh memory costs more in page faults than
        the kernel. While a graph still holds a view of it for its backward, the next version goes
        to a new buffer instead. Where a weight that is stored (in, out) has several slices, they
        lie side by side, and this is a copy.
        """
        with self._lock:
            return self._built(dtype).w_eff(self.places)

    def update(self, place: Place) -> Tensor:
        """What the core adds to one place, ``[out, in]``, at least fp32; differentiable."""
        factors = self.factors
        core = self.core.to(factors.dtype)
        return slice_update(factors, core, place.slice_index, place.slices, self.alpha)

    def effective_value(self, place: Place) -> Tensor:
        """W_eff of one place as numbers: those that are kept, where layers run by W_eff."""
        weight = place.weight
        with self._lock, torch.no_grad():
            self._look()
            tokens = int(cost.tokens_worth_materializing(*self._sizes)) + 1
            capture = self._kept.capture_of(self.core.device)
            built = self._effective_for(self.core, place, weight, weight.dtype, tokens, capture)
            return effective_weight(place) if built is None else built.view_of(place)

    def reading(self) -> Pending:
        """For a weight that is read for a graph: what that graph is to keep, and to mark."""
        self._check_checkpoints(0)
        return self._gradient_sum.reading()

    def _check_checkpoints(self, batch: int) -> None:
        """Refuses what activation checkpointing would do wrong without a word."""
        self._guard.check()
        self._forward_core.check((self.activations, batch), self._gradient_sum)

    def gradient_came(self) -> None:
        """The core may be written from now on. A first step has run all layers that ever run."""
        self._kept.doubt()
        if not self._is_looked_over:
            self._is_looked_over = True
            warn_of_unused("backward", self.unused())

    def unused(self) -> list[str]:
        """Names of the layers that were neither called nor read since they were adapted."""
        return [place.name for place in self.places if place.name and not place.ran]

    @property
    def _sizes(self) -> tuple[int, int, int, int]:
        return self.n1, self.n2, self.n3, self.rank

    def _built(self, dtype: torch.dtype) -> Effective:
        self._look()
        capture = self._kept.capture_of(self.core.device)
        for place in self.places:
            built = self._kept.find(dtype, self.core, place, capture)
            if built is None or self._kept.has_graphs:  # no pass, of which each layer counts one
                return self._build(dtype, capture)
        assert built is not None
        return built

    @torch.inference_mode(False)  # what is kept must also serve a training step
    @torch.no_grad()
    def _build(self, dtype: torch.dtype, capture: int) -> Effective:
        core, factors, (n3, n1, n2) = self.core, self.base.factors, (self.n3, self.n1, self.n2)
        wide = core.to(factors.dtype)
        base = [place.weight for place in self.places]
        # Stored (in, out), as by Conv1D: (C * U * R)ᵀ slice by slice is Rᵀ * Uᵀ * Cᵀ, and no weight
        # has to be copied for the kernels. Slices of one weight lie side by side then.
        transposed = all(each.mT.is_contiguous() and not each.is_contiguous() for each in base)
        shape: tuple[int, ...] = (n3, n1, n2)
        if transposed:
            shape = (n3, n2, n1) if len(base) == n3 else (n3 * n2 * n1,)
        built = self._kept.to_fill(dtype, core.device, shape, transposed, capture)
        if transposed:
            base = [each.mT for each in base]
            materialize(base, factors.transposed(), wide.mT, self.alpha, out=built.buffer)
        else:
            slices: list[Tensor] = []
            for weight in base:
                slices.extend([weight] if weight.shape[0] == n1 else weight.split(n1))
            materialize(slices, factors, wide, self.alpha, out=built.buffer)
        self._kept.put(built, core, capture)
        return built

    def invalidate(self) -> None:
        """Has W_eff built, and the base weights looked at, before they are used again.

        For code that writes the core, or the base weights, past torch's version counters and at
        another time than between a backward and the next forward; see docs/adapters.md.
        """
        self._kept.invalidate()
        self._projected.forget()
        self.base.suspect()

    def train(self, mode: bool = True) -> TProductStack:
        """As of any module. Averages of the weights come and go with it, so W_eff is in doubt."""
        self.doubt()
        return super().train(mode)

    def forward_slices(self, x: Tensor, place: Place) -> Tensor:
        """``x`` through the layer of one place; see `TProductLinear.forward`."""
        bias = place.bias
        if place.was_trained and x.ndim > 2 and not x.is_contiguous() and not x.is_nested:
            # Of such a weight torch makes one product of matrices, of a frozen one several; and the
            # bias is added to what it is rounded to.
            y = self._forward(x.contiguous(), x, None, place)
            return y if bias is None else y + bias.detach().to(y.dtype)
        return self._forward(x, x, bias, place)

    def _forward(self, x: Tensor, source: Tensor, bias: Tensor | None, place: Place) -> Tensor:
        """``x``, and ``source``, by which layers know that they have the same."""
        weight, traced = place.weight, is_traced()
        if weight.requires_grad and not traced:
            place.freeze()
            weight = place.weight
        dtype, precision = weight.dtype, self.precision
        if is_autocast(x) and x.dtype != torch.float64:
            # What autocast does to a linear layer; the operators themselves are out of its reach.
            dtype = torch.get_autocast_dtype(x.device.type)
            x = x.to(dtype)
            bias = None if bias is None else bias.to(dtype)
            precision = "bf16" if dtype == torch.bfloat16 else precision
        if not self.enabled:
            return F.linear(x, weight.to(dtype), bias)
        if place.backup is not None:
            if self.is_unsettled:  # a checkpoint brought another base, or another core
                self.settle()
            stored = place.stored.T if place.transposed else place.stored
            return F.linear(x, stored.to(dtype), bias)
        if not (traced or self.base.knows(place, weight)):
            self._look()
        batch: Rows | None = rows_of(self)
        core, adapter_ids = (self.core, None) if batch is None else (batch.cores, batch.ids_for(x))
        wide = self.base.factors.dtype
        if wide == torch.float64:
            precision = "ieee"
        if core.dtype != wide:
            core = core.to(wide)  # FSDP2 may have cast it as it casts weights
        if x.is_nested:
            if batch is not None:
                raise ValueError("x: expected rows of equal length in a batch, got a nested tensor")
            return F.linear(x, effective_weight(place).to(dtype), bias)
        how = (place, core, precision, adapter_ids)
        if wide == torch.float64 != dtype == x.dtype:  # a single layer was cast
            wider = None if bias is None else bias.double()
            return self._by_operators(x.double(), weight.double(), wider, *how).to(dtype)
        if traced:
            check_one_base(weight)
            # There is no W_eff on this way: a traced graph cannot see the kept buffer.
            return self._by_operators(x, weight.to(dtype), bias, *how)
        place.ran = True
        fits = (
            x.dtype == dtype
            and x.ndim > 0
            and x.shape[-1] == self.n2
            and x.device == core.device
            and not x.is_meta
            and not weight.requires_grad
            and (bias is None or not bias.requires_grad)
        )
        if not fits:  # the operators say why
            return self._by_operators(x, weight.to(dtype), bias, *how)
        if core.requires_grad:
            self._check_checkpoints(0 if batch is None else id(batch.cores))
        tokens = x.numel() // max(1, self.n2)
        capture = self._kept.capture_of(core.device)
        built = None
        with self._lock:
            if adapter_ids is None:
                built = self._effective_for(core, place, weight, dtype, tokens, capture)
            if built is not None:
                weight = built.view_of(place)
            elif weight.dtype != dtype:
                weight = weight.to(dtype)
            call = self._calls.get((place.slice_index, precision, dtype))
            if call is None:
                call = prepare(weight, bias, self.base.factors, place.slice_index, precision)
                call.on_gradient = self.gradient_came
                if not capture:  # what is made in a capture has no values until it is replayed
                    self._calls[place.slice_index, precision, dtype] = call
        gradient, z, gradient_sum = "x", None, None
        if adapter_ids is not None:
            gradient = "z"  # which q, k, v share; dyᵀx would mix the tokens of all cores
        elif core.requires_grad and torch.is_grad_enabled():
            gradient = cost.choose_gradient(tokens, self.n1, self.n2, self.n3, self.rank)
            if core.is_leaf:  # one that was computed may be another at the next layer
                gradient_sum = self._gradient_sum.of(core, self.alpha, call, capture)
        if gradient == "z":
            with without_autocast():
                # In training the graph keeps z for the next layer, in serving nobody would.
                hold = adapter_ids is not None
                z = self._projected.of(source, x, call.horizontal_hat, capture, hold)
        return run_layer(
            call,
            BY_FACTORS if built is None else BY_W_EFF,
            x,
            weight,
            bias,
            core,
            self.alpha,
            z=z,
            dense_grad=gradient == "dense",
            adapter_ids=adapter_ids,
            gradient_sum=gradient_sum,
        )

    def _by_operators(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        place: Place,
        core: Tensor,
        precision: Precision,
        adapter_ids: Tensor | None,
    ) -> Tensor:
        factors = self.base.factors
        if x.is_meta and weight.is_meta:  # shapes are asked for, wherever C and R are
            factors, core = factors.to("meta"), core.to("meta")
            adapter_ids = None if adapter_ids is None else adapter_ids.to("meta")
        return cur_linear(
            x,
            weight,
            bias,
            factors,
            core,
            place.slice_index,
            self.alpha,
            precision=precision,
            adapter_ids=adapter_ids,
        )

    def _effective_for(
        self,
        core: Tensor,
        place: Place,
        weight: Tensor,
        dtype: torch.dtype,
        tokens: int,
        capture: int,
    ) -> Effective | None:
        """W_eff if a call of a layer goes by it, built where it has to be."""
        if self.mode == "factored":
            return None
        built = self._kept.find(dtype, core, place, capture)
        if built is not None and self.mode == "materialized":
            return built
        mode = cost.choose_mode(
            self.mode,
            tokens=tokens,
            n1=self.n1,
            n2=self.n2,
            n3=self.n3,
            rank=self.rank,
            weight_dtype=weight.dtype,
            is_built=built is not None,
        )
        if mode == "factored":
            return None
        if built is None and self._mode_if_sharded() == "materialized":
            built = self._build(dtype, capture)
        return built

    def _mode_if_sharded(self) -> str:
        """How to run where W_eff is wanted but other layers' weights may be on other processes."""
        if all(is_here(place) for place in self.places):
            if len({place.weight.dtype for place in self.places}) > 1:
                return "factored"  # a single layer was cast
            return "materialized"
        if self.mode == "materialized":
            raise ValueError(
                "mode: expected 'auto' or 'factored' where weights are sharded or offloaded, got "
                "'materialized'"
            )
        return "factored"

    @contextmanager
    def batch(
        self, cores: Tensor, adapter_ids: Tensor, repeat: Repeat | None = None
    ) -> Iterator[None]:
        """Context in which row b of a batch goes by ``cores[adapter_ids[b]]``, in this thread.

        Args:
            cores: ``[A, n3, r, r]``, dtype and device of ``core``; the gradient reaches them.
            adapter_ids: int64 ``[B]``. Batches come first among the axes of every input.
            repeat: how rows repeat where a layer gets a multiple of B: "each" several times in a
                row (beams, windows), or "all" of them one after the other (guidance). Without it
                such a batch is refused.

        Raises:
            TypeError, ValueError: cores or ids that do not fit.
        """
        check_cores(cores, self.factors, adapter_ids)
        check_repeat(repeat)
        try:
            with using_rows(self, Rows(cores, adapter_ids, repeat)):
                yield
        finally:
            self._projected.forget()

    def merge(self) -> None:
        """Writes W_eff into the layers' weights, keeping a copy of the base."""
        if self.is_merged:
            raise ValueError("merge: expected an unmerged stack, got one that is merged already")
        for place in self.places:
            if not is_here(place):
                raise ValueError(
                    "merge: expected whole weights, got sharded or offloaded ones; save the "
                    "adapter, and merge it into a model on one process"
                )
        self._look()
        for place in self.places:
            place.keep()
        self._write_w_eff()

    @torch.no_grad()
    def _write_w_eff(self) -> None:
        built = self._built(self.places[0].weight.dtype)
        for place in self.places:
            view = built.view_of(place)
            place.stored.copy_(view.T if place.transposed else view)
        self._kept.release()

    def unmerge(self) -> None:
        """Restores the base weights bit for bit from the copy that `merge` kept."""
        if not self.is_merged:
            raise ValueError("unmerge: expected a merged stack, got one that is not merged")
        for place in self.places:
            place.restore()

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return (
            f"n3={self.n3}, n1={self.n1}, n2={self.n2}, rank={self.rank}, alpha={self.alpha}, "
            f"mode={self.mode}"
        )

    def moved(self) -> None:
        """What was made of a core that was in other memory goes."""
        self._kept.forget()
        self._projected.forget()
        self._gradient_sum.forget()
        self._calls.clear()

    def __getstate__(self) -> dict[str, Any]:
        # W_eff is rebuilt on demand; a copy or a pickle of the stack does without it.
        kept = ("_lock", "_kept", "_projected", "_gradient_sum", "_calls", "_forward_core")
        return {key: value for key, value in self.__dict__.items() if key not in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset()
