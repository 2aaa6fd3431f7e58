"""The stack: equally shaped weights with one trained core, which their layers compute through."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import cost
from .decompose import MAX_WORKSPACE, Selection, Stack, as_stack, check_rank, select_slices
from .distributed import ReentrantGuard, is_sharded, whole
from .eager import Call, LatestSum, is_traced, project, run_layer, without_autocast
from .factors import PRECISIONS, CURFactors
from .functional import check_cores, cur_linear, materialize, prepare
from .kept import Effective, Kept, Layer, Projected
from .linear import TProductLinear, check_linears, slices_in


class TProductStack(nn.Module):
    """All slices of one shape: owns the trained core, the frozen factors and W_eff.

    The weights stay with their layers; the stack refers to them, never copies or changes them
    (`merge` apart). With l the position of a layer's weight in the stack, the layer computes with
    ``W_l + alpha * (C * U * R)_l``; the core U starts at zero.

    Args:
        linears: layers in the order of their slices, which matters: the t-product is a circular
            convolution along it. Same in_features, dtype and device; their weights must not
            require grad. A layer whose out_features is a multiple m of the smallest one takes m
            consecutive slices (a fused q, k, v projection takes three).
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

    Attributes:
        core: Parameter ``[n3, r, r]``, fp32 (fp64 for fp64 weights), whatever dtype the model is
            cast to. Of several cores (`add_core`) the active one; the others are frozen parameters
            ``core_<name>``.
        layers: the `TProductLinear` layers, which share the parameters of ``linears``; or whatever
            else holds the weights, see `kept.Layer`.
        rows, columns: the chosen indices I and J.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    core: nn.Parameter
    lateral: Tensor
    horizontal: Tensor
    lateral_hat: Tensor
    horizontal_hat: Tensor

    def __init__(
        self,
        linears: Sequence[nn.Linear],
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
    ) -> None:
        super().__init__()
        if precision not in PRECISIONS:
            raise ValueError(
                f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}"
            )
        if mode not in cost.MODES:
            raise ValueError(f"mode: expected one of {', '.join(cost.MODES)}, got {mode!r}")
        check_linears(linears)
        self.n1 = min(linear.out_features for linear in linears) if n1 is None else n1
        self.n2 = linears[0].in_features
        counts = [slices_in(linear, self.n1) for linear in linears]
        self.n3, self.rank, self.alpha, self.mode = sum(counts), rank, float(alpha), mode
        check_rank("rank", rank, self.n1, self.n2)
        if not torch.isfinite(torch.tensor(self.alpha)):
            raise ValueError(f"alpha: expected a finite number, got {alpha}")

        if source is None:
            weights = [linear.weight.detach() for linear in linears]
            source = as_stack("linears", weights, max_workspace, progress, self.n1)
        rows, columns = select_slices(source, rank, selection, generator)
        self.precision = precision
        self.rows, self.columns = tuple(rows.tolist()), tuple(columns.tolist())
        source.check_finite()
        if factors is None:
            factors = CURFactors(source.columns(columns), source.rows(rows))
        elif (factors.n3, factors.n1, factors.n2, factors.rank) != (
            self.n3,
            self.n1,
            self.n2,
            rank,
        ):
            raise ValueError(
                f"factors: expected n3, n1, n2, rank {self.n3}, {self.n1}, {self.n2}, {rank}, got "
                f"{factors}"
            )
        factors = factors.to(source.device)
        for name in ("lateral", "horizontal", "lateral_hat", "horizontal_hat"):
            self.register_buffer(name, getattr(factors, name), persistent=False)
        core = torch.zeros(self.n3, rank, rank, dtype=factors.dtype, device=source.device)
        self.core = nn.Parameter(core)

        self.enabled = True
        self._backup: list[Tensor] | None = None  # base weights while merged
        self._batch: tuple[Tensor, Tensor] | None = None  # cores and adapter_ids of the batch
        self._guard = ReentrantGuard()
        self._kept = Kept()
        self._factors: CURFactors | None = None
        self._calls: dict[tuple[int, str, torch.dtype], Call] = {}
        self._projected = Projected()
        self._gradient_sum = LatestSum()
        self.layers: list[Layer] = []
        start = 0
        for linear, count in zip(linears, counts, strict=True):
            self.layers.append(TProductLinear.from_linear(linear, self, start))
            start += count

    @property
    def factors(self) -> CURFactors:
        """The frozen C and R."""
        if not torch.compiler.is_compiling() and self._factors is not None:
            return self._factors
        return CURFactors.from_packed(
            self.lateral, self.horizontal, self.lateral_hat, self.horizontal_hat
        )

    @property
    def is_merged(self) -> bool:
        """Whether the layers' weights hold W_eff now."""
        return self._backup is not None

    def base_slices(self) -> list[Tensor]:
        """The n3 base slices ``[n1, n2]``, views of the layers' weights (or of their backup)."""
        return list(self.each_base_slice())

    def each_base_slice(self) -> Iterator[Tensor]:
        """Those slices one after the other; sharded weights are gathered one at a time."""
        weights = self._backup or [layer.weight for layer in self.layers]
        for weight in weights:
            yield from whole(weight.detach()).split(self.n1)

    def effective(self, dtype: torch.dtype) -> Tensor:
        """W_eff ``[n3, n1, n2]`` for the present core, rebuilt only when it changed.

        The buffer is reused from version to version: fresh memory costs more in page faults than
        the kernel. While a graph still holds a view of it for its backward, the next version goes
        to a new buffer instead. Where a weight that is stored (in, out) has several slices, they
        lie side by side, and this is a copy.
        """
        return self._built(dtype).w_eff(self.layers)

    def _built(self, dtype: torch.dtype) -> Effective:
        kept, core = self._kept, self.core
        capture = kept.capture_of(core.device)
        weights = [layer.weight for layer in self.layers]
        for layer, weight in zip(self.layers, weights, strict=True):
            built = kept.find(dtype, core, layer, weight, capture)
            if built is None or kept.has_graphs:  # this is no pass, of which each layer counts one
                return self._build(dtype, weights, capture)
        assert built is not None
        return built

    @torch.inference_mode(False)  # what is kept must also serve a training step
    @torch.no_grad()
    def _build(self, dtype: torch.dtype, weights: Sequence[Tensor], capture: int) -> Effective:
        core, factors, (n3, n1, n2) = self.core, self.factors, (self.n3, self.n1, self.n2)
        base = self._backup or weights
        # Stored (in, out), as by Conv1D: (C * U * R)ᵀ slice by slice is Rᵀ * Uᵀ * Cᵀ, and no weight
        # has to be copied for the kernels. Slices of one weight lie side by side then.
        transposed = all(each.mT.is_contiguous() and not each.is_contiguous() for each in base)
        shape: tuple[int, ...] = (n3, n1, n2)
        if transposed:
            shape = (n3, n2, n1) if len(base) == n3 else (n3 * n2 * n1,)
        built = self._kept.to_fill(dtype, core.device, shape, transposed, capture)
        if transposed:
            base = [each.mT for each in base]
            materialize(base, factors.transposed(), core.mT, self.alpha, out=built.buffer)
        else:
            slices: list[Tensor] = []
            for weight in base:
                slices.extend([weight] if weight.shape[0] == n1 else weight.split(n1))
            materialize(slices, factors, core, self.alpha, out=built.buffer)
        self._factors = factors
        self._kept.put(built, core, self.layers, weights, capture)
        return built

    def invalidate(self) -> None:
        """Has W_eff built before it is used again.

        For code that writes the core, or the base weights, past torch's version counters and at
        another time than between a backward and the next forward; see docs/adapters.md.
        """
        self._kept.invalidate()
        self._projected.forget()

    def train(self, mode: bool = True) -> TProductStack:
        """As of any module. Averages of the weights come and go with it, so W_eff is in doubt."""
        self._kept.doubt()
        return super().train(mode)

    def forward_slices(self, x: Tensor, layer: Layer) -> Tensor:
        """``x`` through one layer of this stack; see `TProductLinear.forward`."""
        weight, bias, source = layer.weight, layer.bias, x
        dtype, precision = weight.dtype, self.precision
        kind = x.device.type
        has_autocast = torch.amp.is_autocast_available(kind)  # the meta device has none
        if has_autocast and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            # What autocast does to a linear layer; the operators themselves are out of its reach.
            dtype = torch.get_autocast_dtype(x.device.type)
            x = x.to(dtype)
            bias = None if bias is None else bias.to(dtype)
            precision = "bf16" if dtype == torch.bfloat16 else precision
        if not self.enabled or self._backup is not None:
            return F.linear(x, weight.to(dtype), bias)
        core, adapter_ids = (self.core, None) if self._batch is None else self._batch
        wide = self.lateral_hat.dtype
        if wide == torch.float64:
            precision = "ieee"
        if core.dtype != wide:
            core = core.to(wide)  # FSDP2 may have cast it as it casts weights
        if adapter_ids is not None and x.shape[0] % max(1, adapter_ids.shape[0]):
            raise ValueError(
                f"x: expected {adapter_ids.shape[0]} rows, one for each of adapter_ids, as first "
                f"axis, got {list(x.shape)}"
            )
        fits = (
            x.dtype == dtype
            and x.ndim > 0
            and x.shape[-1] == self.n2
            and x.device == core.device
            and not weight.requires_grad
            and (bias is None or not bias.requires_grad)
        )
        if not fits or is_traced():
            # By the operators, which say what does not fit. There is no W_eff on this way: a traced
            # graph cannot see the kept buffer.
            return cur_linear(
                x,
                weight.to(dtype),
                bias,
                self.factors,
                core,
                layer.slice_index,
                self.alpha,
                precision=precision,
                adapter_ids=adapter_ids,
            )
        if core.requires_grad:
            self._guard.check()
        tokens = x.numel() // max(1, self.n2)
        capture = self._kept.capture_of(core.device)
        built = None
        if adapter_ids is None:
            built = self._effective_for(layer, weight, dtype, tokens, capture)
        if built is not None:
            weight = built.view_of(layer)
        elif weight.dtype != dtype:
            weight = weight.to(dtype)
        call = self._calls.get((layer.slice_index, precision, dtype))
        if call is None:
            self._factors = self.factors
            call = prepare(weight, bias, self._factors, layer.slice_index, precision)
            call.on_gradient = self._kept.doubt
            if not capture:  # what is made in a capture has no values until the graph is replayed
                self._calls[layer.slice_index, precision, dtype] = call
        gradient, z, gradient_sum = "x", None, None
        if adapter_ids is not None:
            gradient = "z"  # which q, k, v share; dyᵀx would mix the tokens of all cores
        elif core.requires_grad and torch.is_grad_enabled():
            gradient = cost.choose_gradient(tokens, self.n1, self.n2, self.n3, self.rank)
            if core.is_leaf:  # one that was computed may be another at the next layer
                gradient_sum = self._gradient_sum.of(core, self.alpha, call, capture)
        if gradient == "z":
            with without_autocast():
                z = self._project(source, x, call.horizontal_hat, capture)
        return run_layer(
            call,
            x,
            weight,
            bias,
            core,
            self.alpha,
            z=z,
            materialized=built is not None,
            dense_grad=gradient == "dense",
            adapter_ids=adapter_ids,
            gradient_sum=gradient_sum,
        )

    def _effective_for(
        self, layer: Layer, weight: Tensor, dtype: torch.dtype, tokens: int, capture: int
    ) -> Effective | None:
        """W_eff if a call of a layer goes by it, built where it has to be."""
        if self.mode == "factored":
            return None
        built = self._kept.find(dtype, self.core, layer, weight, capture)
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
            built = self._build(dtype, [each.weight for each in self.layers], capture)
        return built

    def _mode_if_sharded(self) -> str:
        """How to run where W_eff is wanted but other layers' weights may be on other processes."""
        if not any(is_sharded(layer.weight) for layer in self.layers):
            return "materialized"
        if self.mode == "materialized":
            raise ValueError(
                "mode: expected 'auto' or 'factored' where weights are sharded, got 'materialized'"
            )
        return "factored"

    def _project(self, source: Tensor, x: Tensor, horizontal_hat: Tensor, capture: int) -> Tensor:
        """z of ``x``; layers that share their input (q, k, v) share z too."""
        z = self._projected.z_of(source, horizontal_hat, capture)
        if z is None:
            z = project(x, horizontal_hat)
            # In training the graph keeps z for the next layer, in serving nobody would.
            hold = self._batch is not None
            self._projected.put(source, z, horizontal_hat, capture, hold)
        return z

    def core_of(self, name: str | None) -> nn.Parameter:
        """The core of that name among those of `add_core`; None: the active one."""
        return self.core if name is None else self.get_parameter(f"core_{name}")

    def add_core(self, name: str) -> None:
        """Another core, of zeros, beside the active one; frozen until it is active itself."""
        core = nn.Parameter(torch.zeros_like(self.core), requires_grad=False)
        self.register_parameter(f"core_{name}", core)

    def remove_core(self, name: str) -> None:
        """Drops a core that is not active."""
        delattr(self, f"core_{name}")

    def activate_core(self, name: str, former: str) -> None:
        """Makes the core of that name the active one, which goes on under the name ``former``.

        Parameters change places, not values: what an optimizer holds stays what it was, and a
        compiled graph, which takes ``core`` as an input, stays valid.
        """
        core, trained = self.core_of(name), self.core
        core.requires_grad_(trained.requires_grad)
        trained.requires_grad_(False)
        delattr(self, f"core_{name}")
        self.core = core
        self.register_parameter(f"core_{former}", trained)

    @contextmanager
    def batch(self, cores: Tensor, adapter_ids: Tensor) -> Iterator[None]:
        """Context in which row b of a batch goes by ``cores[adapter_ids[b]]``.

        Args:
            cores: ``[A, n3, r, r]``, dtype and device of ``core``; the gradient reaches them.
            adapter_ids: int64 ``[B]``. Batches come first among the axes of every input.

        Raises:
            TypeError, ValueError: cores or ids that do not fit.
        """
        check_cores(cores, self.factors, adapter_ids)
        before, self._batch = self._batch, (cores, adapter_ids)
        try:
            yield
        finally:
            self._batch = before
            self._projected.forget()

    def merge(self) -> None:
        """Writes W_eff into the layers' weights, keeping a copy of the base."""
        if self.is_merged:
            raise ValueError("merge: expected an unmerged stack, got one that is merged already")
        if any(is_sharded(layer.weight) for layer in self.layers):
            raise ValueError(
                "merge: expected whole weights, got sharded ones; save the adapter, and merge it "
                "into a model on one process"
            )
        built = self._built(self.layers[0].weight.dtype)
        self._backup = [layer.weight.detach().clone() for layer in self.layers]
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.copy_(built.view_of(layer))
        self._kept.release()

    def unmerge(self) -> None:
        """Restores the base weights bit for bit from the copy that `merge` kept."""
        if self._backup is None:
            raise ValueError("unmerge: expected a merged stack, got one that is not merged")
        with torch.no_grad():
            for layer, weight in zip(self.layers, self._backup, strict=True):
                layer.weight.copy_(weight)
        self._backup = None

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return (
            f"n3={self.n3}, n1={self.n1}, n2={self.n2}, rank={self.rank}, alpha={self.alpha}, "
            f"mode={self.mode}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TProductStack:
        """Moves with the model, but keeps at least fp32 whatever dtype the model is cast to."""

        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            wide = torch.promote_types(moved.dtype, torch.float32)
            return moved if moved.dtype == wide else tensor.to(device=moved.device, dtype=wide)

        before = self._storages()
        super()._apply(keep_precision, recurse)
        if self._storages() != before:
            # Else all that was made of them stays: a captured graph may read it.
            self._kept.forget()
            self._projected.forget()
            self._gradient_sum.forget()
            self._calls.clear()
            self._factors = None
        if self._backup is not None:
            self._backup = [fn(weight) for weight in self._backup]
        return self

    def _storages(self) -> list[int]:
        """Which memory core and factors are in."""
        tensors = (self.core, self.lateral, self.lateral_hat, self.horizontal_hat)
        return [each.untyped_storage()._cdata for each in tensors]

    def __getstate__(self) -> dict[str, Any]:
        # W_eff is rebuilt on demand; a copy or a pickle of the stack does without it.
        nothing: dict[str, Any] = {
            "_kept": Kept(),
            "_projected": Projected(),
            "_gradient_sum": LatestSum(),
            "_factors": None,
            "_calls": {},
        }
        return {**self.__dict__, **nothing}
