"""The segmentation job says what is wrong with a file that holds no UNETR, or not a whole one."""

import os
import pathlib
import pickle
import re
import zipfile

import numpy as np
import pytest
import torch
from monai.networks.nets import SwinUNETR, ViT
from safetensors.torch import save_file
from torch import nn

import tcur_kernels as tcur
from segmentation_files import TINY, logits, read, refusal, tiny_unetr


def test_flags_that_disagree_with_the_weights(job, tmp_path, weights):
    file = tmp_path / "weights.pt"
    torch.save(weights, file)
    for name, value in {
        "feature_size": 16,
        "hidden_size": 768,
        "mlp_dim": 1,
        "in_channels": 2,
    }.items():
        flag = f"--{name.replace('_', '-')}"
        wanted = f"{flag}: expected {TINY[name]}, as the weights in {file} have, got {value}"
        assert refusal(job, file, **{name: value}) == wanted
    wanted = f"--img-size: expected a window of 8 patches of 16³ voxels, as {file} has, got "
    assert refusal(job, file, img_size=[96, 96, 96]) == f"{wanted}96x96x96"
    assert refusal(job, file, img_size=[32, 32, 40]) == f"{wanted}32x32x40"
    assert (
        refusal(job, file, num_heads=5)
        == "--num-heads: expected a divisor of hidden_size 48, got 5"
    )
    wanted = "--norm-name: expected instance, as the weights have, got batch"
    assert refusal(job, file, norm_name="batch") == wanted


def test_norms_that_shapes_do_not_tell_apart(job, tmp_path):
    file = tmp_path / "weights.pt"
    state = tiny_unetr(norm_name=("instance", {"affine": True})).state_dict()
    torch.save(state, file)
    wanted = "--norm-name: expected instance-affine or group, which no shape tells apart, got none"
    assert refusal(job, file) == wanted
    torch.save({"state_dict": state, "args": {"norm_name": ("group", {"num_groups": 4})}}, file)
    assert refusal(job, file).endswith("got ('group', {'num_groups': 4}) beside the weights")
    wanted = "instance-affine, since 8 groups do not divide feature_size 4, got group"
    assert refusal(job, file, norm_name="group") == f"--norm-name: expected {wanted}"
    torch.save(tiny_unetr(norm_name="batch").state_dict(), file)
    assert read(job, file)[1].norm_name == "batch"


def test_a_window_that_is_no_cube(job, tmp_path):
    torch.save(tiny_unetr(img_size=(32, 16, 48)).state_dict(), tmp_path / "weights.pt")
    assert refusal(job, tmp_path / "weights.pt") == (
        f"--img-size: expected the three sides in voxels, since {tmp_path / 'weights.pt'} tells "
        "only their product, got none (6 patches of 16³ voxels)"
    )


def text(file):
    file.write_text("these are\nno weights")
    return "a text that begins 'these are'"


def empty(file):
    file.touch()
    return "which is empty"


def lfs_pointer(file):
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 370000000\n")
    return "a pointer of Git LFS; `git lfs pull` brings the file"


def web_page(file):
    file.write_text("\n<!DOCTYPE html>\n<title>Sign in</title>é")
    return "a web page; the download of the weights failed, or asks to log in"


def long_text(file):
    file.write_bytes("é".encode() * 3000)  # the last character that is looked at is cut
    file.write_bytes(b"a" + file.read_bytes())
    return "a text that begins 'aééé"


def truncated(file):
    torch.save(tiny_unetr().state_dict(), file)
    file.write_bytes(file.read_bytes()[:-1000])
    return "which is damaged or foreign (PytorchStreamReader failed"


def truncated_legacy(file):
    torch.save(tiny_unetr().state_dict(), file, _use_new_zipfile_serialization=False)
    file.write_bytes(file.read_bytes()[:-1000])
    return "which is damaged or foreign (unexpected EOF"


