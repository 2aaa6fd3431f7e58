"""The operators of namespace ``tcur``: their arguments, stated once, and their registration.

The arguments of every operator are one of the records below. `schema_of` derives torch's schema
from the annotations of a record. Every function that belongs to an operator takes the record. The
operator itself is one `Operator`, in the module of ``definitions`` that has its name.

======================  ==========================================================================
``materialize``         W_eff = W + scale C*U*R for all slices; no weights: scale C*U*R
``materialize_out``     the same into a buffer, without a derivative
``core_grad_dense``     the adjoint: G -> Cᵀ*G*Rᵀ
``core_grad_tokens``    the same from tokens of one or more consecutive slices
``core_of_packed``      packed ∂Û of several layers -> the gradient that they make together
``cur_linear``          consecutive slices of W_eff as a linear map, or its transpose
``w_eff_linear``        the same where W_eff of these slices is at hand
======================  ==========================================================================

Every operator exists once per language: ``tcur::name``, whose kernels are compiled and chosen by
the device of the tensors, ``tcur::name_reference``, plain torch for any device, and Triton's, when
the subpackage ``triton`` is imported. (Overloads of one name would say it better, but torch 2.13
aborts at exit when a library that defined several is torn down.) The reference has them all. A
language may lack kernels: `nearest` then gives the reference's.

Factors travel as packed half spectra: ``lateral_hat`` [n1, q] and ``horizontal_hat`` [q, n2] with
q = n3 * rank, column ``plane * rank + a`` (`reference.pack` gives the order of the planes), fp32 or
fp64; the core has their dtype. The operators on tokens take them in bf16 too: the projections
z = x R̂ᵀ and p = dy Ĉ are then products in that precision, and the core stays fp32. With
``bf16_operands`` the same products are formed in fp32: the factors are fp32 that were rounded to
bf16, and the operators round what they multiply with them (`bf16_products`). That is for the CPU.

Only the core, ``x`` and gradients are differentiable, and the operators are closed under
differentiation: the derivative of each is made of the others. Packed gradients are the exception.
They are for a backward pass that is not differentiated again, and raise an error if it is.

This module imports only torch, and what autocast and the counter of operations need. It imports
neither Triton nor a compiled library.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Generic, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor

from ..autocast import keys, outside_autocast
from . import flops

#: Dtypes whose sums are formed in fp32.
HALVES = (torch.bfloat16, torch.float16)

#: Languages that every operator is defined in; "" is the one whose kernels are compiled.
LANGUAGES = ("", "reference")
#: Compiled for CUDA alone: operands of the products that make C * U * R rounded to TF32.
CUDA_TF32 = "cuda_tf32"

#: Autograd's notes of what is a view.
VIEWS = keys("ADInplaceOrView")

# -- arguments

#: A size that may differ from run to run of a traced graph.
Size = Annotated[int, "SymInt"]
#: A buffer that the operator writes; it then returns nothing.
Written = Annotated[Tensor, "Tensor(a!)"]


class Materialize(NamedTuple):
    """``weights``: one tensor [n3, n1, n2], or n3 tensors [n1, n2], or none.

    ``panels`` is R̂ once more, as `layout.panels` lays it out for the CPU kernels. They make it
    themselves where it is not given, and other kernels ignore it.
    """

    weights: Sequence[Tensor]
    lateral_hat: Tensor
    horizontal_hat: Tensor
    core: Tensor
    scale: float
    out_dtype: torch.dtype
    panels: Tensor | None = None


class MaterializeOut(NamedTuple):
    """As for `Materialize`, and weights may hold several consecutive slices side by side.

    They are then [n1, slices * n2], as GPT-2's fused projection is, and ``out`` is flat: n3 * n1 *
    n2 numbers, the matrices of W_eff one after the other, each of the shape of its layer's weight.
    """

    weights: Sequence[Tensor]
    lateral_hat: Tensor
    horizontal_hat: Tensor
    core: Tensor
    scale: float
    out: Written
    panels: Tensor | None = None


class CoreGradDense(NamedTuple):
    """``grad``: G, [n3, n1, n2]. ``panels``: as for `Materialize`."""

    grad: Tensor
    lateral_hat: Tensor
    horizontal_hat: Tensor
    panels: Tensor | None = None


class CoreGradTokens(NamedTuple):
    """Tokens ``x`` [..., n2] and their ``grad_y`` [..., slices * n1].

    Without ``horizontal_hat``, ``x`` is z [..., q]. Without ``grad_y``, ``x`` is one slice of
    G = dyᵀx, the n1 rows of which are its tokens.

    With ``adapter_ids`` (see `CurLinear`) the result is [adapters, n3, r, r], each core the sum
    over its own tokens, in an order that ids and sizes alone determine. With ``packed`` it is ∂Û
    [n3, r, r] as real planes, not transformed back: ∂Û of a stack's layers add up, and
    ``core_of_packed`` ends the sum, once. One of the two is refused with the other.
    """

    x: Tensor
    grad_y: Tensor | None
    lateral_hat: Tensor
    horizontal_hat: Tensor | None
    n3: int
    slice_index: int
    slices: int
    adapter_ids: Tensor | None = None
    adapters: Size = 1
    packed: bool = False
    bf16_operands: bool = False


class CoreOfPacked(NamedTuple):
    """``packed``: [m, n3, r, r], ∂Û of m layers."""

    packed: Tensor
    scale: float


class CurLinear(NamedTuple):
    """Tokens ``x`` [..., n2], or [..., slices * n1] where ``transposed``.

    ``z``, where it is at hand, is what a forward map by the factors starts from. The gradient of
    the core needs z alone, so ``x`` is not kept then. ``dense_grad`` says to form that gradient by
    way of G = dyᵀx instead of the tokens.

    With ``adapter_ids``, int64 [B], there is a core per token: ``core`` is [A, n3, r, r], the
    flattened tokens of ``x`` are B rows of equal length, and token t goes by core
    ``adapter_ids[t // (tokens / B)]``. ``dense_grad`` is refused with it.
    """

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    lateral_hat: Tensor
    horizontal_hat: Tensor
    core: Tensor
    slice_index: int
    slices: int
    scale: float
    transposed: bool
    z: Tensor | None = None
    dense_grad: bool = False
    adapter_ids: Tensor | None = None
    bf16_operands: bool = False


class WEffLinear(NamedTuple):
    """As for `CurLinear`, with W_eff of these slices for this very core in place of W.

    ``core`` is here for its gradient, and so are ``z``, ``dense_grad`` and ``bf16_operands``.
    """

    x: Tensor
    w_eff: Tensor
    bias: Tensor | None
    lateral_hat: Tensor
    horizontal_hat: Tensor
    core: Tensor
    slice_index: int
    slices: int
    scale: float
    transposed: bool
    z: Tensor | None = None
    dense_grad: bool = False
    bf16_operands: bool = False


A = TypeVar("A", bound=NamedTuple)

_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Sequence[Tensor]: "Tensor[]",
    int: "int",
    float: "float",
    bool: "bool",
    torch.dtype: "ScalarType",
    Size: "SymInt",
    Written: "Tensor(a!)",
}


def schema_of(arguments: type[NamedTuple]) -> str:
    """torch's schema of an operator that takes this record: "(Tensor x, int n3, …) -> Tensor"."""
    hints = get_type_hints(arguments, include_extras=True)
    defaults = arguments._field_defaults
    each = [
        f"{_TYPES[hints[name]]} {name}" + (f"={defaults[name]}" if name in defaults else "")
        for name in arguments._fields
    ]
    return f"({', '.join(each)}) -> {'()' if written_by(arguments) else 'Tensor'}"


def signature_of(arguments: type[NamedTuple]) -> inspect.Signature:
    """The signature of a function of these arguments, in types that torch knows."""
    hints = get_type_hints(arguments)
    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            annotation=hints[name],
            default=arguments._field_defaults.get(name, inspect.Parameter.empty),
        )
        for name in arguments._fields
    ]
    result = None if written_by(arguments) else Tensor
    return inspect.Signature(parameters, return_annotation=result)


