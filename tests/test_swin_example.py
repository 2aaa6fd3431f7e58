"""The SwinUNETR example: the layouts of MONAI's checkpoints, and a training on tiny volumes."""

import json

import pytest
import torch
from monai.data import MetaTensor
from monai.networks.nets import SwinUNETR
from torch import nn

import tcur_kernels as tcur
from segmentation_files import write_dataset

#: Arguments of the smallest SwinUNETR that may be trained, and the window for it.
TINY = {
    "in_channels": 1,
    "out_channels": 2,
    "feature_size": 12,
    "depths": (2, 1, 1, 1),
    "num_heads": (2, 3, 4, 6),
    "window_size": 3,
}
WINDOW = (64, 32, 32)


@pytest.fixture(scope="module")
def original():
    torch.manual_seed(0)
    return SwinUNETR(**TINY).eval()


def as_pretraining(model, prefix="module."):
    """What self-supervision leaves of a transformer: MONAI's ``model_swinvit.pt``.

    With ``swin_vit.`` in the prefix it is what the pretraining of MONAI's research contributions
    writes: the transformer beside the heads.
    """
    state = {}
    for name, tensor in model.swinViT.state_dict().items():
        own = name.replace("mlp.linear", "mlp.fc")
        state[f"{prefix}{own}"] = tensor
    width = 16 * TINY["feature_size"]
    outer = prefix.removesuffix("swin_vit.")
    sizes = {
        "norm.weight": [width], "norm.bias": [width], "rotation_head.weight": [4, width],
        "rotation_head.bias": [4], "contrastive_head.weight": [512, width],
        "contrastive_head.bias": [512], "convTrans3d.weight": [width, 1, 2, 2, 2],
        "convTrans3d.bias": [1],
    }  # fmt: skip
    if "swin_vit" in prefix:
        sizes = {n: size for n, size in sizes.items() if "head" in n} | {"conv.0.weight": [2, 2]}
    state |= {f"{outer}{name}": torch.zeros(size) for name, size in sizes.items()}
    return {"state_dict": state}


def read(job, tmp_path, content, new_head=False, **flags):
    """The network that a file gives, its architecture, what is said, and what has no value."""
    file = tmp_path / "swin.pt"
    torch.save(content, file)
    checkpoint = job.checkpoints.read_checkpoint(file, None, job.checkpoints.SWIN_UNETR)
    flags = {"img_size": WINDOW, "downsample": "merging", **flags}
    architecture, guesses = job.swin.read_architecture(checkpoint, flags, new_head)
    model, notes, fresh = job.swin.load_swin(architecture, checkpoint, new_head)
    return model, architecture, [*checkpoint.notes, *guesses, *notes], fresh


def refusal(job, tmp_path, content, **flags):
    with pytest.raises(SystemExit) as refused:
        read(job, tmp_path, content, **flags)
    return str(refused.value)


def assert_same_entries(model, other, but=()):
    for name, tensor in model.state_dict().items():
        same = torch.equal(tensor, other.state_dict()[name])
        assert same != name.startswith(tuple(but)) if but else same, name


