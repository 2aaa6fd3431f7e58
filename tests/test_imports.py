"""Who may import whom, and what an import does not do: each in a process of its own."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import tcur_kernels

PACKAGE = Path(tcur_kernels.__file__).parent

#: The wings of the house from the ground up: a module imports from its own wing and those below.
WINGS = (
    ("autocast", "checkpoints", "matrices", "processes", "values"),
    ("t_product",),
    ("operators",),
    ("files",),
    ("decompose",),
    ("layers",),
    ("adapters",),
    ("merge", "peft"),
    ("cli",),
    ("__main__",),
)
STOREY = {wing: storey for storey, wings in enumerate(WINGS) for wing in wings}


#: Every warning is an error, but for what torch says of the first Python 3.13.
STRICT = ("-W", "error", "-W", "ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")


def run(code):
    result = subprocess.run(
        [sys.executable, *STRICT, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            yield name, path


def imports_of(name, path):
    """Modules of ours that a file imports, by dotted names within the package."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    known = {module for module, _ in modules()}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            start = package[: len(package) - node.level + 1]
            base = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                target = f"{base}.{alias.name}" if base else alias.name
                if target in known:
                    yield target
                elif base in known:
                    yield base


ARROWS = {name: set(imports_of(name, path)) - {name} for name, path in modules()}


def test_every_module_is_in_a_wing():
    assert {name.split(".")[0] for name in ARROWS} == set(STOREY)


def test_arrows_point_downwards():
    """A wing knows those below it, and none beside it or above."""

    def storey(name):
        return STOREY[name.split(".")[0]]

    upwards = [
        f"{name} imports {target}"
        for name, targets in ARROWS.items()
        for target in targets
        if name.split(".")[0] != target.split(".")[0] and storey(target) >= storey(name)
    ]
    assert not upwards


def test_no_module_imports_itself_by_way_of_others():
    """Imports for the sake of types count too: who needs them to read a module needs both."""
    graph = graphlib.TopologicalSorter(ARROWS)
    graph.prepare()  # raises and names a circle


def test_an_import_is_quiet_and_light():
    heavy = ("triton", "monai", "peft", "transformers", "torch._dynamo", "torch._inductor")
    code = f"""
import sys, torch
before = set(sys.modules)
import tcur_kernels
new = set(sys.modules) - before
print([name for name in {heavy!r} if name in new])
"""
    assert run(code) == "[]"


def test_the_reference_stands_alone():
    """It runs without the compiled library, loaded as a file of its own."""
    code = f"""
import importlib.util, sys, torch
file = {str(PACKAGE / "operators" / "reference.py")!r}
spec = importlib.util.spec_from_file_location("reference", file)
reference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reference)
assert not any(name.startswith("tcur_kernels") for name in sys.modules)
c, r, u = torch.randn(4, 3, 2), torch.randn(4, 2, 5), torch.randn(4, 2, 2)
print(tuple(reference.cur_product(reference.half_spectrum(c), u, reference.half_spectrum(r)).shape))
"""
    assert run(code) == "(4, 3, 5)"


def test_the_first_call_may_be_a_compiled_one():
    code = """
import torch, tcur_kernels as tcur
factors = tcur.CURFactors(torch.randn(4, 6, 2), torch.randn(4, 2, 5))
core = torch.randn(4, 2, 2, requires_grad=True)
f = torch.compile(lambda c: tcur.cur_product(factors, c).sum(), backend="aot_eager", fullgraph=True)
f(core).backward()
print(core.grad.abs().max().item() > 0)
"""
    assert run(code) == "True"
