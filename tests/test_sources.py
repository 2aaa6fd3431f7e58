"""The C++ sources: who may include whom, and that what is shared stands once."""

import re
from pathlib import Path

import pytest

SOURCES = Path(__file__).parent.parent / "csrc"
FILES = sorted(path for path in SOURCES.rglob("*") if path.suffix in {".h", ".cpp", ".cu"})
#: Folders that files of a folder may include from.
MAY_INCLUDE = {
    "": {"cpu"},
    "common": {"common"},
    "cpu": {"common", "cpu"},
    "cuda": {"common", "cuda"},
    "cuda/emulator": {"cuda/emulator"},
}


def folder_of(path):
    """Where a file belongs; the folders of instruction sets belong to the CPU."""
    name = path.relative_to(SOURCES).parent.as_posix().removeprefix(".")
    return "cpu" if name.startswith("cpu/") else name


def included(path):
    """The files of csrc that a file includes."""
    for name in re.findall(r'^ *#include "([^"]+)"', path.read_text(), re.MULTILINE):
        found = (path.parent / name).resolve()
        assert found.is_file(), f"{path}: {name}"
        yield found


def test_folders_include_only_what_they_may():
    seen = set()
    for path in FILES:
        for other in included(path):
            pair = folder_of(path), folder_of(other)
            seen.add(pair)
            if pair == ("cuda", "cuda/emulator"):
                assert (path.name, other.name) == ("launch.h", "launch.h")
            else:
                assert pair[1] in MAY_INCLUDE[pair[0]], f"{path} includes {other}"
    assert ("cuda", "cuda/emulator") in seen
    assert ("cpu", "common") in seen


def test_kernels_are_free_of_torch_but_for_its_number_types():
    """Else every instruction set would read the headers of torch again."""
    units = [path for path in FILES if path.parent.parent.name == "cpu" and path.suffix == ".cpp"]
    assert len(units) >= 15
    read, todo = set(), units
    while todo:
        path = todo.pop().resolve()
        if path not in read:
            read.add(path)
            todo += included(path)
    for path in read:
        for name in re.findall(r"#include <(torch/[^>]+)>", path.read_text()):
            assert name.startswith("torch/headeronly/util/"), f"{path}: {name}"


@pytest.mark.parametrize(
    "definition",
    [
        r"enum class Element\b",
        r"\bElement element_of\(ScalarType",
        r"\bint64_t bytes_of\(|\bint bytes_of\(",
        r"\bauto with_element\(",
        r"\bauto with_any_element\(",
        r"\bvoid with_bytes\(",
        r"\bceil_div\(Size",
        r"\bround_up\(Size",
        r"\bbool is_aligned\(",
        r"\bbool is_pair\(",
        r"\bplane_of\(Int",
        r"3\.14159",
        r"struct TokenRows\b",
        r"class TokenCores\b",
        r"struct SlicePlace\b",
        r"struct SharedLimits\b",
        r"struct MaterializeArguments\b",
        r"struct CurLinearArguments\b",
        r"std::optional<Tensor> grad_y;",
    ],
)
def test_what_is_shared_is_defined_once(definition):
    found = [path for path in FILES if re.search(definition, path.read_text())]
    assert len(found) == 1, found


def test_sizes_are_divided_by_the_one_function():
    """``(size + piece - 1) / piece`` has a name."""
    spelled = re.compile(r"\+ [^()]+ - 1\) / ")
    for path in FILES:
        lines = [line for line in path.read_text().splitlines() if spelled.search(line)]
        if path.name == "integers.h":
            assert len(lines) == 1
        else:  # that of divisor.h is of 64 bits without a sign
            assert len(lines) == (path.name == "divisor.h"), (path, lines)
