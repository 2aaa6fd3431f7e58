"""JSON that others may have damaged, or written to do harm: read within bounds, or refused.

Every error is a ``ValueError`` that names the argument, what was expected, what came, and the file.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

#: How deep JSON may be nested, and how many values and keys it may have, of some 100 bytes each.
MAX_DEPTH, MAX_VALUES = 200, 4_000_000

#: How long the text may be. The header of a safetensors file is limited to as much by its library.
MAX_BYTES = 100_000_000

#: How many digits a whole number may have. Python takes quadratic time to read them.
_MAX_DIGITS = 1000

#: How long the name of a tensor, a module or a stack may be.
_MAX_NAME = 2000

#: A string, or what opens, separates and closes values. A string that does not end takes the rest.
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|[\[{,\]}]', re.DOTALL)


#: The escape of a surrogate, of which a character takes two.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class Source:
    """A file that is read, and the argument that named it, both for errors."""

    argument: str
    path: Path

    def error(self, expected: str, came: object) -> ValueError:
        """The error for something in the file that is not as expected."""
        return ValueError(f"{self.argument}: expected {expected}, got {came} at {self.path}")


def shown(value: object) -> str:
    """A value for an error: in few and plain characters, whatever it holds."""
    if isinstance(value, dict | list):
        return f"{type(value).__name__} of {len(value)}"
    text = ascii(value[:80] if isinstance(value, str) else value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def open_regular(source: Source) -> FileIO:
    """Opens a file for reading. It refuses what is no file, and does not wait for a pipe.

    Links are followed, as Hugging Face's cache has them.

    Raises:
        FileNotFoundError: there is nothing of that name.
        ValueError: it is no file, or cannot be read.
    """

    def opener(path: str, flags: int) -> int:
        descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise source.error("a file", "something else")
        return descriptor

    try:
        return open(source.path, "rb", buffering=0, opener=opener)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{source.argument}: expected a file, got none at {source.path}"
        ) from error
    except OSError as error:
        raise source.error("a file that can be read", error.strerror) from error


def read_text(source: Source) -> str:
    """Reads a whole text file of at most `MAX_BYTES`.

    Raises:
        FileNotFoundError, ValueError: there is none, it is too long, or it is no UTF-8.
    """
    with open_regular(source) as file:
        data = bytearray()
        while part := file.read(min(1 << 20, MAX_BYTES + 1 - len(data))):
            data += part
            if len(data) > MAX_BYTES:
                raise source.error(f"at most {MAX_BYTES:,} bytes", "more")
    return decoded(bytes(data), source)


def decoded(data: bytes, source: Source) -> str:
    """Bytes as text; refuses what is no UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise source.error("text in UTF-8", f"byte {data[error.start]} at {error.start}") from None


def parse(text: str, source: Source, what: str) -> Any:
    """What JSON holds; refuses what is damaged, and what would take much memory or time to read.

    Keys that come twice, NaN, infinite numbers, numbers of very many digits and characters that
    are none are refused, too.

    Raises:
        ValueError: the message says what.
    """
    _check_bounds(text, source, what)

    def refuse(came: str) -> ValueError:
        return source.error(f"whole JSON in {what}", came)

    def whole(digits: str) -> int:
        if len(digits) > _MAX_DIGITS:
            raise refuse(f"a number of {len(digits)} digits")
        return int(digits)

    def finite(digits: str) -> float:
        number = float(digits)
        if not math.isfinite(number):
            raise refuse(f"a number that is not finite ({shown(digits)})")
        return number

    def constant(name: str) -> Any:
        raise refuse(name)

    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        held = dict(pairs)
        if len(held) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise refuse(f"the key {shown(twice)} twice")
        return held

    try:
        found = json.loads(
            text,
            parse_int=whole,
            parse_float=finite,
            parse_constant=constant,
            object_pairs_hook=checked,
        )
        if _SURROGATE.search(text):
            json.dumps(found, ensure_ascii=False).encode()
        return found
    except UnicodeEncodeError:
        raise refuse("half of a pair of surrogates, which is no character") from None
    except json.JSONDecodeError as error:
        raise refuse(f"{error.msg} at {error.pos}") from None
    except RecursionError:  # the caller is itself deep in calls
        raise refuse("values that are nested too deeply") from None