def written_by(arguments: type[NamedTuple]) -> tuple[str, ...]:
    """Names of the buffers that an operator with these arguments writes."""
    hints = get_type_hints(arguments, include_extras=True)
    return tuple(name for name in arguments._fields if hints[name] == Written)


# -- derivatives


def gradients(arguments: type[NamedTuple], **by_name: Any) -> tuple[Any, ...]:
    """What a derivative returns: a gradient for some arguments, None for the others."""
    if unknown := by_name.keys() - set(arguments._fields):
        raise TypeError(f"gradients: expected {arguments._fields}, got {sorted(unknown)}")
    return tuple(by_name.get(name) for name in arguments._fields)


def needs_gradient(ctx: Any, arguments: type[NamedTuple]) -> Any:
    """Whether each of the arguments needs a gradient: a record of bools."""
    # torch appends an argument of its own, and leaves out defaults, which need none.
    return arguments._make(
        [*ctx.needs_input_grad, *[False] * len(arguments._fields)][: len(arguments._fields)]
    )


def keep(ctx: Any, arguments: NamedTuple, **is_needed: bool) -> None:
    """Keeps a record for the derivative, without the arguments that are named as not needed."""
    pairs = zip(arguments._fields, arguments, strict=True)
    needed = [each if is_needed.get(name, True) else None for name, each in pairs]
    ctx.save_for_backward(*(each if isinstance(each, Tensor) else None for each in needed))
    ctx.kept = arguments._make(None if isinstance(each, Tensor) else each for each in needed)


