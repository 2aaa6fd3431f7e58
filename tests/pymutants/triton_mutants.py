"""The mutants of Triton's kernels, from their table."""

import ast

from mutant import PACKAGE, functions, replaced
from triton_table import TABLE

FOLDER = PACKAGE / "operators/triton"


def row(module, function, old, new):
    """The mutant of one row."""
    found = [r for r in TABLE[module][function] if r[1:] == (old, new)]
    assert len(found) == 1, f"{module}, {function}: no such row, or several: {old!r} -> {new!r}"
    return replaced(FOLDER / f"{module}.py", function, *found[0])


def mutants():
    """All of them, in the order of the table."""
    return [
        replaced(FOLDER / f"{module}.py", function, *each)
        for module, by_function in TABLE.items()
        for function, rows in by_function.items()
        for each in rows
    ]


def kernels():
    """Pairs of a module and a function that Triton compiles, and those that it launches."""
    compiled, launched = set(), set()
    for path in sorted(FOLDER.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for name, node in functions(tree):
            if any("jit" in ast.unparse(each) for each in node.decorator_list):
                compiled.add((path.stem, name))
        names = {
            n.id for each in _launches(tree) for n in ast.walk(each) if isinstance(n, ast.Name)
        }
        launched |= {
            (path.stem, name) for name in names & {n for m, n in compiled if m == path.stem}
        }
    return compiled, launched


def _launches(tree):
    """What is handed to `wrap_triton`, and the tables of forms that it is taken from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "wrap_triton":
            yield node
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_FORMS":
            yield node


def files():
    """Whose lines the tests reach."""
    return sorted(FOLDER.glob("*.py"))
