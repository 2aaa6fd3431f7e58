"""The segmentation job reads a UNETR from whatever file it is in, or says what is wrong with it."""

import argparse
import collections
import datetime
import functools
import json
import os
import pathlib
import re

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.networks.nets import UNETR
from safetensors.torch import save_file
from torch import nn

from segmentation_files import (
    HEADS,
    TINY,
    as_monai_1_4,
    as_old_monai,
    logits,
    read,
    refusal,
    tiny_unetr,
)

ARCHITECTURES = {
    "tiny": {},
    "qkv_bias": {"qkv_bias": True},
    "perceptron": {"proj_type": "perceptron", "in_channels": 2},
    "batch": {"norm_name": "batch"},
    "instance-affine": {"norm_name": ("instance", {"affine": True})},
    "group": {"norm_name": ("group", {"num_groups": 8}), "feature_size": 8},
    "no conv_block": {"conv_block": False},
    "no res_block": {"res_block": False},
    "neither block": {"conv_block": False, "res_block": False},
    "channels": {"in_channels": 4, "out_channels": 5},
    "window": {"img_size": (32, 16, 48)},
    "sizes": {"feature_size": 6, "hidden_size": 40, "mlp_dim": 72},
}
CONTAINERS = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"epoch": 3, "state_dict": state, "best_acc": 0.8},
    "model": lambda state: {
        "model": state,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}},
    },
    "generator": lambda state: {"generator": state, "discriminator": {"a": torch.ones(1)}},
    "net": lambda state: {"net": state, 3: "a key that is no string"},
    "deep": lambda state: {"checkpoint": {"trainer": {"network": state}}},
    "Lightning": lambda state: {
        "state_dict": {**state, "loss_function.weight": torch.ones(2)},
        "pytorch-lightning_version": "2.1.0",
        "hyper_parameters": {"lr": 1e-4, "folder": pathlib.Path("runs")},
        "loops": collections.defaultdict(dict),
    },
    "namespace": lambda state: {"args": argparse.Namespace(lr=0.1), "state_dict": state},
    "numpy": lambda state: {
        "state_dict": state,
        "best": [np.float64(0.5), np.float32(1), np.int64(3), np.bool_(True), np.ones((2, 3))],
        "when": datetime.datetime(2024, 2, 29),
        "torch": torch.__version__,
    },
    "EMA": lambda state: {"n_averaged": torch.tensor(7), **state},
}
PREFIXES = ["", "module.", "model.", "_orig_mod.", "net._orig_mod.module.", "_model.unetr."]


def stored(folder, state, container, prefix, form):
    """Writes weights in one of the ways in which people do."""
    named = {prefix + name: tensor for name, tensor in state.items()}
    if form == "safetensors":
        save_file(named, folder / "weights.safetensors")
        return folder / "weights.safetensors"
    file = folder / ("weights.ckpt" if container == "Lightning" else "weights.pth")
    zipped = form == "zip"
    torch.save(CONTAINERS[container](named), file, _use_new_zipfile_serialization=zipped)
    return file


def ways():
    """Every container, prefix, format and architecture, each with several of the others."""
    for number, container in enumerate(CONTAINERS):
        if container == "EMA":  # PyTorch's AveragedModel
            yield "tiny", container, "module.", "zip"
            continue
        for form in ("zip", "legacy"):
            if container == "Lightning" or form == "zip":
                yield "tiny", container, PREFIXES[(number + len(form)) % 6 or 1], form
            yield "tiny", container, "module.", form
    for prefix in PREFIXES:
        yield "tiny", "state_dict", prefix, "zip"
        yield "tiny", "plain", prefix, "safetensors"
    for number, name in enumerate(ARCHITECTURES):
        yield (
            name,
            list(CONTAINERS)[number % 5],
            PREFIXES[number % 6],
            ("zip", "legacy")[number % 2],
        )
        yield name, "plain", PREFIXES[-1], "safetensors"


@functools.cache
def model_of(name):
    """The model of one of the `ARCHITECTURES`, and its logits."""
    model = tiny_unetr(**ARCHITECTURES[name])
    return model, logits(model)