def _check_bounds(text: str, source: Source, what: str) -> None:
    depth = values = 0
    for token in _TOKEN.finditer(text):
        sign = text[token.start()]
        if sign in "]}":
            depth -= 1
            continue
        values += 1
        depth += sign in "[{"
        if depth > MAX_DEPTH:
            raise source.error(f"at most {MAX_DEPTH} values within each other in {what}", "more")
        if values > MAX_VALUES:
            raise source.error(f"at most {MAX_VALUES:,} values in {what}", "more")


def check_name(name: Any, source: Source, what: str) -> str:
    """A name of printable characters: none that breaks a line, or turns the direction of text."""
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= _MAX_NAME:
        raise source.error(f"a name of printable characters as {what}", shown(name))
    return name


class Fields:
    """An object of JSON whose fields are read one by one, each as what it has to be.

    Args:
        value: what stands where the object should.
        source: the file.
        where: what the object is, for errors.

    Raises:
        ValueError: it is no object. The methods raise it if a field is missing, or another thing.
    """

    def __init__(self, value: Any, source: Source, where: str) -> None:
        self.source, self._where = source, where
        if not isinstance(value, dict):
            raise source.error(f"an object as {where}", shown(value))
        self._held: dict[str, Any] = value

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def error(self, name: str, expected: str, came: object) -> ValueError:
        """The error for a field that is not as expected."""
        return self.source.error(f"{expected} as {name} of {self._where}", came)

    def any(self, name: str) -> Any:
        """The field, whatever it is."""
        if name not in self._held:
            raise self.error(name, "a value", "none")
        return self._held[name]

    def whole(self, name: str, low: int, high: int) -> int:
        """A whole number from ``low`` to ``high``."""
        return self.is_whole(name, self.any(name), low, high)

    def is_whole(self, name: str, value: Any, low: int, high: int) -> int:
        """A value within the field that has to be such a number."""
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(name, f"a whole number from {low} to {high}", shown(value))
        return value

    def number(self, name: str) -> float:
        """A finite number."""
        value = self.any(name)
        try:
            if isinstance(value, int | float) and not isinstance(value, bool):
                return float(value)  # JSON with others was refused
        except OverflowError:
            pass
        raise self.error(name, "a finite number", shown(value))

    def text(self, name: str) -> str:
        """A name, see `check_name`."""
        return check_name(self.any(name), self.source, f"{name} of {self._where}")

    def sha256(self, name: str) -> str:
        """A digest of SHA-256."""
        value = self.any(name)
        if not isinstance(value, str) or re.fullmatch("[0-9a-f]{64}", value) is None:
            raise self.error(name, "64 hexadecimal digits", shown(value))
        return value

    def one_of(self, name: str, allowed: Collection[str], check: Callable[[str], Any] = str) -> Any:
        """One of these words."""
        value = self.any(name)
        if not isinstance(value, str) or value not in allowed:
            raise self.error(name, f"one of {', '.join(allowed)}", shown(value))
        return check(value)

    def list(self, name: str, kinds: Sequence[type] | None = None) -> list[Any]:
        """A list; with ``kinds``, of lists that have values of these types."""
        value = self.any(name)
        if not isinstance(value, list):
            raise self.error(name, "a list", shown(value))
        for entry in value if kinds is not None else ():
            if not isinstance(entry, list) or [type(own) for own in entry] != list(kinds or ()):
                wanted = ", ".join(kind.__name__ for kind in kinds or ())
                raise self.error(name, f"lists of {wanted}", shown(entry))
        return value

    def indices(self, name: str, count: int, below: int) -> tuple[int, ...]:
        """``count`` different whole numbers from 0, below ``below``."""
        value = self.list(name)
        if len(value) != count:
            raise self.error(name, f"{count} indices", len(value))
        found = tuple(self.is_whole(name, own, 0, below - 1) for own in value)
        if len(set(found)) != count:
            raise self.error(name, "indices that differ", "some twice")
        return found
