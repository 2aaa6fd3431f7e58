"""What is asked of CUDA about streams and captured graphs, all in one place."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


def are_used(device: torch.device) -> bool:
    """Whether work on the device goes by streams, which run past each other."""
    return device.type == "cuda"


def capture_of(device: torch.device) -> int:
    """The number of the capture that the current stream takes part in, 0 outside of any.

    -1 where the driver does not tell one capture from another.
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
    """A place in a stream's work."""

    stream: Any
    event: Any


def mark(device: torch.device) -> Mark:
    """Behind all that the current stream was given so far."""
    stream = torch.cuda.current_stream(device)
    return Mark(stream, stream.record_event())


def wait_for(mark: Mark, tensor: Tensor) -> Any:
    """Lets the current stream, which is returned, use a tensor of another one from a mark on."""
    stream = torch.cuda.current_stream(tensor.device)
    stream.wait_event(mark.event)
    tensor.record_stream(stream)
    return stream


def wait_for_stream(stream: Any) -> None:
    """Lets the current stream write what another one has used so far."""
    torch.cuda.current_stream(stream.device).wait_stream(stream)
