"""Where the cores of a store wait: in memory, or in a file without a name."""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..files.whole import without_name
from ..processes import tell_of_forks


class Waiting(Protocol):
    """Keeps the cores of many adapters, by a number for each."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, in memory or in its file."""

    def put(self, cores: Mapping[str, Tensor]) -> int:
        """Keeps cores, and returns their number."""

    def get(self, number: int) -> dict[str, Tensor]:
        """Reads cores back."""

    def drop(self, number: int) -> None:
        """Forgets cores."""


class InMemory:
    """Cores as tensors in the memory of the host; several threads may put some at the same time."""

    def __init__(self) -> None:
        self._kept: dict[int, dict[str, Tensor]] = {}
        self._numbers = itertools.count()

    @property
    def nbytes(self) -> int:
        """Bytes of all cores."""
        every = list(self._kept.values())  # others may put some meanwhile
        return sum(core.nbytes for cores in every for core in cores.values())

    def put(self, cores: Mapping[str, Tensor]) -> int:
        """Keeps copies of cores."""
        number = next(self._numbers)
        self._kept[number] = {
            name: core.to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, core in cores.items()
        }
        return number

    def get(self, number: int) -> dict[str, Tensor]:
        """The cores of that number."""
        return self._kept[number]

    def drop(self, number: int) -> None:
        """Forgets the cores of that number."""
        del self._kept[number]


class InFile:
    """Cores in a temporary file: records of one length, one after another.

    The file has no name, so nobody else can change it, and it is gone when the process ends.
    Records of adapters that were dropped are used again. A forked process shares the file: it reads
    what was there and writes nothing, and what it may read is never written again.

    Args:
        directory: on whose file system the file is.
        like: cores of the shapes and dtypes of all others, by stack name.

    Raises:
        FileNotFoundError: there is no such directory.
    """

    def __init__(self, directory: str | Path, like: Mapping[str, Tensor]) -> None:
        if not Path(directory).is_dir():
            raise FileNotFoundError(f"directory: expected a directory, got none at {directory}")
        self._directory = Path(directory)
        self._file = without_name(self._directory)
        weakref.finalize(self, os.close, self._file)
        self._lock = threading.Lock()
        self._like = {name: (core.shape, core.dtype, core.nbytes) for name, core in like.items()}
        self._length = sum(nbytes for _, _, nbytes in self._like.values())
        self._count = 0
        self._free: list[int] = []
        #: So many records are those of a forked process, too.
        self._shared = 0
        self._is_child = False
        tell_of_forks(self)

    def was_forked(self, is_child: bool) -> None:
        """Both processes keep the records as they are."""
        if is_child:
            self._lock, self._is_child = threading.Lock(), True
        self._shared = self._count
        self._free = []

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return self._count * self._length

    def put(self, cores: Mapping[str, Tensor]) -> int:
        """Writes cores to a free record, or behind the last one.

        Raises:
            OSError: the disk is full, or fails. Other cores are as they were.
            RuntimeError: this process was forked from the one that made the file.
        """
        if self._is_child:
            raise RuntimeError(
                "directory: expected the process that made the store, got one that was forked from "
                "it, which would write into the same file; make a store in this process"
            )
        parts = [
            cores[name].to("cpu", dtype).contiguous().view(torch.uint8).numpy().tobytes()
            for name, (_, dtype, _) in self._like.items()
        ]
        with self._lock:
            number = self._free.pop() if self._free else self._count
            try:
                _write(self._file, b"".join(parts), number * self._length)
            except BaseException as error:
                if number < self._count:
                    self._free.append(number)
                if isinstance(error, OSError):  # it knows no path
                    raise OSError(error.errno, error.strerror, self._directory) from error
                raise
            self._count = max(self._count, number + 1)
        return number

    def get(self, number: int) -> dict[str, Tensor]:
        """Reads the cores of a record.

        Raises:
            OSError: the file cannot be read, or ends within the record.
        """
        read = _read(self._file, self._length, number * self._length)
        if len(read) != self._length:
            raise OSError(
                f"directory: expected {self._length} bytes of cores, got {len(read)} of the file "
                f"without a name in {self._directory}"
            )
        cores, begin = {}, 0
        for name, (shape, dtype, nbytes) in self._like.items():
            part = bytearray(read[begin : begin + nbytes])
            cores[name] = torch.frombuffer(part, dtype=dtype).view(shape)
            begin += nbytes
        return cores

    def drop(self, number: int) -> None:
        """Frees a record."""
        with self._lock:
            if number >= self._shared:
                self._free.append(number)


def _write(file: int, data: bytes, offset: int) -> None:
    left = memoryview(data)
    while left:
        written = os.pwrite(file, left, offset)
        left, offset = left[written:], offset + written


def _read(file: int, length: int, offset: int) -> bytes:
    """So many bytes, or fewer at the end of the file: one call reads 2 GiB at most."""
    parts: list[bytes] = []
    while length > 0 and (part := os.pread(file, length, offset)):
        parts.append(part)
        length, offset = length - len(part), offset + len(part)
    return b"".join(parts)