def kept(ctx: Any) -> Any:
    """The record that `keep` was given. To be called once: checkpointing allows no second look."""
    pairs = zip(ctx.saved_tensors, ctx.kept, strict=True)
    return ctx.kept._make(other if tensor is None else tensor for tensor, other in pairs)


# -- operators


@dataclass(frozen=True)
class Derivative(Generic[A]):
    """A derivative of first order, made of other operators; they have the further ones.

    Attributes:
        backward: ``backward(ctx, grad, language)``, which returns `gradients`. It calls operators
            by `run`, in the language that its own operator was called in.
        save: ``save(ctx, arguments)`` before that, for instance by `keep`.
    """

    backward: Callable[[Any, Tensor, str], tuple[Any, ...]]
    save: Callable[[Any, A], None] = lambda ctx, arguments: None


@dataclass(frozen=True)
class Operator(Generic[A]):
    """All that is told of an operator in Python; every part of it takes the record of arguments.

    Attributes:
        name: ``tcur::name``.
        arguments: the record.
        check: refuses arguments that do not fit together. Every language but the compiled ones, and
            every fake, runs it first; the compiled ones have ``csrc/common/check.h``.
        fake: the result without its numbers: shape, dtype, device.
        plain: the kernel in plain torch, for any device, which functorch and forward mode can
            transform. It is the reference.
        flops: multiplications and additions; the record has the shapes of tensors here.
        derivative: None if there is none.
        is_fresh: whether results may come from products of torch, which return views of their own
            results; see `_register_fresh_results`.
        serves_all: whether the plain kernel is that of every language.
    """

    name: str
    arguments: type[A]
    fake: Callable[[A], Tensor | None]
    plain: Callable[[A], Tensor | None]
    flops: Callable[[Any], int]
    derivative: Derivative[A] | None = None
    check: Callable[[A], None] = lambda arguments: None
    is_fresh: bool = False
    serves_all: bool = False
    schema: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "schema", schema_of(self.arguments))


#: All operators by name.
OPERATORS: dict[str, Operator[Any]] = {}

_name_of: dict[type[NamedTuple], str] = {}
_library = torch.library.Library("tcur", "DEF")


def add(entry: Operator[Any]) -> None:
    """Defines an operator: in the reference with its kernel, for compiled kernels without."""
    OPERATORS[entry.name] = entry
    _name_of[entry.arguments] = entry.name
    for language in (*LANGUAGES, CUDA_TF32):
        _define(entry, language)
        _complete(entry, language)


def add_language(language: str) -> None:
    """Defines every operator in a further language, for kernels that are registered elsewhere."""
    for entry in OPERATORS.values():
        _define(entry, language)
        _complete(entry, language)


def complete(language: str) -> None:
    """Gives the operators that a language has defined itself their fakes, derivatives, autocast.

    It may lack some.
    """
    for entry in OPERATORS.values():
        if entry.serves_all:
            _define(entry, language)
        if torch._C._dispatch_has_kernel(qualified(entry.name, language)):
            _complete(entry, language)


def operator(name: str, language: str = "") -> torch._ops.OpOverload:
    """The registered operator ``tcur::name`` in one language."""
    found: torch._ops.OpOverload = getattr(torch.ops.tcur, _full_name(name, language)).default
    return found


def has_kernel(name: str, language: str, device_type: str) -> bool:
    """Whether a language has a kernel of an operator for tensors on a type of devices."""
    full_name = qualified(name, language)
    if not torch._C._dispatch_has_kernel(full_name):
        return False
    dispatch_keys = (torch._C._dispatch_key_for_device(device_type), "CompositeExplicitAutograd")
    return any(
        torch._C._dispatch_has_kernel_for_dispatch_key(full_name, key) for key in dispatch_keys
    )


