"""The codelets of csrc/common, one by one on this machine: every length against a float64 DFT.

They are C++ templates, which no operator shows alone. A pybind11 module of them is compiled when it
is first needed (``codelets.cpp``) and kept in ``build/codelets``, by what it was made of.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from tolerance import assert_close

pybind11 = pytest.importorskip("pybind11")

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "build" / "codelets"
NAMES = ("real_inverse", "real_forward", "complex_inverse", "shifted_inverse", "shifted_forward")
#: As far as straight-line code goes, of whole tubes and within a longer transform.
LONGEST, LONGEST_WITHIN = 16, 9


@pytest.fixture(scope="module")
def codelets():
    """The module, compiled if it is not there."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        pytest.skip("no C++ compiler")
    source = Path(__file__).with_name("codelets.cpp")
    folders = (ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include"))
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden"]
    command += [f"-I{folder}" for folder in folders] + [str(source)]
    made = hashlib.sha256(f"{command} {pybind11.__version__}".encode() + source.read_bytes())
    for name in ("codelets.h", "tubes.h", "host_device.h"):
        made.update((ROOT / "csrc" / "common" / name).read_bytes())
    KEPT.mkdir(parents=True, exist_ok=True)
    library = KEPT / f"codelets-{made.hexdigest()[:16]}{sysconfig.get_config_var('EXT_SUFFIX')}"
    with FileLock(KEPT / "lock"):
        if not library.exists():
            part = library.with_suffix(".part")
            subprocess.run([*command, "-o", str(part)], check=True)
            part.rename(library)  # whole, or not there
    spec = importlib.util.spec_from_file_location("codelets", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def longest(name):
    return LONGEST if name.startswith("real") else LONGEST_WITHIN


def angles(n, rows, columns):
    """2π · rows · columns / n, for whole numbers or halves; the product is reduced exactly."""
    turns = torch.outer(2 * rows.double(), 2 * columns.double()) % (4 * n)
    return turns * (2 * torch.pi / (4 * n))


def matrix(name, n):
    """What a codelet multiplies its numbers by, in float64, by its definition."""
    k = torch.arange(n)
    if name == "complex_inverse":
        turn = angles(n, k, k)
        cos, sin = turn.cos(), turn.sin()
        return torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)])
    is_shifted = name.startswith("shifted")
    bins = torch.arange(n // 2 if is_shifted else (n + 1) // 2)
    turn = angles(n, bins + 0.5 if is_shifted else bins, k)
    # Rows: the packed planes; columns: the numbers of the tube.
    planes = torch.stack([turn.cos(), -turn.sin()], 1).flatten(0, 1)
    planes = planes if is_shifted else torch.cat([planes[:1], planes[2:]])
    if n % 2 == is_shifted:  # a real bin at the end: n/2 of an even length, or that of an odd one
        planes = torch.cat([planes, (1 - 2.0 * (k % 2)).double()[None]])
    return planes.T if name.endswith("inverse") else planes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_length(codelets, name, dtype):
    transform = codelets.transform32 if dtype == torch.float32 else codelets.transform64
    assert codelets.longest == (LONGEST, LONGEST_WITHIN)
    for n in range(1, longest(name) + 1):
        exactly = matrix(name, n)
        assert exactly.shape[0] == exactly.shape[1] == (2 * n if name[0] == "c" else n)
        x = torch.randn(exactly.shape[0], 50, dtype=dtype)
        columns = [transform(name, n, column.tolist()) for column in x.T]
        y = torch.tensor(columns, dtype=dtype).T
        if n == 1:  # the identity
            assert torch.equal(y, x)
        else:
            assert_close(y, exactly.to(dtype) @ x, exactly @ x.double())


@pytest.mark.parametrize("name", ["real", "shifted"])
def test_forward_and_inverse_are_transposes(codelets, name):
    """To the last but a few bits of float64: the matrices that they are, column by column."""
    for n in range(1, longest(name) + 1):
        forward, inverse = (
            torch.tensor(
                [codelets.transform64(f"{name}_{way}", n, row) for row in torch.eye(n).tolist()],
                dtype=torch.float64,
            )
            for way in ("forward", "inverse")
        )
        assert (forward - inverse.T).abs().max() <= 4 * torch.finfo(torch.float64).eps


def test_what_is_not_a_codelet_is_refused(codelets):
    wrong = (
        ("real_inverse", 17, 17),
        ("real", 2, 2),
        ("real_forward", 3, 2),
        ("shifted_forward", 10, 10),
    )
    for name, n, numbers in wrong:
        with pytest.raises(ValueError, match=": expected"):
            codelets.transform32(name, n, [0.0] * numbers)