@pytest.mark.parametrize("way", sorted(set(ways())), ids="-".join)
def test_a_stored_model_computes_the_same(job, tmp_path, way):
    name, container, prefix, form = way
    changes = ARCHITECTURES[name]
    original, expected = model_of(name)
    flags = {"norm_name": name} if name in ("group", "instance-affine") else {}
    if name == "window":
        flags["img_size"] = [32, 16, 48]
    file = stored(tmp_path, original.state_dict(), container, prefix, form)
    model, architecture, _ = read(job, file, **flags)
    wanted = {**job.unetr.Architecture(**TINY).arguments(), **changes}
    assert architecture.arguments() == {**wanted, "img_size": list(wanted["img_size"])}
    again = job.unetr.Architecture.of_json(json.loads(json.dumps(architecture.as_json())))
    assert again == architecture
    assert torch.equal(logits(model), expected)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_wrappers_of_torch_itself(job, tmp_path, original):
    """What state_dict() of a compiled, parallel and averaged model gives."""
    wrapped = {
        "compiled": torch.compile(original),
        "parallel": nn.DataParallel(original),
        "averaged": torch.optim.swa_utils.AveragedModel(original),
        "both": nn.DataParallel(torch.compile(original)),
    }
    for name, model in wrapped.items():
        torch.save(model.state_dict(), tmp_path / f"{name}.pt")
        assert torch.equal(logits(read(job, tmp_path / f"{name}.pt")[0]), logits(original))
    # FSDP and checkpointed activations insert names in the middle.
    inserted = {
        re.sub(r"(vit\.|blocks\.\d+\.)", r"\1_checkpoint_wrapped_module.", name): tensor
        for name, tensor in original.state_dict().items()
    }
    inserted = {f"_fsdp_wrapped_module.{name}": tensor for name, tensor in inserted.items()}
    torch.save(inserted, tmp_path / "inserted.pt")
    model, _, notes = read(job, tmp_path / "inserted.pt")
    assert torch.equal(logits(model), logits(original))
    assert notes[0] == f"weights: {tmp_path / 'inserted.pt'}, _fsdp_wrapped_module."


@pytest.mark.parametrize("version", [as_old_monai, as_monai_1_4])
def test_older_versions_of_monai(job, tmp_path, original, weights, version):
    torch.save({"state_dict": version(weights)}, tmp_path / "old.pt")
    model, _, notes = read(job, tmp_path / "old.pt")
    assert torch.equal(logits(model), logits(original))
    text = "\n".join(notes)
    if version is as_old_monai:
        assert "not needed: vit.patch_embedding.cls_token (a class token, which a UNETR" in text
        assert "not needed: encoder2.blocks.{0,1}.1.conv3.conv.weight, encoder3.blocks.0.1" in text
        assert (
            "(shortcut convolutions that old versions of MONAI stored without using them)" in text
        )
        fresh = [name for name in weights if "cross_attn" in name]
        assert f"not in the file: {job.names.folded(fresh)} (cross attention, which not" in text
    elif not any(".cross_attn." in name for name in weights):  # MONAI 1.6 does not store it
        assert "not needed: vit.blocks.{0..11}.cross_attn.out_proj.{weight,bias}, vit." in text
        assert "cross_attn.{to_q,to_k,to_v}.weight (cross attention, which a UNETR never" in text


def test_the_largest_known_checkpoint_has_no_need_of_flags(job):
    """MONAI's UNETR of BTCV: perceptron, 96³, 14 classes, as MONAI 0.6 wrote it."""
    with torch.device("meta"):
        model = UNETR(1, 14, (96, 96, 96), proj_type="perceptron")
    state = as_old_monai(model.state_dict())
    checkpoint = job.checkpoints.Checkpoint(pathlib.Path("UNETR_model_best_acc.pth"), state, {}, ())
    architecture, notes = job.unetr.read_architecture(checkpoint, {})
    assert str(architecture) == (
        "UNETR of window 96x96x96, 1 channels in, 14 out, feature_size 16, hidden_size 768, "
        "mlp_dim 3072, num_heads 12, proj_type perceptron, norm instance, qkv_bias False, "
        "conv_block True, res_block True"
    )
    assert notes == [
        "window: taken to be a cube, since it has 216 patches; else --img-size",
        "num_heads: 12, as is usual for hidden_size 768; no shape tells it",
    ]