# Kernels are registered when libraries are loaded: for a traced graph the answer is a constant.
# This is what `torch.compiler.assume_constant_result` does, but that imports the compiler.
has_kernel._dynamo_marked_constant = True  # type: ignore[attr-defined]


def nearest(name: str, language: str, device: torch.device) -> torch._ops.OpOverload:
    """An operator in a language, or in the reference where that language has no kernel of it."""
    is_here = has_kernel(name, language, device.type)
    return operator(name, language if is_here else "reference")


def run(language: str, arguments: NamedTuple) -> Any:
    """Calls the operator that takes such a record, `nearest` to a language."""
    device = next(each.device for each in arguments if isinstance(each, Tensor))
    return nearest(_name_of[type(arguments)], language, device)(*arguments)


def plain(name: str) -> Callable[..., Any]:
    """An operator as plain torch, which functorch and forward mode can transform.

    Its derivatives are those of the mathematics: z and ``dense_grad`` change nothing, and W_eff
    handed over would hide the core.
    """
    return _of_arguments(OPERATORS[name], OPERATORS[name].plain)


# -- registration


def qualified(name: str, language: str) -> str:
    """The full name, as torch has it."""
    return f"tcur::{_full_name(name, language)}"


def _full_name(name: str, language: str) -> str:
    return f"{name}_{language}" if language else name


def _of_arguments(entry: Operator[Any], function: Callable[[Any], Any]) -> Callable[..., Any]:
    """A function of the record as one of arguments."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(entry.arguments(*args, **kwargs))

    return call


def checked(entry: Operator[Any], function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function of the record that refuses what does not fit together first."""
    hints = get_type_hints(entry.arguments, include_extras=True)
    required = [name for name, hint in hints.items() if hint in (Tensor, Written)]

    def run(arguments: Any) -> Any:
        for name in required:  # torch takes None for any tensor
            if getattr(arguments, name) is None:
                raise TypeError(f"{name}: expected a torch.Tensor, got None")
        entry.check(arguments)
        return function(arguments)

    return run


def _define(entry: Operator[Any], language: str) -> None:
    torch.library.define(qualified(entry.name, language), entry.schema, lib=_library)
    if entry.serves_all or language == "reference":
        kernel = _of_arguments(entry, checked(entry, entry.plain))
        _library.impl(_full_name(entry.name, language), kernel, "CompositeExplicitAutograd")


def _complete(entry: Operator[Any], language: str) -> None:
    """Gives a defined operator what it has in every language."""
    name = qualified(entry.name, language)
    fake = _of_arguments(entry, checked(entry, entry.fake))
    torch.library.register_fake(name, fake, lib=_library)
    _register_autocast(entry.name, language)
    if entry.is_fresh:
        _register_fresh_results(entry.name, language)
    if entry.derivative is not None:
        _register_derivative(entry, entry.derivative, language)
    elif not written_by(entry.arguments):
        _register_derivative(entry, Derivative(_refuse_for(entry.name)), language)
    packet = operator(entry.name, language).overloadpacket
    flops.count(packet, _of_arguments(entry, entry.flops))


def _refuse_for(name: str) -> Callable[..., tuple[Any, ...]]:
    """The backward of an operator that has none: no gradient, rather than one that is wrong."""

    def backward(ctx: Any, grad: Tensor, language: str) -> tuple[Any, ...]:
        raise RuntimeError(f"tcur: {name} has no derivative")

    return backward


def _register_derivative(entry: Operator[Any], derivative: Derivative[Any], language: str) -> None:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        derivative.save(ctx, entry.arguments(*inputs))

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return derivative.backward(ctx, grad, language)

    torch.library.register_autograd(
        qualified(entry.name, language), backward, setup_context=setup_context, lib=_library
    )


def _register_autocast(name: str, language: str) -> None:
    """An operator decides its own precision: autocast must not reach the products inside it."""

    def decided(device: torch.device) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with outside_autocast(device):
                return operator(name, language)(*args, **kwargs)

        return call

    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _library.impl(_full_name(name, language), decided(torch.device(device_type)), key)


def _register_fresh_results(name: str, language: str) -> None:
    """Results are no views of what a kernel made, so that they may be changed in place.

    The products of torch within a kernel return views of their own results, of which autograd
    would take note.
    """

    def call(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(VIEWS):
            return operator(name, language)(*args)

    _library.impl(_full_name(name, language), call, "ADInplaceOrView")
