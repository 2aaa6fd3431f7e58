"""Every launch, compiled for every architecture of the launch table: no GPU is needed.

The launches are those that the operators make, recorded instead of run. What is compiled must fit:
shared memory of the architecture, no register spilled, products on tensor cores, and none of them
at a precision that was not asked for. `test_triton_oldest.py` runs a part with the oldest Triton.
"""

import re
import subprocess
from contextlib import contextmanager, nullcontext
from unittest import mock

import pytest
import torch
import triton

from benchmarks.sass.triton_launches import compiled, record
from cases import counts_of, make_case
from tcur_kernels.operators import contract
from tcur_kernels.operators.contract import (
    CoreGradDense,
    CoreGradTokens,
    CoreOfPacked,
    CurLinear,
    MaterializeOut,
)
from tcur_kernels.operators.triton import (
    INTERPRETED,
    core_grad_dense,
    core_grad_tokens,
    core_of_packed,
    cur_linear,
    launch,
    materialize,
    operators,
)

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing"),
]

ARCHITECTURES = (*launch.NVIDIA, *launch.AMD)
#: Bytes of shared memory that a program may have.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
#: One length of tubes for every row of the table, and for even and odd.
N3 = (1, 4, 12, 17, 47, 48, 128)
#: Of them, those of every run: they reach all rows of sm_90.
FEW = (1, 12, 17, 128)


def launches_of(arch, precision, n3, rank, dtype, n1=768, n2=1024):
    """Of all operators: W_eff of a stack and of layers, both gradients, a layer both ways."""
    factors = torch.bfloat16 if precision == "bf16" else torch.float32
    precision = "ieee" if precision == "bf16" else precision

    def empty(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device="meta")

    packed = empty(n1, n3 * rank, dtype=factors), empty(n3 * rank, n2, dtype=factors)
    core, w_eff = empty(n3, rank, rank), empty(n3, n1, n2, dtype=dtype)
    weight, x, y = w_eff[0], empty(512, n2, dtype=dtype), empty(512, n1, dtype=dtype)
    ids, cores = empty(16, dtype=torch.int64), empty(4, n3, rank, rank)

    def calls():
        for weights in ([], [w_eff], list(w_eff)):
            materialize.run(MaterializeOut(weights, *packed, core, 0.5, w_eff), precision)
        if n3 > 1:
            matrices = [empty(n1, count * n2, dtype=dtype) for count in counts_of(n3)]
            out = w_eff.flatten()
            materialize.run(MaterializeOut(matrices, *packed, core, 0.5, out), precision)
        core_grad_dense.run(CoreGradDense(w_eff, *packed), precision)
        tokens = CoreGradTokens(x, y, *packed, n3, 0, 1)
        core_grad_tokens.run(tokens, precision)
        core_grad_tokens.run(tokens._replace(packed=True), precision)
        core_grad_tokens.run(tokens._replace(adapter_ids=ids, adapters=4), precision)
        core_of_packed.run(CoreOfPacked(cores, 0.5), precision)
        for transposed in (False, True):
            given = y if transposed else x
            linear = CurLinear(given, weight, None, *packed, core, 0, 1, 0.5, transposed)
            cur_linear.run(linear, precision)
            cur_linear.run(linear._replace(core=cores, adapter_ids=ids), precision)

    return record(arch, calls)


