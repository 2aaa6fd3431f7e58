"""Streams and captured graphs: everything that this package asks CUDA about them."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


def are_used(device: torch.device) -> bool:
    """Whether work on the device is queued on streams, which run independently of each other."""
    return device.type == "cuda"


def capture_of(device: torch.device) -> int:
    """The number of the capture that the current stream takes part in, or 0 if there is none.

    It is -1 if the driver cannot tell one capture from another.
    """
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return 0
    stream = torch.cuda.current_stream(device).cuda_stream
    status, number = ctypes.c_int(), ctypes.c_uint64()
    info = _capture_info()
    if info is None or info(stream, ctypes.byref(status), ctypes.byref(number)):
        return -1
    return number.value


@functools.cache
def _capture_info() -> Callable[..., int] | None:
    """The driver's function; torch has none that tells captures apart."""
    try:
        function = ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo
    except (OSError, AttributeError):  # ROCm, or another system
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    found: Callable[..., int] = function
    return found


def current(device: torch.device) -> int:
    """The current stream as a number, to be compared with others."""
    if not are_used(device):
        return 0
    handle: int = torch._C._cuda_getCurrentRawStream(device.index)
    return handle


class Mark(NamedTuple):
    """A point in the work of a stream."""

    stream: Any
    event: Any


def mark(device: torch.device) -> Mark:
    """Marks the point after all work that was queued on the current stream so far."""
    stream = torch.cuda.current_stream(device)
    return Mark(stream, stream.record_event())


def wait_for(mark: Mark, tensor: Tensor) -> Any:
    """Makes the current stream wait for a mark before it uses a tensor; returns the stream."""
    stream = torch.cuda.current_stream(tensor.device)
    stream.wait_event(mark.event)
    tensor.record_stream(stream)
    return stream


def wait_for_stream(stream: Any) -> None:
    """Makes the current stream wait until another one has finished the work queued so far."""
    torch.cuda.current_stream(stream.device).wait_stream(stream)
