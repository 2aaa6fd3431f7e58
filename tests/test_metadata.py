"""What a user keeps with an adapter: it travels with the file, and each adapter has its own."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import save_file

import tcur_kernels as tcur
from models import Tiny
from rewriting import rewritten
from tcur_kernels import cli

KEPT = {"spacing": [1.0, 1.0, 2.5], "clip": {"from": -1, "to": None}, "name": "Größe", "new": True}


def base_model():
    torch.manual_seed(0)
    return Tiny().eval()


@pytest.fixture
def adapter():
    return tcur.adapt(base_model(), rank=2)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter.safetensors"


def test_it_travels_with_the_file(adapter, path):
    assert adapter.metadata == {}
    adapter.metadata = KEPT
    adapter.save(path)
    assert tcur.read_metadata(path) == tcur.read_metadata(str(path)) == KEPT
    loaded = tcur.load_adapter(base_model(), path)
    assert loaded.metadata == KEPT
    loaded.metadata["more"] = [1]  # the dict is the adapter's own
    loaded.save(path)
    assert tcur.read_metadata(path) == {**KEPT, "more": [1]}


def test_it_is_copied_and_tuples_become_lists(adapter, path):
    given = {"sizes": (1, (2, 3))}
    adapter.metadata = given
    given["later"] = 1
    assert adapter.metadata == {"sizes": [1, [2, 3]]}
    adapter.save(path)
    assert tcur.read_metadata(path) == adapter.metadata


def test_each_adapter_has_its_own(adapter, path, tmp_path):
    adapter.metadata = {"of": "default"}
    adapter.add("b")
    adapter.activate("b")
    assert adapter.metadata == {}
    adapter.metadata = {"of": "b"}
    adapter.save(path)
    adapter.activate("default")
    assert adapter.metadata == {"of": "default"}
    adapter.save(tmp_path / "b", name="b")
    assert tcur.read_metadata(tmp_path / "b") == {"of": "b"}
    adapter.combine({"default": 0.5, "b": 0.5}, "mix")
    adapter.load(path, "c")
    for name, kept in (("mix", {}), ("c", {"of": "b"})):
        adapter.activate(name)
        assert adapter.metadata == kept
    adapter.metadata["of"] = "c"
    adapter.activate("b")
    assert adapter.metadata == {"of": "b"}
    adapter.load(tmp_path / "b", "c")  # a hot swap brings that of its file
    adapter.activate("c")
    assert adapter.metadata == {"of": "b"}
    adapter.delete("b")
    adapter.add("b")
    adapter.activate("b")
    assert adapter.metadata == {}


def endless():
    value = {}
    value["again"] = [value]
    return value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1], "metadata: expected a dict, got list"),
        (None, "metadata: expected a dict, got NoneType"),
        ({1: 2}, "metadata: expected strings as keys, got 1"),
        ({"a": [{2.5: 1}]}, r"metadata\['a'\]\[0\]: expected strings as keys, got 2.5"),
        ({"a": float("nan")}, r"metadata\['a'\]: expected a finite number, got nan"),
        ({"a": (1, -float("inf"))}, r"metadata\['a'\]\[1\]: expected a finite number, got -inf"),
        ({"a": torch.ones(1)}, r"metadata\['a'\]: expected what JSON can hold .*, got Tensor"),
        ({"a": {"b": {1}}}, r"metadata\['a'\]\['b'\]: expected what JSON can hold .*, got set"),
        (endless(), "metadata: expected a dict that ends, got one that holds itself"),
    ],
)
def test_what_json_cannot_hold_is_refused(adapter, path, value, message):
    adapter.metadata = KEPT
    with pytest.raises(TypeError, match=message):
        adapter.metadata = value
    assert adapter.metadata == KEPT
    if isinstance(value, dict):
        adapter.save(path)
        before = path.read_bytes()
        adapter.metadata.update(value)  # past the setter
        with pytest.raises(TypeError, match=message):
            adapter.save(path)
        assert path.read_bytes() == before


def test_files_without_it_have_an_empty_one(adapter, path):
    """Such as those that were written before there was any."""
    adapter.metadata = KEPT
    adapter.save(path)
    rewritten(path, lambda header: header.pop("metadata"), version=2)
    assert tcur.read_metadata(path) == {}
    adapter.load(path)
    assert adapter.metadata == {}
    assert tcur.load_adapter(base_model(), path).metadata == {}


def test_reading_refuses_what_loading_refuses(adapter, path, tmp_path):
    with pytest.raises(FileNotFoundError, match="path: expected an adapter file, got none"):
        tcur.read_metadata(path)
    adapter.save(path)
    torn = tmp_path / "torn"
    torn.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="path: expected a whole safetensors file"):
        tcur.read_metadata(torn)
    save_file({"a": torch.ones(1)}, torn)
    with pytest.raises(ValueError, match="path: expected an adapter of tcur_kernels"):
        tcur.read_metadata(torn)
    save_file({"a": torch.ones(1)}, torn, {"format": "tcur_kernels.adapter", "format_version": "2"})
    with pytest.raises(ValueError, match="path: expected a whole adapter file, got one with parts"):
        tcur.read_metadata(torn)
    rewritten(path, lambda header: header.update(metadata=[1]))
    model = base_model()
    for read in (tcur.read_metadata, lambda path: tcur.load_adapter(model, path)):
        with pytest.raises(ValueError, match=r"\(metadata: expected a dict, got list\) at"):
            read(path)
    tcur.adapt(model, rank=2)  # it is not adapted yet


def test_copies_of_models_and_handles_are_as_before(adapter):
    adapter.metadata = KEPT
    for twin in (copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):
        assert twin.metadata == KEPT
        twin.metadata["own"] = 1
    assert adapter.metadata == KEPT
    assert not [key for key in adapter.model.state_dict() if "metadata" in key]
    copy.deepcopy(adapter.model)(torch.randn(2, 7, 6))


def test_inspect_prints_it(adapter, path, capsys):
    adapter.save(path)
    assert cli.main(["inspect", str(path)]) == 0
    assert "metadata" not in capsys.readouterr().out
    adapter.metadata = KEPT
    adapter.save(path)
    assert cli.main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert '\nmetadata:\n  {\n    "spacing": [\n' in out
    assert '"name": "Größe"' in out
