"""When the demo may take what an earlier run pretrained."""

import shutil
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def demo(monkeypatch, tmp_path):
    """The modules, and arguments of a run that keeps its pretraining in a folder of the test."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import kept_pretraining
    import segmentation_training
    import unetr_segmentation

    def parse(*arguments):
        return unetr_segmentation.parse_args(["--keep", str(tmp_path / "kept"), *arguments])

    return kept_pretraining, segmentation_training, parse


def test_what_is_kept_depends_on_all_that_it_was_made_with(demo, monkeypatch, tmp_path):
    kept, training, parse = demo

    def pretrain(weights):
        torch.save({}, weights)
        return training.Report(parameters=3, loss=[0.5], dice={2: 0.25})

    args = parse()
    assert kept.find(args, 0) is None
    file, report = kept.keep(args, 0, pretrain)
    assert kept.find(args, 0) == (file, report)
    assert sorted(path.suffix for path in file.parent.iterdir()) == [".json", ".pt"]
    # What comes after the pretraining does not matter.
    assert kept.find(parse("--steps", "7", "--methods", "core", "--core-lr", "3"), 0)
    for other in (
        ["--pretrain-steps", "7"],
        ["--pretrain-lr", "0.1"],
        ["--hidden-size", "96"],
        ["--spacing", "1", "1", "1"],
        ["--mirror", "0"],
        ["--smoke"],
    ):
        assert kept.find(parse(*other), 0) is None, other
    assert kept.find(args, 1) is None
    with monkeypatch.context() as patch:
        patch.setattr(kept.importlib.metadata, "version", lambda name: "0.1")
        assert kept.find(args, 0) is None
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "VSX")
        assert kept.find(args, 0) is None
    with monkeypatch.context() as patch:
        for name in kept.CODE:
            shutil.copy(EXAMPLES / name, tmp_path)
        patch.setattr(kept, "__file__", str(tmp_path / "kept_pretraining.py"))
        for name in kept.CODE:
            assert kept.find(args, 0)
            (tmp_path / name).write_text("another line")
            assert kept.find(args, 0) is None, name
            shutil.copy(EXAMPLES / name, tmp_path)
    assert kept.find(args, 0)


def test_a_pretraining_that_fails_leaves_nothing(demo):
    kept, _, parse = demo

    def pretrain(weights):
        weights.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept.keep(parse(), 0, pretrain)
    assert kept.find(parse(), 0) is None
    assert list(parse().keep.iterdir()) == []
