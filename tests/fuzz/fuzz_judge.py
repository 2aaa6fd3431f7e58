"""Whether a call did right: its numbers, its inputs, its warnings, the words of its refusal."""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from tolerance import ORACLE, assert_close, assert_composition_close, relative_error

RIGHT, REFUSED = "right", "refused"

#: What a call may raise. Anything else is a fault: AssertionError, KeyError, AttributeError, …
ERRORS = (ValueError, TypeError, RuntimeError, NotImplementedError, IndexError, OverflowError)
ERRORS += (FileNotFoundError,)  # of a path that was given

#: Words that a user can do nothing with.
UNCLEAR = re.compile(
    r"INTERNAL ASSERT|MKL|\bbug\b|out of bounds memory|unordered_map|vector::|std::|"
    r"object has no attribute|object is not (callable|iterable|subscriptable)|list index|"
    r"unsupported operand|bad_alloc|not implemented for|unpack",
    re.IGNORECASE,
)
#: What torch says of sizes that no memory has, and of devices that are not here.
#: And what a model says of a batch that does not fit it.
TORCHS = re.compile(
    r"calculation overflowed|allocate memory|negative dimension|accelerator device|"
    r"mat1 and mat2|size of tensor|expected input|is not on the expected device|"
    r"Expected 2D \(unbatched\)|need to be at least 1D"
)
#: What numpy says of numbers without an end, by which Triton's interpreter computes.
OF_NUMPY = re.compile("(overflow|invalid value|divide by zero) encountered")
#: The form of every refusal of a public function: what, and then what was expected, or why.
NAMED = re.compile(r"^[\w.,\[\]* '\"]+: \S.*(expected|got|is not|cannot)", re.DOTALL)


class Wrong(AssertionError):
    """A call that did not do right."""


@dataclass
class Call:
    """One call, made but not yet run.

    Attributes:
        name: of the operator or function.
        backend: that computes it.
        run: computes it, and returns tensors, or what else it makes.
        judge: raises `Wrong` or AssertionError if what it returned is not right.
        inputs: tensors that must be as they were afterwards.
        is_public: whether a refusal must have the form of the package.
        refusable: whether an argument is wrong on purpose, so that the call may be refused.
        context: a function that returns what the call runs in.
        on_refusal: is asked when a call is refused, with the error.
        text: what tells a reader what the call was.
    """

    name: str
    backend: str
    run: Callable
    judge: Callable
    inputs: list = field(default_factory=list)
    is_public: bool = False
    refusable: bool = False
    context: Callable = None
    on_refusal: Callable = None
    text: str = ""
    again: bool = True


def verdict(call):
    """`RIGHT` or `REFUSED`.

    Raises:
        Wrong, AssertionError: the call was neither.
    """
    before = [_bytes(each) for each in call.inputs]
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        try:
            found = _in_context(call)
            error = None
        except ERRORS as raised:
            found, error = None, raised
        except Exception as raised:
            raise Wrong(f"raised {type(raised).__name__}: {raised}") from raised
    for note in noted:
        if call.backend != "triton_interpreted" or not OF_NUMPY.match(str(note.message)):
            raise Wrong(f"warned: {note.message}")
    for one, was in zip(call.inputs, before, strict=True):
        if not torch.equal(_bytes(one), was):
            raise Wrong(f"changed an input of shape {list(one.shape)}")
    if error is not None:
        _check_error(call, error)
        if call.on_refusal is not None:
            call.on_refusal(error)
        return REFUSED
    call.judge(found)
    if call.again and is_small(found) and not same_bits(found, _in_context(call)):
        raise Wrong("the same call gave other bits")
    return RIGHT


def _in_context(call):
    if call.context is None:
        return call.run()
    with call.context():
        return call.run()


def _check_error(call, error):
    words = str(error)
    if not call.refusable:
        raise Wrong(f"refused what is right: {type(error).__name__}: {words}") from error
    if UNCLEAR.search(words) or len(words) < 8:
        raise Wrong(f"unclear refusal: {type(error).__name__}: {words}") from error
    is_known = TORCHS.search(words) or _is_pythons_own(words)
    if call.is_public and not NAMED.match(words) and not is_known:
        raise Wrong(f"refusal that names nothing: {type(error).__name__}: {words}") from error


def _is_pythons_own(words):
    """An argument that is missing or unknown is Python's to refuse."""
    return "argument" in words and "()" in words


def _bytes(tensor):
    """All bytes of the memory that a tensor is a part of."""
    if tensor.device.type == "meta" or tensor.layout != torch.strided:
        return torch.zeros(0)
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage).clone()


#: Bytes of a result that is computed twice: both are held at once.
TWICE = 1 << 30


def is_small(found):
    """Whether there is memory for more of these."""
    return sum(each.numel() * each.element_size() for each in tensors_in(found)) <= TWICE


def upstream(y):
    """A gradient of a result, of numbers that every dtype holds.

    It has no period: over repeated tokens, sums of whole periods cancel, and only rounding is left.
    """
    generator = torch.Generator("cpu").manual_seed(y.numel())
    whole = torch.randint(-12, 13, y.shape, generator=generator, device="cpu")
    return (whole.double() / 8).to(y)


