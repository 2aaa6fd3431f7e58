"""When the demo may take what an earlier run pretrained."""

import shutil

import pytest
import torch

from segmentation_files import EXAMPLES


@pytest.fixture
def demo(job, tmp_path):
    """The module, and a function from options to what is kept for them in a folder of the test."""

    def find(*options, seed=0):
        args = job.options.parse_args(options)
        return job.kept_pretraining.find(tmp_path / "kept", job.task.demo_key(args, seed))

    return job, find


def keep(job, folder, pretrain):
    name = job.task.demo_key(job.options.parse_args([]), 0)
    return job.kept_pretraining.keep(folder, name, pretrain)


def test_what_is_kept_depends_on_all_that_it_was_made_with(demo, monkeypatch, tmp_path):
    job, find = demo

    def pretrain(folder):
        torch.save({}, folder / "weights")
        report = job.training.Report(parameters=3, loss=[0.5], dice={2: 0.25})
        return folder / "weights", report

    assert find() is None
    file, report = keep(job, tmp_path / "kept", pretrain)
    assert find() == (file, report)
    assert sorted(path.suffix for path in file.parent.iterdir()) == [".json", ".safetensors"]
    # What comes after the pretraining does not matter.
    assert find("--steps", "7", "--methods", "core", "--core-lr", "3", "--rank", "2", "--resume")
    assert find("--targets", "attn.qkv", "--patience", "3", "--volumes", "4", "--alpha", "2")
    for other in (
        ["--pretrain-steps", "7"],
        ["--pretrain-lr", "0.1"],
        ["--hidden-size", "96"],
        ["--spacing", "1", "1", "1"],
        ["--mirror", "0"],
        ["--smoke"],
    ):
        assert find(*other) is None, other
    assert find(seed=1) is None
    kept = job.kept_pretraining
    with monkeypatch.context() as patch:
        patch.setattr(kept.importlib.metadata, "version", lambda name: "0.1")
        assert find() is None
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "VSX")
        assert find() is None
    with monkeypatch.context() as patch:
        (tmp_path / "segmentation").mkdir()
        for name in kept.CODE:
            shutil.copy(EXAMPLES / name, tmp_path / name)
        patch.setattr(kept, "EXAMPLES", tmp_path)
        for name in kept.CODE:
            assert find()
            (tmp_path / name).write_text("another line")
            assert find() is None, name
            shutil.copy(EXAMPLES / name, tmp_path / name)
    assert find()


def test_a_pretraining_that_fails_leaves_nothing(demo, tmp_path):
    job, find = demo

    def pretrain(folder):
        (folder / "weights").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        keep(job, tmp_path / "kept", pretrain)
    assert find() is None
    assert list((tmp_path / "kept").iterdir()) == []