def check_fits(arch, launched, built, path):
    """Shared memory, registers, tensor cores."""
    assert built.metadata.shared <= SHARED[arch], launched.name
    precision = launched.options.get("PRECISION")
    if arch.startswith("gfx"):
        assembly = built.asm["amdgcn"]
        spills = re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", assembly)
        assert spills, "the assembly does not say"
        assert not any(map(int, spills)), f"{launched.name}: {spills} registers spilled"
        product = r"v_mfma_\w*bf16" if precision == "bf16" else r"v_mfma_\w*f32"
    else:
        path.write_bytes(built.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "-res-usage", str(path)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        stack, local = re.search(r"STACK:(\d+) .*LOCAL:(\d+)", usage).groups()
        assert (stack, local) == ("0", "0"), f"{launched.name}: spills, {usage}"
        assembly = built.asm["ptx"]
        kind = r"(bf16|kind::f16)" if precision == "bf16" else "tf32"
        product = rf"(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\S*{kind}"
    if precision is not None:
        assert re.search(product, assembly), f"{launched.name}: no product on tensor cores"


def check_precisions(launched, built):
    """Products in TF32 only where they were asked for, and three of them where fp32 was.

    What looks like a sum of products may become a product in TF32 on its own. In a kernel that
    splits fp32 into TF32 it shows by standing alone: the others come as chains of three.
    """
    precision = launched.options.get("PRECISION")
    operands, value = r"tensor<[\dx]*(\w+)> \* tensor<[\dx]*(\w+)>", r"(%[\w#:]+)"
    dot = re.compile(rf"{value} = tt\.dot {value}, {value}, {value}(.*?) : {operands}")
    dots, links = [], {}  # a name may be used again where it is out of scope: links are the last's
    for line in built.asm["ttir"].splitlines():
        if found := dot.search(line):
            result, _, _, addend, stated, *types = found.groups()
            before = links.get(addend, {"link": 0, "added": False})
            before["added"] = True
            links[result] = {"link": before["link"] + 1, "added": False, "first": addend}
            dots.append((links[result], stated, types))
        elif defined := re.match(r"\s*(%\w+)(:\d+)? = ", line):
            links.pop(defined[1], None)
    assert len(dots) == built.asm["ttir"].count("= tt.dot "), "a product of another spelling"
    assert bool(dots) == (precision is not None), launched.name
    kind = "bf16" if precision == "bf16" else "f32"
    assert all(types == [kind, kind] for *_, types in dots), launched.name
    if kind == "bf16":
        return
    stated = {"ieee": ""}.get(precision, ", inputPrecision = tf32")
    assert all(said == stated for _, said, _ in dots), f"{launched.name}: {dots}"
    if precision == "3xtf32":
        for link, *_ in dots:
            assert link["added"] == (link["link"] < 3), f"{launched.name}: not one of three"
            assert link["link"] > 1 or link["first"].startswith("%cst"), (
                f"{launched.name}: a long sum"
            )
    later = set(re.findall(r"inputPrecision = (\w+)", built.asm["ttgir"]))
    assert later <= ({"tf32", "0"} if stated else set()), launched.name  # 0 is TF32 for Hopper


@pytest.fixture(scope="module")
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def check_all(arch, launches, tmp_path):
    seen = set()
    for launched in launches:
        # Triton compiles anew for numbers that are multiples of 16.
        kinds = [
            a % 16 == 0 if isinstance(a, int) else getattr(a, "dtype", type(a))
            for a in launched.args
        ]
        key = (launched.name, *kinds)
        if key not in seen:
            seen.add(key)
            built = compiled(arch, launched)
            check_precisions(launched, built)
            check_fits(arch, launched, built, tmp_path / "kernel.cubin")
    return seen


MATRIX = pytest.mark.matrix
#: (architecture, precision, dtype of weights and tokens, lengths).
QUICK = [("sm_90", "ieee", torch.float32, (n3,)) for n3 in FEW]
QUICK += [("gfx942", "ieee", torch.float32, (12, 17))]
QUICK += [("sm_90", "bf16", torch.bfloat16, (12, 47))]
WHOLE = [
    (arch, precision, dtype, N3)
    for precision, dtype in (
        ("ieee", torch.float32),
        ("bf16", torch.bfloat16),
        ("tf32", torch.float32),
        ("ieee", torch.float16),
    )
    for arch in ARCHITECTURES
]
CASES = QUICK + [pytest.param(*each, marks=MATRIX) for each in WHOLE]


@pytest.mark.usefixtures("_cache")
@pytest.mark.parametrize(
    ("arch", "precision", "dtype", "lengths"),
    CASES,
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else str(value),
)
def test_every_launch_fits(arch, precision, dtype, lengths, tmp_path):
    launches = [
        launched for n3 in lengths for launched in launches_of(arch, precision, n3, 8, dtype)
    ]
    assert len(check_all(arch, launches, tmp_path)) >= 12


@MATRIX
@pytest.mark.usefixtures("_cache")
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("rank", [1, 16, 32])
def test_every_launch_fits_at_other_ranks(arch, rank, tmp_path):
    launches = [
        launched for n3 in N3 for launched in launches_of(arch, "ieee", n3, rank, torch.float32)
    ]
    check_all(arch, launches, tmp_path)


@pytest.mark.usefixtures("_cache")
@pytest.mark.parametrize(
    ("arch", "n3"),
    [
        ("sm_90", 12),
        pytest.param("sm_80", 4, marks=MATRIX),
        pytest.param("sm_90", 48, marks=MATRIX),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_of_layers_are_read_by_vectors(arch, n3, dtype):
    """As those of a stack are, where their addresses allow it."""

    def vectors(launched):
        return compiled(arch, launched).asm["ptx"].count("ld.global.v4.b32")

    def stores(launched):
        return compiled(arch, launched).asm["ptx"].count("st.global.v4.b32")

    launches = launches_of(arch, "ieee", n3, 8, dtype)
    launches = [launched for launched in launches if "BASE" in launched.options]
    none, stack, layers, beside = launches
    assert [each.options["BASE"] for each in launches] == ["none", "stack", "layers", "beside"]
    assert vectors(beside) == vectors(layers) == vectors(stack) > vectors(none)
    assert stores(beside) == stores(stack) > 0
    for each in (layers, beside):
        each.options["ALIGNED"] = 1  # one address is not a multiple of 16
        assert vectors(each) == vectors(none)


def test_every_launch_is_made_on_the_device_of_its_tensors(monkeypatch):
    """Triton launches on the current device, whatever its arguments are on."""
    current = []

    class Guarded(list):
        def append(self, launched):
            assert current, f"{launched.name} is not under the guard"
            super().append(launched)

    @contextmanager
    def guard(tensor):
        current.append(tensor.device)
        yield
        current.pop()

    monkeypatch.setattr(operators, "_device_of", guard)
    case = make_case(5, 6, 9, 2)
    core, packed, weights = case.core, case.packed, list(case.weight)
    x, y = torch.randn(7, 9), torch.randn(7, 6)

    def calls():
        for given in ([case.weight], weights):
            contract.operator("materialize", "triton")(given, *packed, core, 0.5, torch.float32)
        contract.operator("core_grad_dense", "triton")(case.weight, *packed)
        for is_packed in (False, True):
            contract.operator("core_grad_tokens", "triton")(
                x, y, *packed, 5, 0, 1, None, 1, is_packed
            )
        contract.operator("core_of_packed", "triton")(core[None], 0.5)
        args = (x, weights[0], None, *packed, core, 0, 1, 0.5, False)
        contract.operator("cur_linear", "triton")(*args)

    assert len(record("sm_90", calls, Guarded())) == 2 + 2 + 3 + 4 + 4 + 1 + 4
    assert not current


def test_the_guard_is_for_the_device_that_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(device))
    there = mock.Mock(device=torch.device("cuda", 1))
    with operators._device_of(there) as device:
        assert device == there.device
    with operators._device_of(torch.ones(1)) as device:
        assert device is None


def test_every_row_of_the_table_is_launched():
    """The lengths above reach all rows, and the table has a row for whatever comes."""

    def used(arch, lengths):
        return {launch.row(row.kernel, arch, n3) for n3 in lengths for row in launch.table()}

    assert set.union(*(used(arch, N3) for arch in ARCHITECTURES)) == set(launch.table())
    assert used("sm_90", FEW) == used("sm_90", N3)
    for kernel in {row.kernel for row in launch.table()}:
        for arch in (*ARCHITECTURES, launch.CPU):
            launch.row(kernel, arch, 1 << 20)
