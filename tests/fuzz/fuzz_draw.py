"""What a call of the fuzzer is made of: choices, layouts of tensors, contexts, wrong arguments.

Everything follows from two integers, a seed and the number of the call.
"""

import contextlib
import random

import torch
from torch.utils.flop_counter import FlopCounterMode


class Draw(random.Random):
    """The choices of one call, and the text that tells of them."""

    def __init__(self, seed, index):
        super().__init__(f"{seed}-{index}")
        self.text = []

    def one_of(self, *values):
        return values[self.randrange(len(values))]

    def chance(self, probability):
        return self.random() < probability

    def note(self, *words):
        """Adds words to the description of the call."""
        self.text.append(" ".join(map(str, words)))


# -- layouts: the same numbers, somewhere else in memory


def turned(tensor):
    """The last two dimensions exchanged in memory."""
    return tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor


def every_second(tensor):
    """With other numbers between them."""
    return torch.stack([tensor, torch.full_like(tensor, 7)], -1)[..., 0]


def shifted(tensor):
    """Contiguous, from an address that is no multiple of a vector, with more behind."""
    flat = torch.cat([tensor.new_zeros(3), tensor.flatten(), tensor.new_ones(5)])
    return flat[3 : 3 + tensor.numel()].view(tensor.shape)


def cut_out(tensor):
    """A part of a larger tensor, in every dimension."""
    if tensor.ndim == 0:
        return tensor
    larger = tensor.new_full([size + 2 for size in tensor.shape], 5)
    part = larger[tuple(slice(1, 1 + size) for size in tensor.shape)]
    return part.copy_(tensor)


def mixed_up(tensor):
    """The dimensions in the reverse order in memory."""
    order = list(range(tensor.ndim))[::-1]
    return tensor.permute(order).contiguous().permute(order)


def contiguous(tensor):
    """In memory of its own."""
    return tensor.clone(memory_format=torch.contiguous_format)


LAYOUTS = (contiguous, turned, every_second, shifted, cut_out, mixed_up)


# -- repetitions: other numbers, several of them in one place of the memory


def expanded(tensor, dim):
    """The first entry along a dimension, repeated without memory."""
    return tensor.narrow(dim, 0, 1).expand(tensor.shape)


def windows(tensor):
    """Every dimension moves on by one number, so that nearly all numbers overlap."""
    if 0 in tensor.shape:
        return tensor
    flat = tensor.flatten()[: sum(tensor.shape) - tensor.ndim + 1]
    return flat.as_strided(tensor.shape, [1] * tensor.ndim)


# -- contexts


def _autocast(dtype):
    return lambda: torch.autocast("cpu", dtype=dtype)


@contextlib.contextmanager
def _not_deterministic():
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True)


#: Around a call. Empty tensors are full of NaN but in the one that turns this off.
CONTEXTS = {
    "none": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast_bf16": _autocast(torch.bfloat16),
    "autocast_fp16": _autocast(torch.float16),
    "not_deterministic": _not_deterministic,
    "default_meta": lambda: torch.device("meta"),
    "counted": lambda: FlopCounterMode(display=False),
}
#: Of these no gradient is asked for.
WITHOUT_GRADIENTS = ("no_grad", "inference_mode")


# -- wrong arguments


INTEGERS = (-1, 0, 1, 2, 2**31, 2**32 + 1, 2**62, 2**63 - 1, -(2**63), 2**63)
NO_NUMBERS = (None, "one", 1.5, [1], float("nan"), True)
NO_TENSORS = (None, 3, 2.5, "tensor", [1.0, 2.0], torch.Size([2]))


def wrong_tensor(draw, tensor):
    """Something like the tensor that does not fit, or is no tensor at all."""
    changes = {
        "narrower": lambda: tensor[..., :-1],
        "shorter": lambda: tensor[1:],
        "empty at the end": lambda: tensor[..., :0],
        "empty at the start": lambda: tensor[:0],
        "one axis more": lambda: tensor[None],
        "one axis less": lambda: tensor[0],
        "flat": lambda: tensor.flatten(),
        "a number": lambda: tensor.sum().to(tensor.dtype),
        "transposed": lambda: tensor.mT,
        "one more at the end": lambda: torch.cat([tensor, tensor[..., :1]], -1),
        "int64": lambda: tensor.to(torch.int64),
        "bool": lambda: tensor.to(torch.bool),
        "complex64": lambda: tensor.to(torch.complex64),
        "float64": lambda: tensor.to(torch.float64),
        "float32": lambda: tensor.to(torch.float32),
        "float16": lambda: tensor.to(torch.float16),
        "bfloat16": lambda: tensor.to(torch.bfloat16),
        "float8": lambda: tensor.to(torch.float8_e4m3fn),
        "meta": lambda: tensor.to("meta"),
        "sparse": lambda: tensor.to_sparse(),
        "no tensor": lambda: draw.one_of(*NO_TENSORS),
    }
    name = draw.one_of(*changes)
    draw.note(name)
    try:
        return changes[name]()
    except (RuntimeError, IndexError, TypeError, NotImplementedError):  # of so few dimensions
        return tensor.new_zeros(0)


def wrong_value(draw, value):
    """Something that does not fit in place of an argument, whatever it is."""
    if isinstance(value, torch.Tensor):
        return wrong_tensor(draw, value)
    if isinstance(value, bool):
        found = draw.one_of(not value, None, 2, "yes")
    elif isinstance(value, int):
        found = draw.one_of(*INTEGERS, value + 1, value - 1, *NO_NUMBERS)
    elif isinstance(value, float):
        nan, inf = float("nan"), float("inf")
        found = draw.one_of(nan, inf, -inf, 1e300, -0.0, 5e-324, 10**400, None, "one", [0.5])
    elif isinstance(value, torch.dtype):
        found = draw.one_of(torch.int32, torch.complex64, torch.bool, torch.float8_e5m2, None, "x")
    elif isinstance(value, (list, tuple)):
        return wrong_list(draw, list(value))
    elif value is None:
        found = draw.one_of(torch.ones(2, 3), torch.zeros(0), 1, "none", torch.ones(3).long())
    else:
        found = draw.one_of(None, 1, "wrong", torch.ones(2))
    draw.note(type(found).__name__ if isinstance(found, torch.Tensor) else repr(found)[:30])
    return found


def wrong_list(draw, values):
    """A list with something too much, too little, or wrong in it."""
    change = draw.one_of("shorter", "longer", "empty", "no list", "of None", "one wrong")
    draw.note(change)
    if change == "shorter":
        return values[:-1]
    if change == "longer":
        return [*values, *values[:1]]
    if change == "empty":
        return []
    if change == "no list":
        return draw.one_of(None, 3, "list")
    if change == "of None" or not values:
        return [None] * len(values)
    place = draw.randrange(len(values))
    return [*values[:place], wrong_value(draw, values[place]), *values[place + 1 :]]
