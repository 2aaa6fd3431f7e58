"""Tiny checkpoints, volumes and datalists for the tests of the segmentation job."""

import importlib
import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.networks.nets import UNETR

EXAMPLES = Path(__file__).parent.parent / "examples"

#: Arguments of the smallest UNETR worth testing.
TINY = {
    "in_channels": 1,
    "out_channels": 2,
    "img_size": (32, 32, 32),
    "feature_size": 4,
    "hidden_size": 48,
    "mlp_dim": 96,
    "num_heads": 4,
}


HEADS = {"num_heads": TINY["num_heads"]}  # the flag without which a `TINY` UNETR is refused

SPACING = (1.5, 1.25, 2.0)  # of `write`, so that nothing is resampled
#: An affine that turns, shears nothing, and has no two equal numbers.
OBLIQUE = np.array([[1.48, -0.1, 0.2, -33], [0.12, 1.24, 0.1, 21], [-0.19, -0.1, 1.98, 7], [0] * 4])
OBLIQUE[3, 3] = 1


class Modules:
    """The modules of the job: ``modules.volumes`` is ``segmentation.volumes``."""

    def __getattr__(self, name):
        return importlib.import_module(f"segmentation.{name}")


def modules(monkeypatch):
    """`Modules`, once examples/ is on the path as it is for its scripts."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return Modules()


def tiny_unetr(seed=0, **changes):
    """A `TINY` UNETR in which no two numbers are the same, so that none can be mistaken."""
    torch.manual_seed(seed)
    model = UNETR(**{**TINY, **changes}).eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(0.05 * torch.rand(tensor.shape) + 0.01)
    return model


@torch.no_grad()
def logits(model):
    """What a model predicts for one fixed window."""
    window = [16 * side for side in model.feat_size]
    channels = model.encoder1.layer.conv1.conv.in_channels
    generator = torch.Generator().manual_seed(7)
    return model.eval()(torch.randn(1, channels, *window, generator=generator))


def as_old_monai(state):
    """The state dict of a `tiny_unetr` as MONAI 0.6 to 0.8 would have written it."""
    old = {name: tensor for name, tensor in state.items() if "cross_attn" not in name}
    hidden = state["vit.norm.weight"].shape[0]
    old["vit.patch_embedding.cls_token"] = torch.zeros(1, 1, hidden)
    for name in [name for name in old if name.startswith("encoder") and ".1.conv1." in name]:
        width = old[name].shape[0]
        old[name.replace("conv1", "conv3")] = torch.rand(width, width, 1, 1, 1)
    return old


def as_monai_1_4(state):
    """The state dict of a `tiny_unetr` as MONAI 1.4 and 1.5 would have written it."""
    hidden = state["vit.norm.weight"].shape[0]
    new = dict(state)
    for stem in (f"vit.blocks.{number}.cross_attn" for number in range(12)):
        for layer in ("out_proj", "to_q", "to_k", "to_v"):
            new[f"{stem}.{layer}.weight"] = torch.rand(hidden, hidden)
        new[f"{stem}.out_proj.bias"] = torch.rand(hidden)
    return new


def phantom(shape=(20, 22, 18), seed=0):
    """An image of noise with a bright box, float32, and the label of the box, uint8."""
    noise = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    label = np.zeros(shape, np.uint8)
    label[tuple(slice(side // 4, max(side // 4 + 1, side // 2)) for side in shape)] = 1
    return noise + 5 * label, label


def write(file, voxels, affine=None):
    """Writes voxels as NIfTI; returns the path."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if affine is None:
        affine = np.diag([*SPACING, 1.0])
    nib.save(nib.Nifti1Image(voxels, affine), file)
    return file


def write_pair(folder, name="a", shape=(20, 22, 18), affine=None, seed=0):
    """Writes a `phantom`; returns its entry."""
    image, label = phantom(shape, seed)
    return {
        "image": str(write(folder / f"{name}_image.nii.gz", image, affine)),
        "label": str(write(folder / f"{name}_label.nii.gz", label, affine)),
    }