@pytest.mark.parametrize("container", ["plain", "state_dict", "training"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_the_whole_network_in_every_container(job, tmp_path, original, container, prefix):
    state = {f"{prefix}{name}": tensor for name, tensor in original.state_dict().items()}
    content = {
        "plain": state,
        "state_dict": {"state_dict": state},
        "training": {"epoch": 3, "best_acc": 0.9, "state_dict": state, "optimizer": {"state": {}}},
    }[container]
    model, architecture, notes, fresh = read(job, tmp_path, content)
    assert_same_entries(model, original)
    assert fresh == []
    assert {**architecture.as_json(), "img_size": None} == {
        **{name: list(v) if isinstance(v, tuple) else v for name, v in TINY.items()},
        "img_size": None, "patch_size": 2, "mlp_ratio": 4.0, "qkv_bias": True,
        "patch_norm": False, "use_v2": False, "norm_name": "instance", "downsample": "merging",
    }  # fmt: skip
    again = job.swin.SwinArchitecture.of_json(architecture.as_json())
    assert again == architecture
    assert "100.0% of the numbers" in notes[-1]
    assert not any("not taken" in note or "not in the file" in note for note in notes)


@pytest.mark.parametrize("prefix", ["module.", "", "module.swin_vit.", "swin_vit."])
def test_the_transformer_of_self_supervision(job, tmp_path, original, prefix):
    model, _, notes, fresh = read(job, tmp_path, as_pretraining(original, prefix), out_channels=3)
    for name, tensor in original.swinViT.state_dict().items():
        assert torch.equal(model.swinViT.state_dict()[name], tensor)
    outside = {n for n, _ in model.named_parameters() if not n.startswith("swinViT.")}
    assert set(fresh) == outside
    (unfit,) = [note for note in notes if note.startswith("not taken from the file: ")]
    heads = "{norm,rotation_head,contrastive_head,convTrans3d}.{weight,bias}"
    if "swin_vit" in prefix:
        heads = "{rotation_head,contrastive_head}.{weight,bias}, conv.0.weight"
    assert f": {heads} (parts of the self-supervised pretraining" in unfit
    (missing,) = [note for note in notes if note.startswith("not in the file")]
    assert "begin anew: encoder1.layer.{conv1,conv2,conv3}.conv.weight, {encoder2," in missing
    assert missing.endswith("out.conv.conv.{weight,bias}")
    assert "swinViT" not in missing


def test_monai_itself_takes_that_checkpoint_alike(job, tmp_path):
    torch.manual_seed(1)
    usual = {"in_channels": 1, "out_channels": 2, "feature_size": 12}
    content = as_pretraining(SwinUNETR(**usual))
    model, *_ = read(job, tmp_path, content, out_channels=2)
    theirs = SwinUNETR(**usual)
    theirs.load_from(content)
    for name, tensor in theirs.swinViT.state_dict().items():
        assert torch.equal(model.swinViT.state_dict()[name], tensor)


def test_other_numbers_of_channels_are_told(job, tmp_path, original):
    content = {"state_dict": original.state_dict(), "epoch": 3}
    model, _, notes, fresh = read(job, tmp_path, content, in_channels=2, out_channels=5)
    told = "\n".join(notes)
    assert (
        "swinViT.patch_embed.proj.weight (shape [12, 1, 2, 2, 2] in place of [12, 2, 2, 2, 2])"
        in told
    )
    assert "out.conv.conv.weight (shape [2, 12, 1, 1, 1] in place of [5, 12, 1, 1, 1])" in told
    assert {"swinViT.patch_embed.proj.weight", "out.conv.conv.bias"} < set(fresh)
    assert model(torch.zeros(1, 2, *WINDOW)).shape == (1, 5, *WINDOW)
    model, _, notes, fresh = read(job, tmp_path, content, new_head=True, out_channels=2)
    assert fresh == ["out.conv.conv.weight", "out.conv.conv.bias"]
    assert any("which --new-head starts anew" in note for note in notes)
    assert_same_entries(model, original, but=["out."])


@pytest.mark.parametrize(
    "changes",
    [
        {"use_v2": True, "norm_name": ("instance", {"affine": True})},
        {"norm_name": "batch", "patch_norm": True, "qkv_bias": False, "mlp_ratio": 2.0},
        {"downsample": "mergingv2", "window_size": 2},
    ],
)
def test_architectures_are_read(job, tmp_path, changes):
    other = SwinUNETR(**{**TINY, **changes}).eval()
    flags = {"norm_name": "instance-affine"} if "use_v2" in changes else {}
    flags["downsample"] = changes.get("downsample", "merging")
    model, _, _, fresh = read(job, tmp_path, other.state_dict(), **flags)
    assert fresh == []
    x = torch.randn(1, 1, *WINDOW)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), other(x))


