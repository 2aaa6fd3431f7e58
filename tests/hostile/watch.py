"""Watches which files are opened and what is unpickled, and compares what was read."""

import json
import os
import struct
import sys
from pathlib import Path

from damages import split

_state = {"folder": None, "seen": [], "installed": False, "all": ""}

#: Where Python, its libraries and the system keep their files.
SYSTEM = tuple(
    {os.path.realpath(p) for p in (sys.prefix, sys.base_prefix, os.path.dirname(os.__file__))}
) + tuple(str(Path(p).resolve()) for p in sys.path if p)


def install():
    """Listens to this process; there is no way to stop listening."""
    if not _state["installed"]:
        sys.addaudithook(_heard)
        _state["installed"] = True


def _heard(event, args):
    if _state["folder"] is None:
        return
    if event == "open" and isinstance(args[0], str | bytes | os.PathLike):
        path, flags = os.path.abspath(os.fsdecode(args[0])), args[2] or 0
        if path.startswith(_state["folder"] + os.sep) or path == _state["folder"]:
            return
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if path.startswith(("/dev/null", "/proc/", "/sys/", "/dev/urandom", "/etc/")):
            return
        if not writes and path.startswith(SYSTEM) and not path.startswith(_state["all"]):
            return
        _state["seen"].append(f"opened {path!a}")
    elif event == "pickle.find_class":
        _state["seen"].append(f"unpickled {args}")
    elif event in ("os.symlink", "os.link", "os.chmod", "os.rename", "os.remove", "os.truncate"):
        named = [own for own in args[:2] if isinstance(own, str | bytes | os.PathLike)]
        paths = [os.path.abspath(os.fsdecode(own)) for own in named]
        at = args[-1] if isinstance(args[-1], int) else -1
        for path in paths[-1:] if at < 0 else ():  # others are relative to an open folder
            if not path.startswith(_state["folder"]):
                _state["seen"].append(f"{event} {path!a}")


def start(folder, all_of):
    """From now on, only files below the folder may be opened."""
    _state.update(folder=os.path.abspath(folder), seen=[], all=os.path.abspath(all_of))


def stop():
    """What was opened or unpickled since `start` that should not have been."""
    _state["folder"] = None
    return "; ".join(_state["seen"][:3])


def address_space():
    """Bytes of address space that this process has."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def numbers_changed(whole, damaged):
    """The files of numbers whose header is whole: only numbers in them changed.

    Returns name of a tensor -> its bytes as they are now, and None if more than numbers changed.
    """
    found = {}
    for path in sorted(Path(damaged).rglob("*.safetensors")):
        own = Path(whole) / path.relative_to(damaged)
        if not path.is_file() or path.is_symlink() or not own.is_file():
            return None
        before = own.read_bytes()
        now = path.read_bytes()
        try:
            (header, numbers), (same, fresh) = split(before), split(now)
        except (ValueError, OverflowError, struct.error):
            return None
        if header != same or len(numbers) != len(fresh):
            return None
        for name, entry in json.loads(header).items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                found[name] = numbers[first:last], fresh[first:last]
    return found


def alike_but_for(wanted, came, numbers):
    """Whether what was read differs only where the numbers of the files do."""
    if isinstance(wanted, str) or "rows" in wanted:
        return True  # a choice that follows from numbers
    if wanted.keys() != came.keys():
        return False
    for name, (dtype, shape, old) in wanted.items():
        was, now = numbers[name]
        if came[name][:2] != (dtype, shape):
            return False
        new = came[name][2]
        size = len(old) // max(1, len(was) // 4) if was else 4
        for at in range(0, len(old), size):
            part = slice(at, at + size)
            if old[part] != new[part] and was[part] == now[part]:
                return False
    return True