def reoriented(file, axes, target):
    """Writes a file again with its axes stored as ``axes``, such as "LPI", on the same grid."""
    loaded = nib.load(file)
    turns = nib.orientations.ornt_transform(
        nib.io_orientation(loaded.affine), nib.orientations.axcodes2ornt(axes)
    )
    nib.save(loaded.as_reoriented(turns), target)
    return str(target)


def write_dataset(folder, training=2, validation=1, test=0, **pair):
    """Writes volumes and their datalist; returns the path of the latter."""
    sections, seed = {}, 0
    for section, count in (("training", training), ("validation", validation), ("test", test)):
        for number in range(count):
            entry = write_pair(folder, f"{section}{number}", seed=seed, **pair)
            named = {key: Path(file).name for key, file in entry.items()}
            sections.setdefault(section, []).append(named)
            seed += 1
    return write_datalist(folder, **sections)


def write_datalist(folder, **sections):
    """Writes a datalist of sections; returns its path."""
    path = folder / "dataset.json"
    path.write_text(json.dumps({"labels": {"0": "background", "1": "box"}, **sections}))
    return path


def read(job, file, entry=None, new_head=False, **flags):
    """The model that a file gives, its architecture, and all that is said of it."""
    checkpoint = job.checkpoints.read_checkpoint(file, entry)
    flags = {**HEADS, **flags}
    architecture, guesses = job.unetr.read_architecture(checkpoint, flags, new_head)
    model, notes = job.unetr.load_unetr(architecture, checkpoint, new_head)
    return model, architecture, [*checkpoint.notes, *guesses, *notes]


def refusal(job, file, *arguments, **flags):
    """The message by which a file is refused."""
    with pytest.raises(SystemExit) as refused:
        read(job, file, *arguments, **flags)
    message = str(refused.value)
    assert re.match(r"--[a-z-]+: expected .+, got .+", message, re.DOTALL)
    assert "Traceback" not in message
    return message


def recipe_of(job, spacing=SPACING, channels=1, classes=2, **changes):
    sizes = {**TINY, "in_channels": channels, "out_channels": classes}
    return job.preparation.Recipe(job.unetr.Architecture(**sizes), spacing, **changes)


def check(job, *entries, allow_empty=False, **changes):
    """What is found in training volumes."""
    recipe = recipe_of(job, **changes)
    return job.volumes.check_volumes(recipe, {"training": entries}, allow_empty)


def problem(job, *entries, **changes):
    """The only problem of the last of some entries."""
    found = check(job, *entries, **changes)
    (text,) = found.problems
    where = f"training[{len(entries) - 1}]: "
    assert text.startswith(f"{where}expected ")
    assert ", got " in text
    with pytest.raises(SystemExit) as refused:
        found.tell("--data", "it")
    assert str(refused.value) == f"--data: 1 problem(s) in it:\n  {text}"
    return text.removeprefix(where)


def prepared(job, entry, **changes):
    keys = [key for key in ("image", "label") if key in entry]
    return job.preparation.preparation(recipe_of(job, **changes), keys)(dict(entry))


def assert_prepared_alike(job, one, other, **changes):
    """Two entries give the same tensors, if no intensities are summed, which has an order."""
    changes = {"intensity_range": (-4.0, 9.0), **changes}
    first, second = prepared(job, one, **changes), prepared(job, other, **changes)
    assert torch.equal(first["image"], second["image"])
    assert torch.equal(first["label"], second["label"])
    assert torch.equal(first["image"].affine, second["image"].affine)
    assert torch.equal(first["label"].affine, first["image"].affine)


def with_one(value):
    def change(voxels):
        voxels = voxels.astype(np.float32)
        voxels[3, 4, 5] = value
        return voxels

    return change