def tensors_in(found):
    """The tensors of what a call returned, in order."""
    if isinstance(found, torch.Tensor):
        return [found]
    if isinstance(found, (list, tuple)):
        return [each for part in found for each in tensors_in(part)]
    return []


def same_bits(one, other):
    """Whether two results have the same bits, NaN included."""
    pairs = list(zip(tensors_in(one), tensors_in(other), strict=True))
    return all(_same_bits(a, b) for a, b in pairs) and (bool(pairs) or repr(one) == repr(other))


def _same_bits(a, b):
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        return False
    if a.device.type == "meta" or a.layout != torch.strided:
        return True
    a, b = a.detach().contiguous(), b.detach().contiguous()
    return torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def expect_like(actual, same, *, is_contiguous=True):
    """Shape, dtype and layout of a result."""
    found, wanted = (actual.shape, actual.dtype), (same.shape, same.dtype)
    if found != wanted:
        raise Wrong(f"expected {wanted}, got {found}")
    if is_contiguous and not actual.is_contiguous():
        raise Wrong(f"not contiguous: {list(actual.shape)} with strides {actual.stride()}")


#: Of results of so few numbers, or made of so few, one sample says little: terms may cancel, or
#: torch be exact.
FEW = 64
#: How many calls with other numbers are then looked at as one.
SAMPLES = 64


def renewed(value):
    """Other numbers in the same places of memory."""
    there = value.untyped_storage().nbytes() // value.element_size()
    numbers = torch.randn(there, dtype=torch.float64).to(value.dtype)
    return numbers.as_strided(value.shape, value.stride(), value.storage_offset())


def is_of_few(result, given):
    """Whether a result or a tensor that it was made of has few numbers."""
    made_of = (each for each in tensors_in([*given.values()]) if each.is_floating_point())
    return min(each.numel() for each in (result, *made_of)) <= FEW


def expect_close(actual, same, exact, plain=None, fresh=None):
    """The bound of one operator, or of a composition where chance makes that too strict.

    ``same`` is plain torch at the dtypes of the call, and ``plain`` computes it again, in as many
    orders as are asked for. Both bounds are those of norms of many numbers. Where there are few
    (`is_of_few`), callers give ``fresh``: a result that exceeds both bounds is then looked at once
    more, with other numbers. ``fresh`` repeats the very call with them, and gives its three
    results. Those of all repetitions are compared as one result of many numbers.
    """
    try:
        _expect_close(actual, same, exact, plain)
    except Wrong:
        if fresh is None:
            raise
        _expect_close(*repeated(fresh))


def repeated(fresh):
    """The three results of so many repetitions, each as one result."""
    of_all = zip(*(fresh() for _ in range(SAMPLES)), strict=True)
    return [torch.cat([one.detach().flatten() for one in each]) for each in of_all]


def _expect_close(actual, same, exact, plain=None):
    actual, same, exact = actual.detach(), same.detach(), exact.detach()
    if not bool(torch.isfinite(same).all()) or not bool(torch.isfinite(exact).all()):
        _expect_not_finite_alike(actual, same)
        return
    if torch.equal(exact.float().double(), exact):  # numbers of fp32: nothing was rounded
        eps = torch.finfo(actual.dtype).eps
        error, own = relative_error(actual, exact), relative_error(same, exact)
        if error > 2 * own + 2 * eps + ORACLE:
            raise Wrong(f"relative error {error:.3g} where plain torch has {own:.3g}")
        return
    try:
        assert_close(actual, same, exact)
    except AssertionError as error:
        if plain is None:
            raise Wrong(str(error)) from error
        try:
            assert_composition_close(actual, plain, exact)
        except AssertionError as again:
            raise Wrong(str(again)) from again


def _expect_not_finite_alike(actual, same):
    """Beyond the largest number of a dtype: where plain torch is finite, so is the result."""
    if bool((torch.isfinite(same) & ~torch.isfinite(actual)).any()):
        share = torch.isfinite(same).double().mean()
        raise Wrong(f"not finite where plain torch is ({share:.2f} of its numbers)")


def same_up_to_rounding(actual, wanted):
    """Whether two results agree in half of their digits, and are no numbers in the same places."""
    if (actual.shape, actual.dtype) != (wanted.shape, wanted.dtype):
        return False
    if "meta" in (actual.device.type, wanted.device.type):
        return actual.device == wanted.device
    actual, wanted = actual.detach(), wanted.detach()
    if not bool(torch.isfinite(wanted).all()):
        return bool(((actual.isfinite() == wanted.isfinite()) | ~wanted.isfinite()).all())
    largest = wanted.double().abs().max() if wanted.numel() else 1.0
    if largest < 1e-30:  # numbers of fewer digits than others
        return True
    unit = largest  # squares of large numbers are no numbers any more
    error = relative_error(actual.double() / unit, wanted.double() / unit)
    # A buffer may be of a wider dtype than what is computed into it.
    eps = max(torch.finfo(actual.dtype).eps, torch.finfo(torch.float32).eps)
    return error <= eps**0.5
