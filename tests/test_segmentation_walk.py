"""docs/segmentation.md, walked: every command of it, in its order, on tiny volumes."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.networks.nets import SwinUNETR

import tcur_kernels as tcur
from segmentation_files import phantom, tiny_unetr, write, write_pair

PAGE = (Path(__file__).parent.parent / "docs" / "segmentation.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]
#: Options that the commands get beside their own, to be fast and for the tiny UNETR.
MORE = {
    "unetr_segmentation.py": ["--num-heads", "4"],
    "--steps": ["--steps", "3"],
    "swin_unetr_segmentation.py": ["--img-size", "64", "32", "32"],
}


@pytest.fixture
def scripts(job):
    """The scripts by their names."""
    import export
    import predict
    import swin_unetr_segmentation
    import unetr_segmentation

    all_of_them = (unetr_segmentation, predict, export, swin_unetr_segmentation)
    return {f"{one.__name__}.py": one.main for one in all_of_them}


def lay_out_scans(folder):
    """What the page begins with: a datalist, its volumes, weights, and scans without labels."""
    (listed,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    datalist = folder / "scans" / "dataset.json"
    datalist.parent.mkdir()
    datalist.write_text(listed)
    for section, entries in json.loads(listed).items():
        for number, entry in enumerate(entries) if section != "labels" else ():
            pair = write_pair(folder, seed=number)
            for key in ("image", "label"):
                target = datalist.parent / entry[key]
                target.parent.mkdir(exist_ok=True)
                Path(pair[key]).rename(target)
    torch.save({"state_dict": tiny_unetr().state_dict()}, folder / "unetr.pt")
    swin = SwinUNETR(1, 2, feature_size=12, depths=(1,) * 4).swinViT.state_dict()
    state = {f"module.{name.replace('linear', 'fc')}": tensor for name, tensor in swin.items()}
    torch.save({"state_dict": state}, folder / "model_swinvit.pt")
    for number in range(2):
        write(folder / "scans" / "new" / f"{number}.nii.gz", phantom((30, 20, 25), number)[0])


def test_the_walk(scripts, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    lay_out_scans(tmp_path)
    torch.set_num_threads(1)
    said = {}
    for interpreter, *words in COMMANDS:
        assert interpreter == "python"
        if words[0] == "-m":
            result = subprocess.run([sys.executable, *words], capture_output=True, check=False)
            assert result.returncode == 0, result.stderr.decode()
            continue
        name = Path(words[0]).name
        more = [word for key, added in MORE.items() if key in (name, *words) for word in added]
        scripts[name]([*words[1:], *more])
        said[name, "--check" in words] = capfd.readouterr().out
    assert "fit for training" in said["unetr_segmentation.py", True]
    trained = said["unetr_segmentation.py", False]
    for text in ("tCURLoRA", "decoder-only", "zero-shot", "share one core", "HD95: the 95th"):
        assert text in trained
    swin = said["swin_unetr_segmentation.py", False]
    for text in ("Dice on 2 volumes", "numbers in cores", "adapter loaded: logits differ by 0 at"):
        assert text in swin
    for number in range(2):
        ours, others = (
            np.asanyarray(nib.load(tmp_path / "scans" / folder / f"{number}.nii.gz").dataobj)
            for folder in ("found", "found_by_monai")
        )
        assert ours.shape == (30, 20, 25)
        assert np.array_equal(ours, others)

    # The files of the table exist, and no others.
    table = PAGE.partition("## The files of a training")[2]
    named = set(re.findall(r"`([\w.]+)`", table.partition("The first four")[0]))
    named |= {name.replace("tcurlora", "decoder") for name in named if "tcurlora" in name}
    there = {file.name for file in (tmp_path / "runs" / "lesion").iterdir()}
    assert named - there == {"tcurlora_state.pt", "decoder_state.pt"}
    assert there - named == {"probe.safetensors"}

    # The lines of Python.
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    model = tiny_unetr()
    exec(compile(code, "segmentation.md", "exec"), {"tcur": tcur, "torch": torch, "model": model})
    again = torch.load("lesion_again.pt", weights_only=True)
    exported = torch.load("lesion.pt", weights_only=True)
    assert all(torch.equal(tensor, exported[name]) for name, tensor in again.items())