def cut_at_the_start(file):
    torch.save({"a": torch.ones(1)}, file, _use_new_zipfile_serialization=False)
    file.write_bytes(file.read_bytes()[:10])
    return "which is damaged or foreign (EOFError)"


def torchscript(file):
    module = torch.jit.trace(nn.Linear(2, 2), torch.ones(2))
    torch.jit.save(module, file)
    return "a TorchScript archive; torch.save(torch.jit.load(file).state_dict(), 'weights.pt')"


def archive(file):
    with zipfile.ZipFile(file, "w") as opened:
        opened.writestr("bundle/models/model.pt", b"weights")
    return "a zip archive that torch.save did not write; unpack it first"


def gzipped(file):
    file.write_bytes(b"\x1f\x8b\x08" + bytes(100))
    return "a gzip archive; unpack it first"


def keras(file):
    file.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    return "an HDF5 file, which Keras writes"


def array(file):
    with file.open("wb") as opened:
        np.save(opened, np.ones(3))
    return "an array of NumPy"


def zeros(file):
    file.write_bytes(bytes(9000))
    return "which is damaged or foreign (Cannot use ``weights_only=True`` with files saved"


def plain_pickle(file):
    file.write_bytes(pickle.dumps({"weight": 1}, protocol=2))
    return "a pickle that torch.save did not write"


@pytest.mark.parametrize(
    "make",
    [
        *(text, empty, lfs_pointer, web_page, long_text, truncated, truncated_legacy),
        *(cut_at_the_start, torchscript, archive, gzipped, keras, array, zeros, plain_pickle),
    ],
)
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_files_that_hold_no_weights(job, tmp_path, make):
    file = tmp_path / "weights.pt"
    came = make(file)
    wanted = "--pretrained: expected a state dict that torch.save wrote, or safetensors, got "
    assert refusal(job, file).startswith(f"{wanted}{file}, {came}")


def test_broken_safetensors(job, tmp_path, weights):
    file = tmp_path / "weights.safetensors"
    save_file(weights, file)
    whole = file.read_bytes()
    torch.save(weights, tmp_path / "weights.pt")
    of_torch = (tmp_path / "weights.pt").read_bytes()
    for broken in (whole[:-1000], whole[:9], whole[:200], of_torch):
        file.write_bytes(broken)
        wanted = f"--pretrained: expected a whole safetensors file, got {file} ("
        assert refusal(job, file).startswith(wanted)


def test_broken_bytes_never_end_in_a_traceback(job, tmp_path, weights):
    """Any file, cut or changed anywhere, is read right or refused by a message."""
    file = tmp_path / "weights.pt"
    few = {name: tensor for name, tensor in weights.items() if name.startswith("vit.patch")}
    random = np.random.default_rng(0)
    for zipped in (True, False):
        torch.save({"state_dict": few}, file, _use_new_zipfile_serialization=zipped)
        whole = np.frombuffer(file.read_bytes(), np.uint8)
        for _ in range(60):
            bytes_ = whole.copy()
            places = random.integers(0, min(len(whole), 2000), 4)
            bytes_[places] = random.integers(0, 256, 4)
            if random.random() < 0.3:
                bytes_ = bytes_[: random.integers(len(whole))]
            file.write_bytes(bytes_.tobytes())
            refusal(job, file)


class Ran(Exception):
    pass


class Trap:
    def __reduce__(self):
        return Ran, ()


class Config:
    pass


