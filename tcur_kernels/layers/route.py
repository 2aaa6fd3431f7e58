"""How the layers of a stack compute: the operands of a call, the choice of a way, and the call.

A layer computes either with W_eff or with the factors, whichever is less work (`operators.cost`).
W_eff is built once for all layers of the stack and kept while the core stays the same. Traced code
calls the operators, which a compiler can see.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..autocast import is_autocast
from ..checkpoints import ReentrantGuard, refuse_lost_gradients, watch
from ..matrices import matrix_of
from ..operators import cost, streams
from ..operators.basis import BASES, Basis, scale_of
from ..operators.eager import (
    BY_FACTORS,
    BY_UPDATE,
    BY_W_EFF,
    Call,
    is_traced,
    run_layer,
    without_autocast,
)
from ..operators.factors import CURFactors, Precision
from ..operators.functional import (
    cur_linear,
    cur_product,
    materialize,
    prepare,
    prepare_update,
    slice_update,
    update_linear,
)
from ..operators.gradient_sum import LatestSum, Pending
from .base import Base, check_one_base, is_here
from .cores import Cores
from .groups import Group, GroupedRows
from .reading import effective_weight
from .rows import Rows, rows_of
from .switching import ForwardCore, warn_of_unused
from .w_eff import Effective, Kept, Projected
from .weights import Place


class Operands(NamedTuple):
    """The operands of one call of a layer.

    Attributes:
        x: tokens ``[..., in_features]``, in the dtype that the layer computes in.
        source: the tensor that the caller passed; it shows whether two layers share their input.
        weight: the base weight ``[out_features, in_features]``, in its own dtype; None to compute
            the update alone, for a quantised layer.
        bias: ``[out_features]`` or None, in the dtype of ``x``.
        place: where the weight is stored.
        core: ``[n3, r, r]``, or ``[A, n3, r, r]`` with ``adapter_ids``.
        adapter_ids: int64, the index of the core that each row uses; None: one core for all rows.
        dtype: the dtype that the layer computes in: that of the weight, or of autocast.
        precision: of the products of tokens with the factors.
    """

    x: Tensor
    source: Tensor
    weight: Tensor | None
    bias: Tensor | None
    place: Place
    core: Tensor
    adapter_ids: Tensor | None
    dtype: torch.dtype
    precision: Precision


class Routed(Cores):
    """The part of a stack that its layers use: they pass tokens, and it computes.

    The subclass `stack.TProductStack` sets and documents the attributes.
    """

    name: str
    places: list[Place]
    base: Base
    n1: int
    n2: int
    n3: int
    rank: int
    alpha: float
    mode: cost.Mode
    precision: Precision
    quantised: tuple[str, ...]
    enabled: bool
    is_unsettled: bool
    _guard: ReentrantGuard
    _is_looked_over: bool

    def _reset(self) -> None:
        """Starts with empty caches for the present factors."""
        watch()
        self.renew_locks()
        self._kept = Kept()
        #: Maps (first slice, precision, dtype) of a layer to what its calls have in common.
        self._calls: dict[tuple[int, str, torch.dtype], Call] = {}
        self._projected = Projected()
        self._gradient_sum = LatestSum()
        self._generation = self.base.generation
        self._forward_core = ForwardCore()

    # -- a call of a layer

    def forward_slices(self, x: Tensor, place: Place) -> Tensor:
        """Applies the layer of one place to ``x``; see `TProductLinear.forward`."""
        bias = place.bias
        if place.was_trained and x.ndim > 2 and not x.is_contiguous() and not x.is_nested:
            # Compute as torch did before the layer was adapted. If the weight requires grad, torch
            # forms a single matrix product and adds the bias to the rounded result. For a frozen
            # weight it would form several products.
            y = self._forward(x.contiguous(), x, None, place)
            return y if bias is None else y + bias.detach().to(y.dtype)
        return self._forward(x, x, bias, place)

    def _forward(self, x: Tensor, source: Tensor, bias: Tensor | None, place: Place) -> Tensor:
        self.let_changes_end()
        traced, weight = is_traced(), place.weight
        if weight.requires_grad and not traced:
            place.freeze()
            weight = place.weight
        dtype, precision = weight.dtype, self.precision
        if is_autocast(x) and x.dtype != torch.float64:
            # Autocast casts a linear layer like this, but it does not know our operators.
            dtype = torch.get_autocast_dtype(x.device.type)
            x = x.to(dtype)
            bias = None if bias is None else bias.to(dtype)
            precision = "bf16" if dtype == torch.bfloat16 else precision
        if not self.enabled:
            return F.linear(x, weight.to(dtype), bias)
        if place.backup is not None:
            return F.linear(x, self._merged_weight(place).to(dtype), bias)
        if not (traced or self.base.knows(place.root)):
            self._look()
        batch = rows_of(self)
        if isinstance(batch, GroupedRows):
            how = (source, weight, bias, place, batch.groups[0].cores, None, dtype, precision)
            return self._by_groups(Operands(x, *how), batch, traced)
        core, adapter_ids = self._core_for(x, batch, traced)
        if x.is_nested:
            if adapter_ids is not None:
                raise ValueError("x: expected rows of equal length in a batch, got a nested tensor")
            return F.linear(x, effective_weight(place).to(dtype), bias)
        if self.base.factors.dtype == torch.float64:
            precision = "ieee"
        operands = Operands(x, source, weight, bias, place, core, adapter_ids, dtype, precision)
        if traced:
            check_one_base(weight)
            return self._by_operators(operands)
        place.ran = True
        if not self._is_plain(operands):
            return self._by_operators(operands)
        return self._by_node(operands)

    def _merged_weight(self, place: Place) -> Tensor:
        """W_eff, which is stored in the layer itself while merged."""
        self.refuse_rows_of_merged()
        if self.is_unsettled:  # a checkpoint brought another base, or another core
            self.settle()
        return matrix_of(place.stored, place.layout)

    def _core_for(
        self, x: Tensor, batch: Rows | None, traced: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The core; or, in a batch of many adapters, their cores and the index for each row."""
        core, adapter_ids = (self.core, None) if batch is None else (batch.cores, batch.ids_for(x))
        if core.requires_grad and not traced:
            refuse_lost_gradients()
        wide = self.base.factors.dtype
        # FSDP2 with mixed precision may have cast the core together with the weights.
        return core if core.dtype == wide else core.to(wide), adapter_ids

    def _is_plain(self, given: Operands) -> bool:
        """Whether the operands all fit. If not, the operators take over and say what is wrong.

        The operators also handle two special cases: a single layer that was cast, and shapes on
        the meta device.
        """
        x, _, weight, bias, _, core, _, dtype, _ = given
        return (
            x.dtype == dtype
            and x.ndim > 0
            and x.shape[-1] == self.n2
            and x.device == core.device
            and not x.is_meta
            and (weight is None or not weight.requires_grad)
            and (bias is None or not bias.requires_grad)
            and (core.dtype != torch.float64 or dtype == torch.float64)
        )

    def _by_groups(self, given: Operands, batch: GroupedRows, traced: bool) -> Tensor:
        """The call in a batch whose groups have other C and R: one call for each group."""
        if given.x.is_nested:
            raise ValueError("x: expected rows of equal length in a batch, got a nested tensor")
        if traced:
            assert given.weight is not None
            check_one_base(given.weight)
        else:
            given.place.ran = True
            self.follow_groups(batch)
        if self.base.factors.dtype == torch.float64:
            given = given._replace(precision="ieee")
        return batch.forward(
            given.x,
            lambda x, ids, group: self._by_operators(
                given._replace(x=x, core=group.cores, adapter_ids=ids), group
            ),
        )

    def follow_groups(self, batch: GroupedRows) -> None:
        """Has the groups of a batch follow the weights; refuses gradients that would be lost."""
        with self._lock:
            batch.follow(self.base)
        if batch.requires_grad:
            refuse_lost_gradients()
            self.check_checkpoints(batch.rows.number)

    def _by_operators(self, given: Operands, group: Group | None = None) -> Tensor:
        """The call through the operators, which check everything and are visible to a compiler.

        This never uses W_eff, because a traced graph cannot see the buffer that holds it.

        Args:
            group: whose C and R to use; by default those of the stack.
        """
        assert given.weight is not None
        x, weight, bias = given.x, given.weight.to(given.dtype), given.bias
        core, adapter_ids = given.core, given.adapter_ids
        factors = self.base.factors if group is None else group.factors
        if x.is_meta and weight.is_meta:  # only shapes matter; C and R may be on another device
            factors, core = factors.to("meta"), core.to("meta")
            adapter_ids = None if adapter_ids is None else adapter_ids.to("meta")
        is_wider = factors.dtype == torch.float64 != given.dtype == x.dtype  # one layer was cast
        if is_wider:
            x, weight = x.double(), given.weight.double()
            bias = None if bias is None else bias.double()
        y = cur_linear(
            x,
            weight,
            bias,
            factors,
            core,
            given.place.slice_index,
            self.scale if group is None else group.scale,
            precision=given.precision,
            adapter_ids=adapter_ids,
        )
        return y.to(given.dtype) if is_wider else y

    def _by_node(self, given: Operands) -> Tensor:
        """The call as one node of autograd, with W_eff or with the factors; see `eager`."""
        x, source, weight, bias, place, core, adapter_ids, dtype, _ = given
        if core.requires_grad:
            batch = rows_of(self)
            self.check_checkpoints(0 if batch is None else batch.number)
        tokens = x.numel() // max(1, self.n2)
        capture = self._kept.capture_of(core.device)
        with self._lock:
            built = None
            if adapter_ids is None and not self.quantised:
                built = self._effective_for(given, tokens, capture)
            if built is not None:
                weight = built.view_of(place)
            elif weight is not None and weight.dtype != dtype:
                weight = weight.to(dtype)
            call = self._call_of(given, weight, capture)
        is_trained = core.requires_grad and torch.is_grad_enabled()
        gradient, z, gradient_sum = "x", None, None
        if adapter_ids is not None:
            gradient = "z"  # q, k, v share z; and dyᵀx would mix the tokens of all cores
        elif is_trained:
            at_once = core.is_leaf and built is not None
            gradient = cost.choose_gradient(tokens, *self._sizes, at_once=at_once)
            if core.is_leaf:  # a computed core may be a different tensor at the next layer
                gradient_sum = self._gradient_sum.of(core, self.scale, call.ending, capture)
        if gradient == "z":
            with without_autocast():
                # In training the graph keeps z alive for the next layer. A batch of many adapters
                # is often served without a graph, so z is held here.
                hold = adapter_ids is not None
                how = (call.horizontal_hat, call.bf16_operands)
                z = self._projected.of(source, x, *how, capture, hold)
        way = BY_FACTORS if built is None else BY_W_EFF
        return run_layer(
            call,
            BY_UPDATE if weight is None else way,
            x,
            weight,
            bias,
            core,
            self.scale,
            z=z,
            dense_grad=gradient == "dense",
            adapter_ids=adapter_ids,
            gradient_sum=gradient_sum,
        )

    def _call_of(self, given: Operands, weight: Tensor | None, capture: int) -> Call:
        """What all calls of this layer have in common; it is checked and prepared only once."""
        key = (given.place.slice_index, given.precision, given.dtype)
        call = self._calls.get(key)
        if call is None:
            factors, place = self.base.factors, given.place
            if weight is None:
                call = prepare_update(factors, place.slice_index, place.slices, given.precision)
            else:
                call = prepare(weight, given.bias, factors, place.slice_index, given.precision)
            call.on_gradient = self.gradient_came
            if not capture:  # tensors made in a capture have no values before the first replay
                self._calls[key] = call
        return call

    # -- W_eff

    def _effective_for(self, given: Operands, tokens: int, capture: int) -> Effective | None:
        """W_eff if this call should use it, built if necessary; else None."""
        if self.mode == "factored":
            return None
        built = self._kept.find(given.dtype, given.core, given.place, capture)
        if built is not None and self.mode == "materialized":
            return built
        mode = cost.choose_mode(
            # A convolution reads its weight in any case.
            "materialized" if given.place.layout == "convolution" else self.mode,
            tokens=tokens,
            n1=self.n1,
            n2=self.n2,
            n3=self.n3,
            rank=self.rank,
            weight_dtype=given.place.dtype,
            is_built=built is not None,
        )
        if mode == "factored":
            return None
        if built is None and self._mode_if_sharded() == "materialized":
            built = self._build(given.dtype, capture)
        return built

    def _mode_if_sharded(self) -> str:
        """The mode if W_eff is wanted, although other layers' weights may be sharded or cast."""
        if all(is_here(place) for place in self.places):
            if len({place.dtype for place in self.places}) > 1:
                return "factored"  # a single layer was cast
            return "materialized"
        if self.mode == "materialized":
            raise ValueError(
                "mode: expected 'auto' or 'factored' where weights are sharded or offloaded, got "
                "'materialized'"
            )
        return "factored"

    def effective(self, dtype: torch.dtype) -> Tensor:
        """W_eff ``[n3, n1, n2]`` of the present core, rebuilt only if the core changed.

        Each version reuses the same buffer, because page faults in fresh memory cost more than the
        kernel. If a graph still holds a view of the buffer for its backward, the next version goes
        to a new buffer. If a weight is stored (in, out) and has several slices, they lie side by
        side in memory; the result is then a copy.
        """
        with self._lock:
            w_eff = self._built(dtype).w_eff(self.places)
            if self.quantised:  # no layer computes with it
                self._kept.release()
            return w_eff

    def _built(self, dtype: torch.dtype) -> Effective:
        self._look()
        capture = self._kept.capture_of(self.core.device)
        for place in self.places:
            built = self._kept.find(dtype, self.core, place, capture)
            # With captured graphs, W_eff is rebuilt when a layer meets it a second time. This call
            # is not part of a pass through the layers, so it must not rely on that count.
            if built is None or self._kept.has_graphs:
                return self._build(dtype, capture)
        assert built is not None
        return built

    @torch.inference_mode(False)  # a later training step uses the result too
    @torch.no_grad()
    def _build(self, dtype: torch.dtype, capture: int) -> Effective:
        core, factors, (n3, n1, n2) = self.core, self.base.factors, (self.n3, self.n1, self.n2)
        wide = core.to(factors.dtype)
        base = [place.weight for place in self.places]
        # Conv1D stores weights (in, out). Transposing each frontal slice of C * U * R gives
        # Rᵀ * Uᵀ * Cᵀ, so the kernels can read such weights without a copy. The slices of one
        # weight then lie side by side.
        transposed = all(each.mT.is_contiguous() and not each.is_contiguous() for each in base)
        shape: tuple[int, ...] = (n3, n1, n2)
        if transposed:
            shape = (n3, n2, n1) if len(base) == n3 else (n3 * n2 * n1,)
        built = self._kept.to_fill(dtype, core.device, shape, transposed, capture)
        if transposed:
            base = [each.mT for each in base]
            materialize(base, factors.transposed(), wide.mT, self.scale, out=built.buffer)
        else:
            slices: list[Tensor] = []
            for weight in base:
                slices.extend([weight] if weight.shape[0] == n1 else weight.split(n1))
            materialize(slices, factors, wide, self.scale, out=built.buffer)
        self._kept.put(built, core, capture)
        return built

    def effective_value(self, place: Place) -> Tensor:
        """The numbers of W_eff of one place; the kept ones if the layers compute with W_eff."""
        # For one expert of many, W_eff of all is not built.
        is_part = place.root is not place
        tokens = 0 if is_part else int(cost.tokens_worth_materializing(*self._sizes)) + 1
        with torch.no_grad():
            kept = None if self.quantised else self.kept_value(place, tokens)
            return effective_weight(place) if kept is None else kept

    def kept_value(self, place: Place, tokens: int) -> Tensor | None:
        """The numbers of W_eff of one place if so many tokens should use it; else None."""
        self.let_changes_end()
        weight, core = place.weight, self.core
        with self._lock, torch.no_grad():
            self._look()
            capture = self._kept.capture_of(core.device)
            how = (weight, weight, weight, None, place, core, None, weight.dtype, self.precision)
            built = self._effective_for(Operands(*how), tokens, capture)
            return None if built is None else built.view_of(place)

    def update(self, place: Place) -> Tensor:
        """The update of one place, ``[out, in]``, in at least fp32; differentiable."""
        self.let_changes_end()
        factors = self.factors
        if self.core.requires_grad and not is_traced():
            refuse_lost_gradients()
        core = self.core.to(factors.dtype)
        if place.layout != "experts":
            return slice_update(factors, core, place.slice_index, place.slices, self.scale)
        if place.slices == self.n3:
            return self.scale * cur_product(factors, core).flatten(0, 1)
        # One slice at a time: for all of them together, the rows would be projected by q numbers.
        first, last = place.slice_index, place.slice_index + place.slices
        each = [slice_update(factors, core, s, 1, self.scale) for s in range(first, last)]
        return torch.cat(each)

    def update_of_tokens(self, x: Tensor, place: Place, transposed: bool) -> Tensor:
        """What the update adds to ``x Wᵀ``, or to ``x W`` if transposed, for one place.

        It goes through the factors, in the dtype of ``x``, and is differentiable.
        """
        self.let_changes_end()
        factors, dtype = self.factors, x.dtype
        if self.core.requires_grad:
            refuse_lost_gradients()
        place.ran = True
        core, precision = self.core.to(factors.dtype), self.precision
        if factors.dtype == torch.float64:
            x, precision = x.double(), "ieee"
        elif dtype == torch.bfloat16 and is_autocast(x):
            precision = "bf16"
        how = (place.slice_index, place.slices, self.scale)
        added = update_linear(x, factors, core, *how, precision=precision, transposed=transposed)
        return added.to(dtype)

    # -- C, R and the base

    @property
    def basis(self) -> Basis:
        """The basis in which the cores are written."""
        return self.base.factors.basis

    @property
    def scale(self) -> float:
        """What C * U * R is multiplied by; it follows a changed ``alpha``."""
        return scale_of(self.basis, self.alpha, self.n1, self.n2, self.rank)

    @property
    def indices_key(self) -> str:
        """The name of the buffer with I and J in the holder; it also tells the basis."""
        return self.indices_key_in(self.basis)

    def indices_key_in(self, basis: Basis) -> str:
        """The name that `indices_key` has in a basis."""
        return self._key_of("indices" if basis == "slices" else f"{basis}_indices")

    def is_free(self, name: str) -> bool:
        """Whether a new core may have that name, which indices must not have in any basis."""
        taken = [self.indices_key_in(basis) for basis in BASES]
        return self._key_of(name) not in taken and super().is_free(name)

    @property
    def factors(self) -> CURFactors:
        """The frozen C and R of the present base weights."""
        if not torch.compiler.is_compiling():
            self._look()
        return self.base.factors

    def _look(self) -> None:
        """Takes C and R again if the base weights changed, and drops what depends on old ones."""
        with self._lock:
            # A comparison would wait for the device, which is forbidden during a capture.
            if not self.base.is_known and not streams.capture_of(self.base.factors.device):
                indices = self.holder._buffers.get(self.indices_key)
                if indices is not None and not indices.is_meta:
                    self.base.choose(*indices.tolist())
                self.base.look()
            self._forget_former()

    def _forget_former(self) -> None:
        if self._generation != self.base.generation:
            self._generation = self.base.generation
            self._kept.invalidate()
            self._projected.forget()
            self._calls.clear()

    @property
    def is_merged(self) -> bool:
        """Whether the layers' weights hold W_eff at present."""
        return self.places[0].backup is not None

    def settle(self) -> None:
        """Follows a loaded checkpoint: takes C and R of the new base; if merged, writes W_eff."""
        self._look()
        if self.is_unsettled and self.is_merged:
            self._write_w_eff()
        self.is_unsettled = False

    @torch.no_grad()
    def _write_w_eff(self) -> None:
        built = self._built(self.places[0].weight.dtype)
        for place in self.places:
            view = built.view_of(place)
            place.stored.copy_(place.in_layout(view))
        self._kept.release()

    def reading(self) -> Pending:
        """The `Pending` that a graph which reads a weight keeps, and marks in its backward."""
        self.check_checkpoints(0)
        return self._gradient_sum.reading()

    def check_checkpoints(self, batch: int) -> None:
        """Refuses cases in which activation checkpointing would silently go wrong.

        Args:
            batch: the number of the batch of many adapters; 0 outside of one.
        """
        self._guard.check()
        self._forward_core.check((self.activations, batch), self._gradient_sum)

    def gradient_came(self) -> None:
        """Called when a gradient of the core is formed.

        An optimizer may write the core from now on. Every layer that ever runs has run by now, so
        the first such call warns of the others.
        """
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

    # -- what holds no longer

    def doubt(self) -> None:
        """Notes that the core may have been written without a trace."""
        self._kept.doubt()

    def invalidate(self) -> None:
        """Requests that W_eff be rebuilt and the base weights compared before their next use.

        For code that writes the core or the base weights past torch's version counters, at another
        time than between a backward and the next forward; see docs/adapters.md.
        """
        with self._lock:  # what another thread builds at present is not valid either
            self._kept.invalidate()
            self._projected.forget()
            self.base.suspect()

    def activate_core(self, name: str, former: str) -> None:
        """Like `Cores.activate_core`; graphs of the former core may still await their backward."""
        super().activate_core(name, former)
        self._gradient_sum.retire()

    def moved(self) -> None:
        """Drops everything that was made from a core in its former memory."""
        self._kept.forget()
        self._projected.forget()
        self._gradient_sum.forget()
        self._calls.clear()