def test_what_stands_beside_the_weights(job, tmp_path):
    original = tiny_unetr(img_size=(16, 48, 32), norm_name=("instance", {"affine": True}))
    hyper = {"img_size": [16, 48, 32], "num_heads": 4, "norm_name": ["instance", {"affine": True}]}
    file = tmp_path / "told.ckpt"
    for told in (hyper, argparse.Namespace(**hyper)):
        torch.save({"state_dict": original.state_dict(), "hyper_parameters": told}, file)
        model, _, notes = read(job, file, num_heads=None)
        assert torch.equal(logits(model), logits(original))
        for text in ("window: 16x48x32", "num_heads: 4", "norm: instance-affine"):
            assert f"{text}, as it stands beside the weights" in notes
    # Flags go first, and what does not fit is no reason to refuse the weights.
    assert read(job, file, img_size=(48, 16, 32))[1].img_size == (48, 16, 32)
    cube = tiny_unetr()
    hyper = {"img_size": 256, "num_heads": 7}
    torch.save({"state_dict": cube.state_dict(), "hyper_parameters": hyper}, file)
    message = refusal(job, file, num_heads=None)
    assert message.startswith("--num-heads: expected the number of attention heads for hidden_size")
    notes = read(job, file)[2]
    assert "img_size 256 beside the weights is ignored: they have 8 patches of 16³ voxels" in notes
    checkpoint = job.checkpoints.read_checkpoint(file)
    with pytest.raises(SystemExit, match="--num-heads"):
        job.unetr.read_architecture(checkpoint, {})
    torch.save({"state_dict": cube.state_dict(), "config": {"img_size": 32, "num_heads": 4}}, file)
    assert torch.equal(logits(read(job, file, num_heads=None)[0]), logits(cube))


@pytest.mark.parametrize("form", ["json", "yaml"])
@pytest.mark.parametrize("given", ["folder", "file"])
def test_a_bundle(job, tmp_path, form, given):
    original = tiny_unetr(img_size=(48, 16, 32), norm_name=("instance", {"affine": True}))
    bundle = tmp_path / "bundle"
    for name in ("models", "configs"):
        (bundle / name).mkdir(parents=True)
    torch.save(original.state_dict(), bundle / "models/model.pt")
    network = {**TINY, "_target_": "monai.networks.nets.UNETR", "img_size": "@window"}
    network |= {"norm_name": ["instance", {"affine": True}], "out_channels": "$len(@labels)"}
    config = {"window": [48, 16, 32], "network_def": network, "device": "$torch.device('cpu')"}
    (bundle / "configs/a.json").write_text("{broken")
    (bundle / "configs/b.txt").write_text("no config")
    (bundle / "configs/c.json").write_text(json.dumps([1]))
    swin = {"network": {"_target_": "SwinUNETR", "img_size": 96}}
    (bundle / "configs/d.json").write_text(json.dumps(swin))
    # PyYAML is not asked to write: JSON with tabs would not be YAML, and YAML no JSON.
    text = (
        json.dumps(config, indent="\t")
        if form == "json"
        else f"window: [48, 16, 32]\n{yaml(network)}"
    )
    (bundle / f"configs/inference.{form}").write_text(text)
    path = bundle if given == "folder" else bundle / "models/model.pt"
    model, _, notes = read(job, path, num_heads=None)
    assert torch.equal(logits(model), logits(original))
    assert notes[0] == f"weights: {bundle / 'models/model.pt'}"
    (bundle / f"configs/inference.{form}").unlink()
    assert refusal(job, path).startswith("--img-size: expected the three sides in voxels")


def yaml(network):
    """A network_def in YAML."""
    lines = "".join(f"  {name}: {json.dumps(value)}\n" for name, value in network.items())
    return f"network_def:\n{lines.replace('(', '[')}"


def test_safetensors_in_a_bundle_and_under_another_name(job, tmp_path, original, weights):
    (tmp_path / "models").mkdir()
    save_file(weights, tmp_path / "models/model.safetensors")
    assert torch.equal(logits(read(job, tmp_path)[0]), logits(original))
    os.rename(tmp_path / "models/model.safetensors", tmp_path / "weights.pt")
    assert torch.equal(logits(read(job, tmp_path / "weights.pt")[0]), logits(original))