def test_pickles_are_refused_in_one_sentence(job, tmp_path, original, weights):
    file = tmp_path / "weights.pt"
    hint = (
        "which could run code of the file and is not loaded; where you trust it, "
        "torch.save(torch.load(file, weights_only=False).state_dict(), 'weights.pt') takes the "
        "weights out, with ['state_dict'] in place of .state_dict() if the file holds a dictionary"
    )
    wanted = (
        f"--pretrained: expected a state dict that torch.save wrote, or safetensors, got {file}"
    )
    for content, name in (
        (original, "monai.networks.nets.unetr.UNETR"),
        ({"state_dict": weights, "config": Config()}, f"{__name__}.Config"),
        ({"state_dict": weights, "trap": Trap()}, f"{__name__}.Ran"),
    ):
        for zipped in (True, False):
            torch.save(content, file, _use_new_zipfile_serialization=zipped)
            assert refusal(job, file) == f"{wanted} with a pickled {name}, {hint}"
    # The hint is right.
    torch.save(original, file)
    torch.save(torch.load(file, weights_only=False).state_dict(), tmp_path / "out.pt")
    assert torch.equal(logits(read(job, tmp_path / "out.pt")[0]), logits(original))


def test_paths(job, tmp_path, weights):
    wanted = (
        "--pretrained: expected a file, or the folder of a MONAI bundle with models/model.pt, got "
    )
    assert (
        refusal(job, tmp_path / "no.pt") == f"{wanted}{tmp_path}/no.pt (No such file or directory)"
    )
    assert refusal(job, tmp_path) == f"{wanted}the folder {tmp_path} without one"
    assert (
        refusal(job, pathlib.Path("/dev/null")) == f"{wanted}/dev/null, which is no ordinary file"
    )
    assert refusal(job, pathlib.Path("a\0b")) == f"{wanted}a\0b (embedded null byte)"
    assert "File name too long" in refusal(job, pathlib.Path("a" * 5000))


def test_a_file_that_may_not_be_read(job, tmp_path, weights, monkeypatch):
    file = tmp_path / "weights.pt"
    torch.save(weights, file)
    file.chmod(0)
    if os.access(file, os.R_OK):  # root may read everything

        def refuse(*_arguments):
            raise PermissionError

        monkeypatch.setattr(type(file), "open", refuse)
    wanted = f"expected a file that may be read, got {file}, for which permission is denied"
    assert refusal(job, file) == f"--pretrained: {wanted}"


def swin(weights):
    state = SwinUNETR(1, 2, feature_size=12, depths=(1, 1, 1, 1)).state_dict()
    takes = "examples/swin_unetr_segmentation.py takes it"
    return state, f"which holds a SwinUNETR, and this job is for UNETR; {takes}"


def swin_pretrained(weights):
    state = SwinUNETR(1, 2, feature_size=12, depths=(1, 1, 1, 1)).swinViT.state_dict()
    state = {f"module.{name}": tensor for name, tensor in state.items()}
    takes = "examples/swin_unetr_segmentation.py takes it"
    what = f"which holds the transformer of a SwinUNETR, and this job is for UNETR; {takes}"
    return {"state_dict": state}, what


def vit_alone(weights):
    vit = ViT(1, (32, 32, 32), (16, 16, 16), hidden_size=48, mlp_dim=96, num_heads=4)
    return vit.state_dict(), "which holds a ViT without the rest of a UNETR"


def adapter(weights):
    return {"core.48x48": torch.ones(48, 4, 4)}, "which holds an adapter of tcur_kernels; give the"


def peft_adapter(weights):
    name = "base_model.model.vit.blocks.0.attn.qkv.lora_A.weight"
    return {name: torch.ones(1)}, "which holds an adapter of peft; save merge_and_unload()"


def nnunet(weights):
    name = "encoder.stages.0.0.convs.0.conv.weight"
    state = {"network_weights": {name: torch.ones(1)}}
    return state, "which holds a network of nnU-Net, and this job is for MONAI's UNETR"


def others(weights):
    state = {"layer.0.weight": torch.ones(1), "layer.1.weight": torch.ones(1), "epoch": 1}
    return {"state_dict": state}, "which holds layer.{0,1}.weight, epoch"


def nothing(weights):
    return {}, "which holds nothing"


def one_tensor(weights):
    return torch.ones(3), "which holds a Tensor"


