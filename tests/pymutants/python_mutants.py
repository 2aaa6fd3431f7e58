"""Mutants of the Python around the operators, made by the mutation operators of cosmic-ray.

cosmic-ray says what can be changed where, and changes it. Running is ours (`forking`), because its
own runner starts an interpreter and imports torch for each mutant. Beside its operators there is
one of ours: a call whose result nobody uses, or a ``raise``, is left out. That is what checks are
made of. Of cosmic-ray's replacements of one operator by each of the others, `NEAREST` has one or
two: those by something far away are noticed by everything.
"""

import ast
import sys
from dataclasses import dataclass
from functools import cache, cached_property

from mutant import PACKAGE, Mutant, functions

#: Where `make` installs the tool, beside the other packages.
sys.path.append(str(PACKAGE.parent / ".venv/mutation"))

OF_OPERATORS = ("functional", "checks", "dispatch", "cost", "contract", "factors", "core_gradient")
OF_OPERATORS += ("gradient_sum", "eager", "basis", "reference", "layout", "guards")
OF_LAYERS = ("stack", "cores", "base", "w_eff", "rows", "route")

#: Tests that are quick and in this process; what they start elsewhere runs the whole module.
TESTS = [f"test_{name}.py" for name in (
    "functional", "reference", "contract", "eager", "basis", "gradient_sum", "gradient_ways",
    "cores", "layers", "w_eff", "base_changes", "reading", "batch", "batch_ids", "batch_ranks",
    "named_adapters", "switching", "in_place", "outputs_in_place", "transforms", "reentrant",
    "checkpoint", "autocast", "graph", "flops", "no_tokens", "token_cores", "kernels_issue",
    "bf16_products", "meta_and_nested", "caches", "training", "merged_state", "device",
    "together", "tenants", "offload", "cuda", "selection", "adapt", "stack_cores", "quantised",
    "experts", "convolution", "cost",
)]  # fmt: skip
TESTS += ["threads/test_threads.py", "conformance", "-k", "not cudahost and not capabilities"]

NEAREST = {
    "Add": ("Sub",), "Sub": ("Add",), "Mul": ("Div",), "Div": ("Mul",),
    "FloorDiv": ("Mul",), "Mod": ("FloorDiv",), "Pow": ("Mul",), "BitOr": ("BitAnd",),
    "BitAnd": ("BitOr",), "LShift": ("RShift",), "RShift": ("LShift",),
    "Lt": ("LtE",), "LtE": ("Lt", "Eq"), "Gt": ("GtE",), "GtE": ("Gt", "Eq"),
    "Eq": ("NotEq",), "NotEq": ("Eq",), "Is": ("IsNot",), "IsNot": ("Is",),
}  # fmt: skip
LEFT_OUT = "StatementLeftOut"


@dataclass(frozen=True)
class Made(Mutant):
    """A mutant whose source is made when it is asked for."""

    operator: str = ""
    occurrence: int = 0

    @cached_property
    def made(self):
        source = self.path.read_text(encoding="utf-8")
        if self.operator == LEFT_OUT:
            return _left_out(source)[self.occurrence][1]
        return _mutated(source, self.operator, self.occurrence)

    def __getattribute__(self, name):
        return super().__getattribute__("made" if name == "text" else name)


def files():
    """The modules that are broken."""
    operators = PACKAGE / "operators"
    paths = [operators / f"{name}.py" for name in OF_OPERATORS]
    paths += sorted((operators / "definitions").glob("[a-z]*.py"))
    return paths + [PACKAGE / "layers" / f"{name}.py" for name in OF_LAYERS]


@cache
def _operators():
    try:
        from cosmic_ray.operators.provider import OperatorProvider
    except ImportError as error:
        raise SystemExit(
            f"{error}: expected the packages of tests/pymutants/requirements.txt, "
            "which `make .venv/.mutation` installs"
        ) from error
    provider = OperatorProvider()
    return {name: provider[name] for name in provider if _is_near(name)}


def _is_near(name):
    parts = name.split("_")
    if parts[0] == "ReplaceUnaryOperator":
        return parts[1:] in (["USub", "UAdd"], ["Delete", "Not"])
    if len(parts) == 3:
        return parts[2] in NEAREST.get(parts[1], ())
    return not name.startswith("Variable")


def mutants():
    """All of them, module by module, without their sources."""
    return [each for path in files() for each in _mutants_of(path)]


def _mutants_of(path):
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    idle = _idle_lines(tree)
    where = [(name, node.lineno, node.end_lineno) for name, node in functions(tree)]

    def function_at(line):
        return next((name for name, start, end in where if start <= line <= end), "")

    for name in _operators():
        for occurrence, (_, _, (first, last)) in enumerate(_positions(source, name)):
            is_marker = source.splitlines()[first - 1].strip() == "*,"  # of keywords alone
            if not is_marker and not set(range(first, last + 1)) & idle:
                yield Made(path, function_at(first), name, "", first, last, name, occurrence)
    for occurrence, ((first, last), _) in enumerate(_left_out(source)):
        yield Made(path, function_at(first), LEFT_OUT, "", first, last, LEFT_OUT, occurrence)


def _idle_lines(tree):
    """Lines of annotations, of imports and of what only type checkers read."""
    idle = set()
    for node in ast.walk(tree):
        parts = []
        if isinstance(node, ast.FunctionDef):
            arguments = node.args
            every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            parts = [each.annotation for each in every] + [node.returns]
        if isinstance(node, ast.AnnAssign):
            parts = [node.annotation]
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            parts = [node]
        for part in filter(None, parts):
            idle |= set(range(part.lineno, part.end_lineno + 1))
    return idle


def _left_out(source):
    """Pairs of the lines of a statement and the source without it."""
    lines, found = source.splitlines(keepends=True), []
    for node in ast.walk(ast.parse(source)):
        is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        if is_call or isinstance(node, ast.Raise):
            head = lines[node.lineno - 1][: node.col_offset] + "pass\n"
            rest = ["\n"] * (node.end_lineno - node.lineno)
            text = "".join([*lines[: node.lineno - 1], head, *rest, *lines[node.end_lineno :]])
            found.append(((node.lineno, node.end_lineno), text))
    return found


@cache
def _nodes(source):
    """What cosmic-ray's parser makes of a source; not to be changed."""
    return _parsed(source)[1]


def _parsed(source):
    import parso
    from cosmic_ray.ast import ast_nodes

    tree = parso.parse(source)
    return tree, list(ast_nodes(tree))


@cache
def _positions(source, name):
    """Nodes, by their numbers, and lines of each place that an operator can change."""
    operator = _operators()[name]()
    return [
        (number, index, (start[0], end[0]))
        for number, node in enumerate(_nodes(source))
        for index, (start, end) in enumerate(operator.mutation_positions(node))
    ]


def _mutated(source, name, occurrence):
    operator, (tree, nodes) = _operators()[name](), _parsed(source)
    number, index, _ = _positions(source, name)[occurrence]
    node = nodes[number]
    siblings, changed = node.parent.children, operator.mutate(node, index)
    place = [each is node for each in siblings].index(True)
    siblings[place : place + 1] = [] if changed is None else [changed]
    return tree.get_code()
