"""What leaves the house: torch.export of adapted and merged models, ONNX of merged ones."""

import copy

import pytest
import torch

import tcur_kernels as tcur
from models import Tiny
from tolerance import assert_close


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
    exact = copy.deepcopy(adapter.model).double()
    for model in (merged, adapter.model):
        program = torch.export.export(model, (x,), dynamic_shapes=(batch,))
        torch.export.save(program, tmp_path / "program.pt2")
        loaded = torch.export.load(tmp_path / "program.pt2").module()
        for rows in (4, 3):
            assert_close(loaded(x[:rows]), model(x[:rows]), exact(x[:rows].double()))
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
        (y,) = session.run(None, {name: x[:rows].numpy()})
        y, wanted = torch.from_numpy(y), merged(x[:rows])
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-6)
        assert y.shape == exact(x[:rows].double()).shape
