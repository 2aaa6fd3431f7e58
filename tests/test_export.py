"""What leaves the house: torch.export of adapted and merged models, ONNX of merged ones."""

import copy

import pytest
import torch
from torch import nn

import tcur_kernels as tcur
from models import Tiny
from plain import by_plain_torch
from tolerance import assert_composition_close


@pytest.fixture
def adapter():
    torch.manual_seed(0)
    adapter = tcur.adapt(Tiny().eval(), rank=2)
    with torch.no_grad():
        for stack in adapter.stacks.values():
            stack.core.normal_(std=0.3)
    return adapter


def test_export(adapter, tmp_path):
    x = torch.randn(4, 7, 6)
    merged = adapter.merge(inplace=False)
    batch = {0: torch.export.Dim("batch", min=2)}
    for model in (merged, adapter.model):
        program = torch.export.export(model, (x,), dynamic_shapes=(batch,))
        torch.export.save(program, tmp_path / "program.pt2")
        loaded = torch.export.load(tmp_path / "program.pt2").module()
        for rows in (4, 3):
            expected = by_plain_torch(adapter, x[:rows])
            assert_composition_close(loaded(x[:rows]), *expected)
            assert_composition_close(model(x[:rows]), *expected)
    targets = {str(node.target) for node in program.graph.nodes}
    assert any("tcur" in target for target in targets)  # the adapted one needs this package


# onnxscript and torch's exporter warn of their own future.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnx(adapter, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    x = torch.randn(4, 7, 6)
    merged = adapter.merge(inplace=False)
    path = tmp_path / "merged.onnx"
    batch = {0: torch.export.Dim("batch", min=2)}
    torch.onnx.export(merged, (x,), path, dynamic_shapes=(batch,), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = (entry.name for entry in session.get_inputs())
    exact = copy.deepcopy(merged).double()
    for rows in (4, 3):
        inputs = x[:rows]
        (y,) = session.run(None, {name: inputs.numpy()})
        wanted = exact(inputs.double())
        assert_composition_close(torch.from_numpy(y), lambda x=inputs: merged(x), wanted)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_torch_script_takes_the_merged_copy():
    x = torch.randn(5, 6)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    adapter = tcur.adapt(model, rank=2)
    nn.init.normal_(adapter.stacks["6x6"].core)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script: expected plain layers, got a TPr"):
        torch.jit.script(model)
    scripted = torch.jit.script(adapter.merge(inplace=False))
    assert_composition_close(scripted(x), *by_plain_torch(adapter, x))
