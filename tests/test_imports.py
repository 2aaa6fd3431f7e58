"""Who may import whom, and what an import does not do: each in a process of its own."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tcur_kernels

PACKAGE = Path(tcur_kernels.__file__).parent

#: Module -> what it may import of ours. Arrows point downwards only.
MAY_IMPORT = {
    "reference": set(),
    "autocast": set(),
    "tubal": {"autocast"},
    "_native": set(),
    "cost": set(),
    "decompose.stack": {"autocast"},
    "decompose.singular": {"decompose.stack"},
    "decompose.rules": {"decompose.singular", "decompose.stack"},
    "decompose.cores": {"decompose.stack", "tubal"},
    "decompose.files": {"decompose.stack"},
    "decompose.sharded": {"autocast", "decompose.stack", "distributed"},
    "decompose.tensor": {
        "decompose.cores",
        "decompose.rules",
        "decompose.sharded",
        "decompose.stack",
        "distributed",
        "tubal",
    },
    "decompose.matrix": {"autocast", "decompose.rules", "decompose.stack", "decompose.tensor"},
    "decompose.modewise": {"autocast", "decompose.rules", "decompose.stack", "tubal"},
    "decompose.curve": {
        "decompose.rules",
        "decompose.singular",
        "decompose.stack",
        "decompose.tensor",
    },
    "decompose": {
        "decompose.cores",
        "decompose.curve",
        "decompose.matrix",
        "decompose.modewise",
        "decompose.files",
        "decompose.sharded",
        "decompose.rules",
        "decompose.stack",
        "decompose.tensor",
    },
    "ops": {"autocast", "flops", "reference"},
    "flops": set(),
    "factors": {"reference", "streams"},
    "base": {"distributed", "factors", "places"},
    "kept": {"base", "eager", "places", "streams"},
    "reading": {"distributed", "eager", "factors", "functional", "places", "rows"},
    "rows": set(),
    "switching": {"eager"},
    "cores": {"switching"},
    "streams": set(),
    "functional": {"_native", "autocast", "cost", "eager", "factors", "ops", "triton"},
    "triton": {"triton.operators"},
    "triton.operators": {
        "ops",
        "triton.core_grad_dense",
        "triton.core_grad_tokens",
        "triton.core_of_packed",
        "triton.cur_linear",
        "triton.materialize",
        "triton.products",
    },
    "triton.contract": set(),
    "triton.materialize": {"triton.contract", "triton.launch", "triton.spectra"},
    "triton.core_grad_dense": {
        "triton.blocks",
        "triton.contract",
        "triton.launch",
        "triton.spectra",
    },
    "triton.core_grad_tokens": {
        "triton.blocks",
        "triton.contract",
        "triton.launch",
        "triton.products",
    },
    "triton.core_of_packed": {"triton.blocks", "triton.contract", "triton.launch"},
    "triton.cur_linear": {
        "triton.contract",
        "triton.launch",
        "triton.products",
        "triton.spectra",
    },
    "triton.blocks": {"triton.launch", "triton.spectra"},
    "triton.products": {"triton.launch", "triton.spectra"},
    "triton.spectra": set(),
    "triton.launch": set(),
    "distributed": set(),
    "nn": {
        "autocast",
        "base",
        "cores",
        "cost",
        "decompose",
        "distributed",
        "eager",
        "factors",
        "functional",
        "kept",
        "linear",
        "places",
        "reading",
        "rows",
        "streams",
        "switching",
    },
    "eager": {"autocast", "ops", "streams"},
    "places": set(),
    "linear": {"distributed", "kept", "nn", "places", "reading"},  # the stack for its type alone
    "layers": {"linear", "places", "rows"},
    "adapters.weights": {"distributed", "layers", "linear", "places"},
    "adapters.targets": {"adapters.holding", "adapters.weights", "places"},
    "adapters.plan": {"adapters.holding", "adapters.targets", "adapters.weights", "decompose"},
    "adapters.fingerprint": {
        "adapters.holding",
        "adapters.plan",
        "adapters.weights",
        "distributed",
    },
    "adapters.holding": {"cores", "factors", "nn"},
    "adapters.install": {"adapters.holding", "layers", "linear", "nn"},
    "adapters.checkpoint": set(),
    "adapters.names": set(),
    "adapters.copying": set(),
    "adapters.streaming": {"adapters.names", "adapters.plan", "adapters.weights", "decompose"},
    "adapters.curves": {"adapters.plan", "adapters.streaming", "adapters.weights", "decompose"},
    "adapters.trained": {"adapters.holding"},
    "adapters.contents": {"adapters.checkpoint", "adapters.plan", "factors", "nn"},
    "adapters.batch": {"functional", "nn"},
    "adapters.adapter": {
        "adapters.batch",
        "adapters.checkpoint",
        "adapters.contents",
        "adapters.fingerprint",
        "adapters.holding",
        "adapters.install",
        "adapters.plan",
        "adapters.streaming",
        "adapters.trained",
        "adapters.weights",
        "distributed",
        "nn",
        "rows",
        "switching",
    },
    "adapters.adapt": {
        "adapters.adapter",
        "adapters.fingerprint",
        "adapters.holding",
        "adapters.install",
        "adapters.plan",
        "adapters.streaming",
        "adapters.trained",
        "adapters.weights",
        "cost",
        "decompose",
        "factors",
        "nn",
        "places",
    },
    "adapters.load": {
        "adapters.adapt",
        "adapters.adapter",
        "adapters.contents",
        "adapters.fingerprint",
        "adapters.install",
        "adapters.trained",
        "adapters.weights",
    },
    "adapters.directory": {
        "adapters.contents",
        "adapters.copying",
        "adapters.fingerprint",
        "adapters.names",
        "decompose",
        "factors",
        "functional",
    },
    "cli": {
        "adapters.contents",
        "adapters.curves",
        "adapters.directory",
        "adapters.plan",
        "decompose",
        "factors",
        "functional",
    },
    "__main__": {"cli"},
    "adapters": {
        "adapters.adapt",
        "adapters.adapter",
        "adapters.batch",
        "adapters.load",
        "adapters.plan",
    },
    "peft.requirement": set(),
    "peft.config": {"cost", "factors"},
    "peft.hosted": {"nn", "ops", "places"},
    "peft.layer": {
        "eager",
        "kept",
        "ops",
        "peft.hosted",
        "peft.rows",
        "places",
        "reading",
        "rows",
        "switching",
    },
    "peft.planning": {
        "adapters.fingerprint",
        "adapters.plan",
        "adapters.weights",
        "decompose",
        "functional",
        "peft.config",
        "peft.hosted",
        "places",
    },
    "peft.model": {
        "adapters.plan",
        "adapters.weights",
        "peft.config",
        "peft.hosted",
        "peft.layer",
        "peft.planning",
        "peft.rows",
        "places",
        "switching",
    },
    "peft.rows": {
        "peft.hosted",
        "peft.layer",
        "peft.model",
        "rows",
    },  # those of peft for their types
    "peft.register": {"peft.config", "peft.model"},
    "peft": {"peft.config", "peft.layer", "peft.model", "peft.register", "peft.requirement"},
}


def run(code):
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
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
    """Modules of ours that a file imports, by absolute dotted name within the package."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            start = package[: len(package) - node.level + 1]
            if node.module:
                yield ".".join([*start, node.module])
            else:
                yield from (".".join([*start, alias.name]) for alias in node.names)


@pytest.mark.parametrize(
    ("name", "path"), list(modules()), ids=lambda value: str(value).split("/")[-1]
)
def test_arrows_point_downwards(name, path):
    imported = {target for target in imports_of(name, path) if target != "__version__"}
    assert imported <= MAY_IMPORT[name]


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
spec = importlib.util.spec_from_file_location("reference", {str(PACKAGE / "reference.py")!r})
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