@pytest.mark.parametrize(
    "make",
    [swin, swin_pretrained, vit_alone, adapter, peft_adapter, nnunet, others, nothing, one_tensor],
)
def test_other_networks(job, tmp_path, weights, make):
    content, came = make(weights)
    torch.save(content, tmp_path / "other.pt")
    wanted = f"--pretrained: expected weights of MONAI's UNETR, got {tmp_path / 'other.pt'}, {came}"
    assert refusal(job, tmp_path / "other.pt").startswith(wanted)


def test_a_2d_unetr_and_other_patches(job, tmp_path, weights):
    file = tmp_path / "other.pt"
    torch.save(tiny_unetr(spatial_dims=2, img_size=(32, 32)).state_dict(), file)
    wanted = f"--pretrained: expected a UNETR for 3D volumes, got {file}, one for 2D images"
    assert refusal(job, file) == wanted
    patches = (
        f"--pretrained: expected a UNETR with patches of 16³ voxels, got {file}, which embeds "
    )
    stem = "vit.patch_embedding.patch_embeddings"
    torch.save({**weights, f"{stem}.weight": torch.ones(48, 1, 8, 8, 8)}, file)
    assert refusal(job, file) == f"{patches}[1, 8, 8, 8] in place of [1, 16, 16, 16] numbers"
    perceptron = {name: tensor for name, tensor in weights.items() if not name.startswith(stem)}
    torch.save({**perceptron, f"{stem}.1.weight": torch.ones(48, 512)}, file)
    assert refusal(job, file) == f"{patches}[512] in place of [4096] numbers"
    torch.save({**weights, job.checkpoints.LANDMARK: torch.ones(8, 48)}, file)
    assert refusal(job, file).endswith("position_embeddings of shape [8, 48]")


def test_adapted_models(job, tmp_path, original):
    import peft

    file = tmp_path / "adapted.pt"
    model = tiny_unetr()
    tcur.adapt(model, rank=4)
    torch.save(model.state_dict(), file)
    assert (
        "6 unexpected (an adapted model; adapter.merge(inplace=False).state_dict() gives plain "
        "weights): tcur." in refusal(job, file)
    )
    config = peft.LoraConfig(r=2, target_modules=["qkv"])
    torch.save(peft.get_peft_model(tiny_unetr(), config).state_dict(), file)
    message = refusal(job, file)
    assert "36 unexpected (a model adapted by peft; save the state dict of model" in message
    for name in ("base_layer", "{lora_A,lora_B}.default"):
        assert f"vit.blocks.{{0..11}}.attn.qkv.{name}.weight" in message
    merged = peft.get_peft_model(tiny_unetr(), config).merge_and_unload()
    torch.save(merged.state_dict(), file)
    assert torch.equal(logits(read(job, file)[0]), logits(original))


