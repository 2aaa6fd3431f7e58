"""Reads one safetensors file: every size in it is checked before memory is taken for it.

The file is read and never mapped. The pages of a mapped file are those of the disk: if somebody
cuts the file, the next look at them kills the process (SIGBUS), and what was verified may change
afterwards.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .parsing import MAX_BYTES, Source, check_name, decoded, open_regular, parse, shown

#: The dtypes of the format. Those of less than a byte cannot be read.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

#: Bits of a number of the dtypes that have less than a byte.
_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}

#: How many bytes one call of the system reads; Linux reads less than 2 GiB.
_AT_ONCE = 1 << 30


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: its dtype, as the format calls it, its shape, and where it is."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """An open safetensors file; use it in a ``with`` statement, or ``close`` it.

    Args:
        path: the file.
        argument: the name of the path in errors.

    Attributes:
        path: as given.
        entries: name of a tensor -> `Entry`, in the order of the header.
        metadata: what the header holds beside tensors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, damaged or another thing; the message says what.
    """

    def __init__(self, path: Path, argument: str) -> None:
        self.path, self._source = path, Source(argument, path)
        self._file = open_regular(self._source)
        try:
            self._state = self._state_now()
            self.entries, self.metadata = self._header()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; what was read of its header stays."""
        self._file.close()

    @contextmanager
    def again(self) -> Iterator[TensorFile]:
        """Opens the file once more, without reading its header again.

        Raises:
            FileNotFoundError, ValueError: it is gone, or another one by now.
        """
        other = copy.copy(self)
        other._file = open_regular(self._source)
        with other:
            other.check_unchanged()
            yield other
            other.check_unchanged()

    def check_unchanged(self) -> None:
        """Refuses a file that is not as it was when its header was read.

        Raises:
            ValueError: it was replaced, written to, or cut.
        """
        now = self._state_now()
        if now != self._state:
            how = "shorter" if now[2] < self._state[2] else "changed"
            raise self._source.error("the file as it was when it was first read", f"a {how} one")

    def read(self, name: str) -> Tensor:
        """Reads a tensor into memory of its own."""
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise self._source.error(
                f"a dtype of {', '.join(DTYPES)} in {shown(name)}", entry.dtype
            )
        try:
            tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="cpu")
        except RuntimeError as error:
            raise self._source.error(
                f"numbers that fit into memory in {shown(name)}",
                f"{entry.end - entry.begin:,} bytes",
            ) from error
        numbers = tensor.flatten().view(torch.uint8)
        self.fill(numbers, entry.begin)
        if entry.dtype == "BOOL" and numbers.numel() and int(numbers.max()) > 1:
            raise self._source.error(f"bytes of 0 or 1 in {shown(name)}", "others")
        return tensor

    def fill(self, numbers: Tensor, place: int) -> None:
        """Fills a contiguous tensor with the bytes that begin at an offset of the file.

        Raises:
            ValueError: the file ends before.
        """
        if numbers.numel() == 0:
            return
        buffer = numbers.flatten().view(torch.uint8).numpy().data
        self._file.seek(place)
        done = 0
        while done < len(buffer):
            try:
                count = self._file.readinto(buffer[done : done + _AT_ONCE])
            except OSError as error:
                raise self._source.error("a file that can be read", error.strerror) from error
            if not count:
                raise self._source.error(
                    "the file as it was when it was first read", "a shorter one"
                )
            done += count

    def _state_now(self) -> tuple[int, ...]:
        found = os.fstat(self._file.fileno())
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

    def _bytes(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count and (part := self._file.read(count - len(data))):
            data += part
        return bytes(data)

    def _header(self) -> tuple[dict[str, Entry], dict[str, str]]:
        """The format is: the length of the header in 8 bytes, the header as JSON, the numbers."""
        size = self._state[2]
        length = int.from_bytes(self._bytes(8), "little")
        if size < 10 or not 2 <= length <= size - 8:
            raise self._torn(f"a header of {length} bytes in a file of {size}")
        if length > MAX_BYTES:
            raise self._torn(f"a header of {length} bytes, more than {MAX_BYTES}")
        try:
            text = decoded(self._bytes(length), self._source)
            found = parse(text, self._source, "the header")
        except ValueError as error:
            raise self._torn(str(error)) from error
        if not isinstance(found, dict):
            raise self._torn("no object as header")
        metadata = found.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise self._torn("metadata that are no texts")
        entries = {}
        for name, entry in found.items():
            check_name(name, self._source, "that of a tensor")
            entries[name] = self._entry(name, entry, 8 + length)
        self._check_cover(entries, 8 + length, size)
        return entries, metadata

    def _entry(self, name: str, entry: Any, start: int) -> Entry:
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._torn(f"no dtype, shape and offsets of {shown(name)}")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or (dtype not in DTYPES and dtype not in _BITS):
            raise self._torn(f"dtype {shown(dtype)} of {shown(name)}")
        for what, numbers in (("shape", shape), ("offsets", offsets)):
            if not isinstance(numbers, list) or not all(map(_is_size, numbers)):
                raise self._torn(f"{what} of {shown(name)} that are no sizes")
        bits = _BITS[dtype] if dtype in _BITS else 8 * DTYPES[dtype].itemsize
        if len(shape) > 64 or math.prod(n for n in shape if n) >= 2**63:
            raise self._torn(f"a shape of {shown(name)} that no tensor can have")
        if len(offsets) != 2 or 8 * (offsets[1] - offsets[0]) != bits * math.prod(shape):
            raise self._torn(f"{shape} numbers of {dtype} from {offsets} in {shown(name)}")
        return Entry(dtype, tuple(shape), start + offsets[0], start + offsets[1])

    def _check_cover(self, entries: dict[str, Entry], start: int, size: int) -> None:
        """The tensors lie one after another, without a gap, up to the end of the file."""
        end = start
        for name, entry in sorted(entries.items(), key=lambda own: (own[1].begin, own[1].end)):
            if entry.begin != end:
                raise self._torn(f"{shown(name)} at {entry.begin}, after {end} bytes")
            end = entry.end
        if end != size:
            raise self._torn(f"{size} bytes, of which tensors take {end}")

    def _torn(self, why: str) -> ValueError:
        return ValueError(
            f"{self._source.argument}: expected a whole safetensors file, got a truncated or "
            f"foreign one at {self.path} ({why})"
        )


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