def test_files_of_which_nothing_fits(job, tmp_path, original):
    def refused(content, **flags):
        return refusal(job, tmp_path, content, **flags)

    unetr = {"vit.patch_embedding.position_embeddings": torch.zeros(1, 8, 4)}
    assert "weights of MONAI's SwinUNETR" in refused(unetr)
    assert "a UNETR; examples/unetr_segmentation.py takes it" in refused(unetr)
    assert "which holds {a,b}.weight" in refused({f"{n}.weight": torch.zeros(1) for n in "ab"})
    timm = {"patch_embed.proj.weight": torch.zeros(12, 3, 4, 4)}
    assert "a SwinUNETR for 3D volumes with patches of one side" in refused(timm)
    video = {"patch_embed.proj.weight": torch.zeros(12, 1, 2, 2, 2)}
    assert "4 stages of a SwinUNETR" in refused(video)
    flat = SwinUNETR(**{**TINY, "window_size": (3, 3, 2)}).state_dict()
    assert "attention windows that are cubes" in refused(flat)
    wanted = "--out-channels: expected the number of classes with background, got none"
    assert wanted in refused(as_pretraining(original))
    wanted = "--img-size: expected multiples of 32, not all of them 32, got"
    for window in ((64, 32, 33), (32, 32, 32)):
        assert wanted in refused(original.state_dict(), img_size=window)
    assert "which could run code of the file" in refused({"model": nn.Linear(1, 1)})


def run(main, folder, *options):
    argv = ["--output", str(folder / "run"), "--device", "cpu", "--steps", "2", "--rank", "4"]
    argv += ["--img-size", *map(str, WINDOW)]
    main([*argv, *map(str, options)])
    return json.loads((folder / "run" / "results.json").read_text())


@pytest.fixture
def script(job):
    import swin_unetr_segmentation

    torch.set_num_threads(1)
    return swin_unetr_segmentation


@pytest.mark.parametrize("convolutions", ["train", "cores"])
def test_the_example_on_tiny_volumes(job, script, tmp_path, capsys, convolutions):
    original = SwinUNETR(**TINY, norm_name="batch")  # has statistics beside its parameters
    data = write_dataset(tmp_path, training=2, validation=1)
    torch.save({"state_dict": original.state_dict()}, tmp_path / "swin.pt")
    options = ("--data", data, "--pretrained", tmp_path / "swin.pt")
    results = run(script.main, tmp_path, *options, "--convolutions", convolutions)
    said = capsys.readouterr().out
    for text in ("share one core", "Dice on 1 volumes", "numbers in cores and", "adapter merged"):
        assert text in said
    trained = results["trained"]
    assert results["round_trip"]["loaded"] == results["round_trip"]["unmerged"] == 0
    assert trained["all"] == sum(p.numel() for p in original.parameters())
    inside = ("swinViT.layers", "swinViT.norm")
    outside = sum(p.numel() for n, p in original.named_parameters() if not n.startswith(inside))
    head = sum(p.numel() for p in original.out.parameters())
    assert trained["direct"] == (outside if convolutions == "train" else head)

    # The adapter by itself: what its file says is enough to use it.
    file = tmp_path / "run" / "tcurlora.safetensors"
    facts = tcur.read_metadata(file)["swin_unetr"]
    assert facts == results["swin_unetr"]
    with pytest.raises(SystemExit, match=r"--adapter: expected a file that .*, without a recipe"):
        job.methods.read_recipe(file)
    model = script.SwinArchitecture.of_json(facts["architecture"]).build()
    model.load_state_dict(original.state_dict())
    plan = tcur.load_adapter(model, file).plan
    adapted = [member.module for stack in plan.stacks for member in stack.members]
    left = "too small for cores of rank 4, so left without: encoder1.layer.conv3.conv\n"
    assert (left in said) == (convolutions == "cores")
    assert "swinViT.layers1.0.blocks.0.attn.qkv" in adapted
    assert ("decoder1.transp_conv.conv" in adapted) == (convolutions == "cores")
    assert ("swinViT.patch_embed.proj" in adapted) == (convolutions == "cores")
    cores = sum(stack.n3 * stack.rank**2 for stack in plan.stacks)
    assert trained["cores"] == cores
    with pytest.raises(SystemExit, match="--output: expected a folder without an adapter"):
        run(script.main, tmp_path, *options)


