"""Files and directories that are there whole, or not at all.

Everything that the package writes goes through here. A writer has a folder of its own beside its
target, so that what it leaves when it is killed lies in one place. A lock file beside that folder
says whether the writer is alive: the kernel gives the lock back when the process ends, however it
ends, and process ids that are used again deceive nobody. The next writer of the same target takes
what locks it can and removes these folders; others it leaves. Where a file system has no locks, it
leaves all of them. Where locks reach no further than one machine, it may take the folder of a
writer on another: that writer then fails with an error, and its target stays as it was.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError

#: The endings of a writer's folder and of the lock beside it, after a dot, a name and a number.
_FOLDER, _LOCK = ".tcur-tmp", ".tcur-lock"
_TEMPORARY = re.compile(rf"\..+\.[0-9a-f]{{8}}({_FOLDER}|{_LOCK})", re.DOTALL)

#: What the renaming over something fails with where a file system, or the owner, does not allow it.
_NOT_OVER = (
    errno.EEXIST,
    errno.EPERM,
    errno.EXDEV,
    errno.EBUSY,
    errno.ENOTEMPTY,
    errno.ENOTSUP,
    errno.ENOSYS,
    errno.EINVAL,
)

#: Of `renameat2`, which neither os nor shutil know.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def is_temporary(name: str) -> bool:
    """Whether a name is that of the folder, or of the lock, of a writer at work or killed."""
    return _TEMPORARY.fullmatch(name) is not None


def clear(path: Path, follows: bool = True) -> None:
    """Removes what killed writers of a path left; for those who may find that it is written."""
    path = _resolved(path, follows)
    _remove_dead(path.parent, _stem(path.name))


def _resolved(path: Path, follows: bool) -> Path:
    """Where a writer of a path writes: where a link leads, or in place of the link."""
    return Path(os.path.realpath(path if follows else path.parent), "" if follows else path.name)


@contextmanager
def replacing(path: Path, follows: bool = True) -> Iterator[Path]:
    """Yields a temporary path, whose file takes the place of ``path`` if the block succeeds.

    Whatever happens, the old file is there whole, or the new one: also after a power cut, because
    the new file is on the disk before it gets its name, and its name before this returns. After an
    error nothing else is left. What a killed process left, the next one removes that writes the
    same file.

    A new file has the permissions of the
    umask, one that replaces another has those of the other. The temporary path has the name of
    ``path``, its ending included.

    Args:
        path: the file. Its directory must allow new files, since the old one is replaced.
        follows: True writes to where a link leads, also if no file is there yet, as one expects of
            a path that a user gave. False replaces the link itself, so that nothing outside of a
            folder is written.

    Raises:
        OSError: the file cannot be written; its ``filename`` is ``path``. The old one is as it was,
            except where the directory could not be brought to the disk at the very end: then the
            new one is there. A directory, a device, a pipe and a file that may not be written are
            refused before the block runs. A file system that does not rename over an existing file
            is refused, because to delete the old one first would leave a moment without either.
    """
    path = _resolved(path, follows)
    standing = None if path.is_symlink() and not follows else _file_at(path)
    with _own_folder(path) as (folder, mode):
        fresh = folder / path.name
        yield fresh
        os.chmod(fresh, mode if standing is None else stat.S_IMODE(standing.st_mode))
        _to_disk(fresh)
        _rename(fresh, path)


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Yields a directory that becomes ``out`` if the block succeeds, and is removed otherwise.

    What `replacing` promises of a file holds of the directory and of all that is in it. Folders
    above it that are missing are made. Its files get the permissions of the umask; an empty
    directory that was there keeps its own.

    Raises:
        OSError: it cannot be written, or ``out`` is neither free nor an empty directory.
    """
    out = Path(os.path.realpath(out))
    above = [parent for parent in out.parents if not parent.exists()]
    try:
        if above:
            out.parent.mkdir(parents=True, exist_ok=True)
        with _own_folder(out) as (folder, mode):
            place = folder / out.name
            place.mkdir()
            yield place
            _directory_to_disk(place, mode)
            if out.exists():
                place.chmod(stat.S_IMODE(out.stat().st_mode))
            _rename(place, out)
            for parent in above:
                _to_disk(parent.parent)
    except BaseException:
        for parent in above:  # the innermost first
            with suppress(OSError):
                parent.rmdir()
        raise


