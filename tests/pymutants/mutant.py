"""What a mutant is: one module with one thing changed."""

import ast
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import tcur_kernels

PACKAGE = Path(tcur_kernels.__file__).parent


@dataclass(frozen=True)
class Mutant:
    """A source with one thing changed.

    Attributes:
        path: file of the module.
        function: in which function the change is, "" outside of functions.
        what: the kind of change.
        text: the whole source, changed.
        first, last: lines of the original that are changed, counted from 1.
    """

    path: Path
    function: str
    what: str
    text: str = field(repr=False)
    first: int
    last: int

    @property
    def module(self):
        return self.path.relative_to(PACKAGE).with_suffix("").as_posix()

    def __str__(self):
        old, new = self.difference()
        return f"{self.module}:{self.first} {self.function}: {self.what}: {old} -> {new}"

    def difference(self):
        """The lines that differ, before and after, without the spaces around them."""
        old, new = source_of(self.path).splitlines(), self.text.splitlines()
        head = 0
        while head < min(len(old), len(new)) and old[head] == new[head]:
            head += 1
        tail = 0
        while tail < min(len(old), len(new)) - head and old[-1 - tail] == new[-1 - tail]:
            tail += 1
        parts = (old[head : len(old) - tail], new[head : len(new) - tail])
        return tuple(" ".join(filter(None, map(str.strip, part))) for part in parts)

    def lines(self):
        """Lines of the smallest statement that the change is in, or of its head."""
        own = set(range(self.first, self.last + 1))
        return own | _statement(_statements(source_of(self.path)), self.first, self.last)


@cache
def source_of(path):
    """The source of a module, read once."""
    return path.read_text(encoding="utf-8")


@cache
def _statements(source):
    """Statements of a source, outer ones first."""
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)]


@cache
def _functions(source):
    return dict(functions(ast.parse(source)))


def _statement(statements, first, last):
    found = set()
    for node in statements:
        if node.lineno <= first and last <= node.end_lineno:
            body = getattr(node, "body", None)
            end = body[0].lineno - 1 if body else node.end_lineno
            if last <= max(end, node.lineno):
                found = set(range(node.lineno, max(end, node.lineno) + 1))
    return found


def functions(tree, outer=""):
    """Names and nodes of all functions of a module, those of classes as ``Class.name``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            yield outer + node.name, node
        if isinstance(node, ast.ClassDef):
            yield from functions(node, f"{outer}{node.name}.")


def replaced(path, function, what, old, new):
    """A mutant where ``old``, which stands once in a function, is ``new``."""
    text = source_of(path)
    lines = text.splitlines(keepends=True)
    node = _functions(text)[function]
    start = sum(map(len, lines[: node.lineno - 1]))
    end = sum(map(len, lines[: node.end_lineno]))
    body = text[start:end]
    if body.count(old) != 1:
        raise LookupError(f"{path.name}, {function}: {old!r} stands there {body.count(old)} times")
    at = start + body.index(old)
    first = text.count("\n", 0, at) + 1
    changed = text[:at] + new + text[at + len(old) :]
    return Mutant(path, function, what, changed, first, first + old.rstrip("\n").count("\n"))