def test_what_has_no_value_is_trained(job, script, tmp_path, original):
    """Whatever --convolutions says; `test_segmentation_walk.py` runs the whole of it."""
    outside = sum(p.numel() for n, p in original.named_parameters() if not n.startswith("swinViT"))
    first = sum(p.numel() for p in original.swinViT.patch_embed.parameters())
    for convolutions in script.CONVOLUTIONS:
        model, _, _, fresh = read(job, tmp_path, as_pretraining(original), out_channels=2)
        args = script.parse_args(["--device", "cpu", "--convolutions", convolutions])
        adapter = script.adapt(args, model, fresh)
        counts = script.count_trained(model)
        assert counts["direct"] == outside + (first if convolutions == "train" else 0)
        adapted = [member.module for stack in adapter.plan.stacks for member in stack.members]
        assert ("swinViT.patch_embed.proj" in adapted) == (convolutions == "cores")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "dataset.json"], "--data expects --pretrained beside it"),
        (["--data", "no.json", "--pretrained", "swin.pt"], "--data: expected a file, got no.json"),
        (["--rank", "0"], "--rank: expected more than 0, got 0"),
        (["--core-lr", "inf"], "--core-lr: expected more than 0, got inf"),
        (["--spacing", "1", "0", "1"], "--spacing: expected more than 0"),
        (["--device", "abacus"], "--device: expected one torch has here"),
    ],
)
def test_bad_options(script, options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        script.main(options)
    assert message in capsys.readouterr().err


def test_settings_that_do_not_fit_the_files(script, tmp_path, original):
    data = write_dataset(tmp_path, training=1, validation=1)
    torch.save(original.state_dict(), tmp_path / "swin.pt")
    options = ["--data", data, "--pretrained", tmp_path / "swin.pt"]
    with pytest.raises(SystemExit, match="--volumes: expected at most the 1 training volumes, got"):
        run(script.main, tmp_path, *options, "--volumes", 3)
    for convolutions in ("train", "cores"):
        with pytest.raises(
            SystemExit, match=r"^--rank: expected one that layers can hold, got 200"
        ):
            run(script.main, tmp_path, *options, "--convolutions", convolutions, "--rank", 200)
    assert not (tmp_path / "run" / "tcurlora.safetensors").exists()


def test_the_demo(script, tmp_path, capsys, monkeypatch):
    """With volumes that are quicker to make; `test_example.py` has those of the demo."""

    def write_domain(folder, domain, counts, seed):
        folder.mkdir(parents=True)
        return write_dataset(folder, **counts)

    monkeypatch.setattr(script.brain_domains, "write_domain", write_domain)
    options = ["--smoke", "--device", "cpu", "--volumes", "1", "--convolutions", "freeze"]
    script.main([*options, "--output", str(tmp_path)])
    said = capsys.readouterr().out
    assert f"weights: {tmp_path / 'pretrained.pt'}, state_dict" in said
    assert "100.0% of the numbers" in said
    assert "adapter loaded: logits differ by 0 at most" in said
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "pretrained.pt", "results.json", "source", "target", "tcurlora.safetensors",
    ]  # fmt: skip
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["settings"]["steps"] == 3
    assert results["trained"]["direct"] == 2 * script.SMOKE.feature_size + 2


def test_a_loss_that_is_not_finite_ends_the_training(script):
    recipe = script.Recipe(script.SMOKE, (1.0, 1.0, 1.0))
    args = script.parse_args(["--smoke", "--device", "cpu"])
    volume = {key: torch.zeros(1, *WINDOW) for key in ("image", "label")}
    volume["image"][0, 0, 0, 0] = float("nan")
    volume = {key: MetaTensor(tensor) for key, tensor in volume.items()}
    model = nn.Conv3d(1, 2, 1)
    with pytest.raises(SystemExit, match="training: expected a finite loss, got nan at step 1"):
        script.train(args, recipe, model, [volume], 1, "")