@contextmanager
def exchanging(path: Path, names: Collection[str]) -> Iterator[Path]:
    """Yields a directory that takes the place of an existing one, at once, if the block succeeds.

    This is for several files that belong together: each alone could be replaced, but a process
    that is killed between two of them would leave a mixture.

    Args:
        path: the directory that is there.
        names: of the files that the block writes. All others are kept, as links to the same files.

    Raises:
        OSError: it cannot be written, or the file system cannot exchange two directories or link a
            file twice. The old directory is as it was.
    """
    path = Path(os.path.realpath(path))

    def left_out(folder: str, found: list[str]) -> Collection[str]:
        return {n for n in found if is_temporary(n) or (Path(folder) == path and n in names)}

    with _own_folder(path) as (folder, mode):
        place, failed = folder / path.name, []

        def link(source: str, target: str) -> None:
            try:
                os.link(source, target, follow_symlinks=False)
            except OSError as error:
                failed.append(error.errno or errno.EIO)
                raise

        try:
            shutil.copytree(path, place, True, left_out, link)
        except shutil.Error as error:  # a list of words
            raise _not_at_once(path, failed[0] if failed else errno.EIO) from error
        yield place
        for name in names:
            os.chmod(place / name, mode)
            _to_disk(place / name)
        _to_disk(place)
        _exchange(place, path)
        for entry in place.iterdir():  # what others wrote meanwhile
            if not os.path.lexists(path / entry.name) and not is_temporary(entry.name):
                entry.rename(path / entry.name)


def without_name(directory: Path) -> int:
    """A new, empty file without a name, open to be read and written: it is gone with the process.

    Raises:
        OSError: it cannot be made; ``filename`` is the directory.
    """
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(directory, flags | os.O_TMPFILE, 0o600)
    except AttributeError:  # not on Linux
        pass
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.ENOTSUP, errno.EINVAL):
            raise
    with _own_folder(directory / "unnamed", directory) as (folder, _):
        return os.open(folder / "unnamed", flags | os.O_CREAT | os.O_EXCL, 0o600)  # soon removed


# -- the folder of a writer


class _Own(NamedTuple):
    """The folder of a writer, and the mode that the umask gives a file there."""

    folder: Path
    mode: int


@contextmanager
def _own_folder(path: Path, told: Path | None = None) -> Iterator[_Own]:
    """A folder beside ``path`` for this writer alone, which is removed in the end.

    Folders of dead writers of ``path`` are removed before. Errors about files in the folder become
    errors about ``told``, by default ``path``.
    """
    folder = None
    try:
        stem = _stem(path.name)
        _remove_dead(path.parent, stem)
        lock, folder = _locked(path.parent, stem)
        try:
            mode = stat.S_IMODE(os.fstat(lock).st_mode)
            folder.mkdir(0o700)
            yield _Own(folder, mode)
        finally:
            _remove(folder)
            os.close(lock)
    except (OSError, SafetensorError) as error:
        named = _named(error, folder or path.parent, path if told is None else told)
        if named is None:
            raise
        raise named from error


def _stem(name: str) -> str:
    """What names of temporary files begin with; they must not be longer than a name may be."""
    encoded = os.fsencode(name)
    return name if len(encoded) < 200 else hashlib.sha256(encoded).hexdigest()


def _locked(directory: Path, stem: str) -> tuple[int, Path]:
    """A new lock file, open and locked, and the path of the folder that it guards."""
    while True:
        folder = directory / f".{stem}.{secrets.token_hex(4)}{_FOLDER}"
        path = folder.with_suffix(_LOCK)
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            continue
        try:
            with suppress(OSError):  # without locks, others leave it alone
                fcntl.flock(lock, fcntl.LOCK_EX)
            if _is_at(lock, path):
                return lock, folder
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)  # another writer took it for a dead one's before it was locked


