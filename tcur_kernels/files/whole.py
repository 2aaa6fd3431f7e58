"""Files that are there whole, or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, follows: bool = True) -> Iterator[Path]:
    """Yields a temporary file beside ``path``, which replaces it if the block ends without error.

    The permissions are those that a plain ``open`` would give or keep.

    Args:
        path: the file.
        follows: True writes to where a link leads, as one expects of a path that a user gave. False
            replaces the link itself, so that nothing outside of a folder is written.
    """
    if follows:
        path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    mode = path.stat().st_mode if path.is_file() else None
    try:
        with open(temporary, "xb") as file:
            opened = os.fstat(file.fileno()).st_mode
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, stat.S_IMODE(opened if mode is None else mode))
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