def test_several_networks_in_a_file(job, tmp_path, original, weights):
    other = tiny_unetr(seed=1)
    file = tmp_path / "several.pt"
    averaged = {f"module.{name}": tensor for name, tensor in other.state_dict().items()}
    torch.save({"state_dict": weights, "state_dict_ema": averaged}, file)
    message = refusal(job, file)
    assert message == (
        "--pretrained: expected one network (--entry NAME takes one of them), got "
        f"{file} with state_dict, state_dict_ema/module."
    )
    model, _, notes = read(job, file, "state_dict")
    assert torch.equal(logits(model), logits(original))
    assert notes[0] == f"weights: {file}, state_dict"
    assert torch.equal(logits(read(job, file, "state_dict_ema/module.")[0]), logits(other))
    message = refusal(job, file, "ema")
    assert message == "--entry: expected one of state_dict, state_dict_ema/module., got ema"
    # A student and its teacher in one state dict.
    both = {f"student.{n}": t for n, t in weights.items()}
    both |= {f"teacher.{n}": t for n, t in other.state_dict().items()}
    torch.save(both, file)
    model, _, notes = read(job, file, "teacher.")
    assert torch.equal(logits(model), logits(other))
    assert notes[1].startswith("left aside, since they are no weights of the network: student.")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(job, tmp_path, weights, dtype):
    kept = {name: tensor.to(dtype) for name, tensor in weights.items()}
    kept["vit.norm.weight"] = weights["vit.norm.weight"]
    torch.save(kept, tmp_path / "half.pt")
    model, _, notes = read(job, tmp_path / "half.pt")
    assert all(torch.equal(t, kept[n].float()) for n, t in model.state_dict().items())
    assert f"weights in {dtype} are made torch.float32" in notes


def test_the_weights_have_memory_of_their_own(job, tmp_path, weights):
    """A checkpoint keeps neither the optimizer's state nor the file."""
    file = tmp_path / "training.pt"
    torch.save({"model": weights, "optimizer": {"exp_avg": torch.zeros(10**6)}}, file)
    state = job.checkpoints.read_checkpoint(file).state
    own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state.values()}
    assert len(own) == len(state)
    assert sum(own.values()) == sum(t.nbytes for t in weights.values())
    file.write_bytes(b"")
    assert all(torch.equal(state[name], weights[name]) for name in weights)


@pytest.mark.parametrize("kind", [nn.Parameter, MetaTensor])
def test_tensors_of_other_classes(job, tmp_path, weights, kind):
    torch.save({name: kind(tensor) for name, tensor in weights.items()}, tmp_path / "weights.pt")
    state = job.checkpoints.read_checkpoint(tmp_path / "weights.pt").state
    assert {type(tensor) for tensor in state.values()} == {torch.Tensor}
    assert all(torch.equal(state[name], weights[name]) for name in weights)


def test_two_models_of_a_checkpoint_share_nothing(job, tmp_path, weights):
    torch.save(weights, tmp_path / "weights.pt")
    checkpoint = job.checkpoints.read_checkpoint(tmp_path / "weights.pt")
    architecture, _ = job.unetr.read_architecture(checkpoint, HEADS)
    first, _ = job.unetr.load_unetr(architecture, checkpoint)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    second, _ = job.unetr.load_unetr(architecture, checkpoint)
    assert all(torch.equal(t, weights[n]) for n, t in second.state_dict().items())


@pytest.mark.parametrize("stored_head", ["same", "other name", "none"])
def test_a_new_head(job, tmp_path, weights, stored_head):
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("out.")}
    if stored_head == "same":
        kept = weights
    elif stored_head == "other name":
        kept["out.conv.weight"] = torch.ones(3)
    file = tmp_path / "weights.pt"
    torch.save(kept, file)
    model, architecture, _ = read(job, file, new_head=True, out_channels=7)
    assert architecture.out_channels == 7
    assert model.out.conv.conv.weight.shape[0] == 7
    state = model.state_dict()
    assert all(torch.equal(state[n], t) for n, t in kept.items() if not n.startswith("out."))
    if stored_head == "same":
        message = refusal(job, file, out_channels=7)
        hint = f"2, as the weights in {file} have; --new-head starts another output layer"
        assert message == f"--out-channels: expected {hint}, got 7"
    else:
        message = refusal(job, file)
        assert message.endswith("the output layer, got none; --new-head starts a new one")