def _is_at(opened: int, path: Path) -> bool:
    """Whether an open file is the one at a path."""
    try:
        return os.path.samestat(os.fstat(opened), os.lstat(path))
    except FileNotFoundError:
        return False


def _remove_dead(directory: Path, stem: str) -> None:
    """Removes what killed writers of one target left; what cannot be removed stays."""
    own = re.compile(rf"\.{re.escape(stem)}\.[0-9a-f]{{8}}{_LOCK}")
    with suppress(OSError):
        for name in os.listdir(directory):
            if own.fullmatch(name) is not None:
                _remove_if_dead(directory / name)


def _remove_if_dead(path: Path) -> None:
    with suppress(OSError):
        lock = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(lock, path):  # else it has just been removed
                _remove(path.with_suffix(_FOLDER))
        finally:
            os.close(lock)


def _remove(folder: Path) -> None:
    """Removes a folder, and then its lock: one that stays keeps its lock, for the next writer."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        if not os.path.lexists(folder):
            os.unlink(folder.with_suffix(_LOCK))


# -- renaming, and bringing to the disk


def _file_at(path: Path) -> os.stat_result | None:
    """What is at a path where a file is to be; None if nothing is."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode):
        kind = "a directory" if stat.S_ISDIR(found.st_mode) else "a device, a pipe or a socket"
        number = errno.EISDIR if stat.S_ISDIR(found.st_mode) else errno.EINVAL
        raise OSError(number, f"path: expected a file or a free name, got {kind}", str(path))
    try:
        with open(path, "r+b"):  # refused where a plain open would be
            return found
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _rename(fresh: Path, path: Path) -> None:
    is_there = path.exists()
    try:
        os.rename(fresh, path)
    except OSError as error:
        if is_there and error.errno in _NOT_OVER:
            text = f"{os.strerror(error.errno)} (expected a file system that renames over what is "
            text += "there, which is as it was: choose a free name, or delete the old one first)"
            raise OSError(error.errno, text, str(path)) from error
        raise
    try:
        _to_disk(path.parent)
    except OSError as error:
        text = f"{error.strerror} (the new one is there, but its name may not be on the disk)"
        raise OSError(error.errno, text, str(path)) from error


def _exchange(fresh: Path, path: Path) -> None:
    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if exchange is None:
        raise _not_at_once(path, errno.ENOSYS)
    names = os.fsencode(fresh), os.fsencode(path)
    if exchange(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) != 0:
        raise _not_at_once(path, ctypes.get_errno())
    _to_disk(path.parent)


def _not_at_once(path: Path, number: int) -> OSError:
    text = os.strerror(number)
    if number in (*_NOT_OVER, errno.EMLINK):
        text += (
            " (expected a file system where several files can be replaced at once: choose a new "
        )
        text += "directory, or delete the old one first)"
    return OSError(number, text, str(path))


def _to_disk(path: Path) -> None:
    """Waits until a file, or the entries of a directory, are on the disk."""
    try:
        opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:
        if path.is_dir():  # it may be written without being read
            return
        raise
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that does not know it for directories
            raise
    finally:
        os.close(opened)


def _directory_to_disk(place: Path, mode: int) -> None:
    """Everything in a new directory, and the directory; its files get a mode."""
    for folder, _, names in os.walk(place, topdown=False):
        for name in names:
            os.chmod(Path(folder, name), mode)
            _to_disk(Path(folder, name))
        _to_disk(Path(folder))


def _named(error: OSError | SafetensorError, folder: Path, path: Path) -> OSError | None:
    """An error about what is in a folder, told of the path that the caller knows.

    None stands for errors that are about something else, or say it already.
    """
    if isinstance(error, OSError):
        number = error.errno
        names = [Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if name]
        if number is None or (names and not any(name.is_relative_to(folder) for name in names)):
            return None
        inside = [name for name in names if name.is_relative_to(folder / path.name)]
        parts = inside[0].relative_to(folder / path.name) if inside else Path()
        return OSError(number, error.strerror, str(path / parts))
    found = re.search(r"\(os error (\d+)\)", str(error))  # as Rust tells it
    return None if found is None else OSError(int(found[1]), os.strerror(int(found[1])), str(path))
