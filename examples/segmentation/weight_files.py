"""Opens files with weights: what torch.save wrote, and safetensors.

Pickles are read by ``weights_only``: no code of a file runs. Whatever else a file is, the refusal
says it in one sentence.
"""

from __future__ import annotations

import argparse
import pathlib
import pickle
import re
import zipfile
from collections import defaultdict
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from segmentation.files import fail

_WANTED = "a state dict that torch.save wrote, or safetensors"
#: Binary files that are taken for weights: how they begin, and what they are.
_MAGIC = {
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"\x89HDF": "an HDF5 file, which Keras writes",
    b"\x93NUMPY": "an array of NumPy",
    b"7z\xbc\xaf": "a 7z archive; unpack it first",
}


def _harmless() -> list[Any]:
    """Classes that training loops store beside the weights, and that only hold values."""
    classes: list[Any] = [argparse.Namespace, defaultdict, datetime, list, dict, int, float]
    classes += [torch.torch_version.TorchVersion, np.ndarray, np.dtype]
    classes += {type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}
    # Files of NumPy 1 and 2 name the same functions differently, and so do versions of Python.
    for made in (np.float64(0), np.zeros(1)):
        function = made.__reduce__()[0]
        for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            classes.append((function, f"{module}.{function.__name__}"))
    for module in ("pathlib", "pathlib._local"):
        classes.append((pathlib.PurePosixPath, f"{module}.PosixPath"))
        classes.append((pathlib.PureWindowsPath, f"{module}.WindowsPath"))
    return classes


def load(file: Path) -> Any:
    """Tensors and plain values of a file. Those of a zip archive are mapped, not yet read."""
    try:
        with file.open("rb") as opened:
            head = opened.read(4096)
        if _is_safetensors(file, head):
            return load_file(file)
        _refuse_other_kinds(file, head)
        with torch.serialization.safe_globals(_harmless()):
            mapped = zipfile.is_zipfile(file)
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except PermissionError:
        fail("--pretrained", "a file that may be read", f"{file}, for which permission is denied")
    except SafetensorError as error:
        fail("--pretrained", "a whole safetensors file", f"{file} ({error})")
    except pickle.UnpicklingError as error:
        _refuse_pickle(file, str(error))
    except Exception as error:  # whatever torch raises on broken bytes
        if "magic number" in str(error):  # of torch.save's own, at the start of a pickle
            _refuse_pickle(file, "")
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        fail("--pretrained", _WANTED, f"{file}, which is damaged or foreign ({reason})")


def _is_safetensors(file: Path, head: bytes) -> bool:
    """By the content: the length of a header in eight bytes, and the header in JSON."""
    header = int.from_bytes(head[:8], "little")
    named = file.suffix == ".safetensors" and not _is_text(head)
    return named or (head[8:9] == b"{" and header < file.stat().st_size)


def _refuse_other_kinds(file: Path, head: bytes) -> None:
    """Refuses what is not of torch.save, by how it begins."""
    came = next((what for magic, what in _MAGIC.items() if head.startswith(magic)), None)
    if not head:
        came = "which is empty"
    elif head.startswith(b"version https://git-lfs"):
        came = "a pointer of Git LFS; `git lfs pull` brings the file"
    elif head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        came = "a web page; the download of the weights failed, or asks to log in"
    elif _is_text(head):
        came = f"a text that begins {head.decode(errors='replace').splitlines()[0][:40]!r}"
    elif zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
        if any(name.endswith("constants.pkl") for name in names):
            hint = "torch.save(torch.jit.load(file).state_dict(), 'weights.pt') takes its weights"
            came = f"a TorchScript archive; {hint}"
        elif not any(name.endswith("data.pkl") for name in names):
            came = "a zip archive that torch.save did not write; unpack it first"
    if came is not None:
        fail("--pretrained", _WANTED, f"{file}, {came}")


def _is_text(head: bytes) -> bool:
    """Whether bytes are a text in UTF-8; the last character may be cut."""
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        text = head[: error.start].decode() if error.start > len(head) - 4 else "\0"
    return all(c.isprintable() or c.isspace() for c in text)


def _refuse_pickle(file: Path, error: str) -> NoReturn:
    """Refuses a pickle with anything but tensors and plain values."""
    refused = re.search(r"(?:GLOBAL|class|global) ([\w]+(?:\.\w+)+)", error)
    if refused is None:
        fail("--pretrained", _WANTED, f"{file}, a pickle that torch.save did not write")
    hint = (
        "torch.save(torch.load(file, weights_only=False).state_dict(), 'weights.pt') takes the "
        "weights out, with ['state_dict'] in place of .state_dict() if the file holds a dictionary"
    )
    came = f"{file} with a pickled {refused.group(1)}, which could run code of the file"
    fail("--pretrained", _WANTED, f"{came} and is not loaded; where you trust it, {hint}")