def test_every_entry_that_does_not_fit_is_named(job, tmp_path, weights):
    file = tmp_path / "weights.pt"
    state = dict(weights)
    del state["vit.norm.weight"], state["decoder5.conv_block.conv1.conv.weight"]
    state = {name: tensor for name, tensor in state.items() if ".blocks.11." not in name}
    state["vit.blocks.3.gamma"] = state["aux.bias"] = torch.ones(1)
    state["encoder1.layer.norm1.running_var"] = torch.ones(4)
    state["decoder2.transp_conv.conv.weight"] = torch.ones(8, 4, 3, 3, 3)
    for block in range(4):
        state[f"vit.blocks.{block}.mlp.linear2.weight"] = torch.ones(48, 96, dtype=torch.int8)
    torch.save(state, file)
    architecture = "UNETR of window 32x32x32, 1 channels in, 2 out, feature_size 4, "
    message = refusal(job, file)
    first, *lines = message.split("\n  ")
    assert first.startswith(f"--pretrained: expected the entries of a {architecture}")
    assert first.endswith(f" in {file}, got differences:")
    parts = (
        "parts that a UNETR does not have; if it computes the same without them, save it without"
    )
    blocks = "not all of the 12 blocks of MONAI's UNETR, or not all their parts"
    eleventh = [name for name in weights if ".blocks.11." in name and "cross_" not in name]
    convolutions = (
        "no convolutional part, or not all of it: the weights of a transformer alone, or of "
    )
    shape = "numbers of shape"
    assert lines == [
        f"2 unexpected ({parts}): vit.blocks.3.gamma, aux.bias",
        "1 unexpected (a normalisation that --norm-name does not have): "
        "encoder1.layer.norm1.running_var",
        f"{len(eleventh)} missing ({blocks}): {job.names.folded(eleventh)}",
        "1 missing (the file is not whole, or another network wrote it): vit.norm.weight",
        f"1 missing ({convolutions}another network): decoder5.conv_block.conv1.conv.weight",
        "integers of shape [48, 96] in place of numbers of shape [48, 96]: "
        "vit.blocks.{0..3}.mlp.linear2.weight",
        f"{shape} [8, 4, 3, 3, 3] in place of {shape} [8, 4, 2, 2, 2]: "
        "decoder2.transp_conv.conv.weight",
    ]


def test_a_transformer_alone_under_the_names_of_a_unetr(job, tmp_path, weights):
    file = tmp_path / "vit.pt"
    torch.save({name: t for name, t in weights.items() if name.startswith("vit.")}, file)
    assert refusal(job, file) == (
        f"--pretrained: expected a whole UNETR in {file}, got differences:\n  1 missing (no "
        "convolutional part, or not all of it: the weights of a transformer alone, or of another "
        "network): encoder1.layer.conv1.conv.weight"
    )
    more = {"vit.blocks.12.norm1.weight": torch.ones(48), **weights}
    torch.save(more, file)
    message = "1 unexpected (more blocks than the 12 of MONAI's UNETR): vit.blocks.12.norm1.weight"
    assert message in refusal(job, file)
    without = {name: t for name, t in weights.items() if "patch_embeddings" not in name}
    torch.save(without, file)
    assert "vit.patch_embedding.patch_embeddings.weight" in refusal(job, file)


def test_numbers_that_are_not_finite(job, tmp_path, weights):
    state = {name: tensor.clone() for name, tensor in weights.items()}
    state["vit.blocks.0.norm1.bias"][3] = float("nan")
    state["vit.blocks.1.norm1.bias"][3] = float("inf")
    torch.save(state, tmp_path / "weights.pt")
    assert refusal(job, tmp_path / "weights.pt") == (
        f"--pretrained: expected finite numbers in {tmp_path / 'weights.pt'}, got NaN or Inf in "
        "vit.blocks.{0,1}.norm1.bias"
    )


def test_folded_names_are_all_the_names(job, weights):
    """A shell would expand them to the same names; here, a few lines do."""

    def expand(text):
        found = re.search(r"\{([^{}]*)\}", text)
        if found is None:
            return [text]
        low, dots, high = found.group(1).partition("..")
        parts = range(int(low), int(high) + 1) if dots else found.group(1).split(",")
        return [
            name
            for part in parts
            for name in expand(f"{text[: found.start()]}{part}{text[found.end() :]}")
        ]

    random = np.random.default_rng(0)
    for share in (0.02, 0.3, 0.9, 1):
        names = [name for name in weights if random.random() < share]
        text = job.names.folded(names)
        words = re.split(r", (?![^{]*\})", text)
        assert sorted(name for word in words for name in expand(word)) == sorted(names)
    assert len(text) < 1500
    assert job.names.folded(["a", "a.b", "a.b.0"]) == "a, a.b, a.b.0"
    assert job.names.folded(["a.0", "a.2", "a.3"]) == "a.{0,2,3}"
    assert job.names.folded([]) == ""
