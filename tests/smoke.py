"""What an installed package must do, without pytest, a checkout or a compiler: `make wheel`.

``python smoke.py`` runs wherever `tcur_kernels` is installed, with ``tolerance.py`` beside it.
``python smoke.py PYTHON…`` says how to start another Python, where its own path does not. It checks
every operator by every instruction set that runs here against float64. Then it adapts, trains,
saves, loads and merges a small model, and uses the command line. The last line is what was checked,
as JSON; a check that fails ends it with a traceback.
"""

import json
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import tcur_kernels as tcur
from tcur_kernels.operators import contract, native
from tolerance import assert_close, same_mathematics

#: n3, n1, n2, rank: no pair, codelets of one and of two steps, folded levels, a convolution.
SHAPES = ((1, 9, 33, 2), (12, 13, 70, 4), (48, 7, 33, 3), (34, 6, 20, 2), (67, 5, 18, 2))
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "nvcc", "ninja")


def records(n3, n1, n2, rank):
    """A record of arguments for every operator, fp32, by name; some have several."""
    weight, core = torch.randn(n3, n1, n2), torch.randn(n3, rank, rank)
    factors = tcur.CURFactors(torch.randn(n3, n1, rank), torch.randn(n3, rank, n2))
    packed = factors.lateral_hat, factors.horizontal_hat
    slices = min(2, n3)
    x, grad_y, bias = torch.randn(6, n2), torch.randn(6, slices * n1), torch.randn(slices * n1)
    rows = weight[:slices].flatten(0, 1)
    ids, cores = torch.tensor([0, 2, 1, 1, 0, 2]), torch.randn(3, n3, rank, rank)
    place = n3 - slices, slices
    return {
        "materialize": [contract.Materialize([weight], *packed, core, 0.5, torch.float32)],
        "materialize_out": [
            contract.MaterializeOut([weight], *packed, core, 0.5, torch.empty_like(weight))
        ],
        "core_grad_dense": [contract.CoreGradDense(weight, *packed)],
        "core_grad_tokens": [
            contract.CoreGradTokens(x, grad_y, *packed, n3, *place),
            contract.CoreGradTokens(x, grad_y, *packed, n3, *place, ids, 3),
        ],
        "core_of_packed": [contract.CoreOfPacked(torch.randn(3, n3, rank, rank), 0.5)],
        "cur_linear": [
            contract.CurLinear(x, rows, bias, *packed, core, *place, 0.5, False),
            contract.CurLinear(grad_y, rows, None, *packed, core, *place, 0.5, True),
            contract.CurLinear(x, None, None, *packed, cores, *place, 0.5, False, adapter_ids=ids),
        ],
        "w_eff_linear": [contract.WEffLinear(x, rows, bias, *packed, core, *place, 0.5, False)],
    }


def widened(value):
    """The same numbers in float64."""
    if isinstance(value, (list, tuple)):
        return [widened(each) for each in value]
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    return torch.float64 if value is torch.float32 else value


def result(run, arguments):
    """What an operator returns, or what it has written."""
    returned = run(*arguments)
    return returned if returned is not None else arguments.out


def check_operators():
    """Every operator, on the compiled kernels of every instruction set that runs here."""
    checks = 0
    for isa in native.runnable_isas():
        native.force(isa=isa)
        for shape in SHAPES:
            torch.manual_seed(0)
            given = records(*shape)
            assert given.keys() == contract.OPERATORS.keys()
            for name, each in given.items():
                for arguments in each:
                    wide = type(arguments)(*widened(arguments))
                    plain = contract.plain(name)
                    exact, same = result(plain, wide), result(plain, arguments).clone()
                    assert_close(result(contract.operator(name), arguments), same, exact)
                    checks += 1
    native.force(isa=native.runnable_isas()[0])
    # The definition, without a Fourier transform: the mathematics itself is right.
    a, b = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    rolled = [sum(a[i] @ b[(n - i) % 4] for i in range(4)) for n in range(4)]
    assert same_mathematics(tcur.t_product(a, b), torch.stack(rolled))
    return checks + 1


def model():
    torch.manual_seed(1)
    blocks = [torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.GELU()) for _ in range(4)]
    return torch.nn.Sequential(*blocks, torch.nn.Linear(16, 3))


def command(*arguments, status=0):
    """What ``python -m tcur_kernels`` says; it must end so, without a traceback or a warning."""
    line = [
        *(sys.argv[1:] or [sys.executable]),
        "-W",
        "error",
        "-m",
        "tcur_kernels",
        *map(str, arguments),
    ]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def check_adapters(folder):
    """Adapt, train, save, load and merge; then the same by the command line."""
    base, inputs, labels = model(), torch.randn(32, 16), torch.arange(32) % 3
    adapter = tcur.adapt(model(), rank=2, train_also="4")
    assert torch.equal(adapter.model(inputs), base(inputs))  # a core of zeros changes no bit
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(adapter.model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] * 0.9, losses
    adapter.save(folder / "adapter")
    trained = adapter.model(inputs)
    assert not torch.equal(trained, base(inputs))
    assert torch.equal(tcur.load_adapter(model(), folder / "adapter").model(inputs), trained)
    merged = adapter.merge(inplace=False)
    assert same_mathematics(merged(inputs), trained)

    directory = folder / "model"
    directory.mkdir()
    save_file(base.state_dict(), directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text("{}")
    assert f"version: {tcur.__version__}" in command("info")
    assert "transformers" in command("plan", directory, status=2)  # which nothing here needs
    assert "16x16" in command("inspect", folder / "adapter")
    command("merge", directory, folder / "adapter", "--out", folder / "merged")
    twin = model()
    twin.load_state_dict(load_file(folder / "merged" / "model.safetensors"))
    assert same_mathematics(twin(inputs), trained)
    return 10


def main():
    assert not any(map(shutil.which, COMPILERS)), "a compiler is on the PATH"
    package = Path(tcur.__file__).resolve()
    assert "site-packages" in package.parts, f"not installed: {package}"
    info = tcur.build_info()
    assert info["cpu"]["built"], info["cpu"]
    machine = platform.machine()
    wanted = ["avx512", "avx2", "baseline"] if machine == "x86_64" else ["baseline"]
    assert info["cpu"]["isa_compiled"] == wanted, info["cpu"]
    assert all("cpu" in info["operators"][name] for name in ("materialize", "cur_linear"))
    with tempfile.TemporaryDirectory() as folder:
        checks = check_operators() + check_adapters(Path(folder))
    facts = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": machine,
        "isas": native.runnable_isas(),
        "cuda": info["cuda"],
        "checks": checks,
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
