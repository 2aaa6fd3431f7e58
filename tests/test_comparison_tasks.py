"""The tasks of benchmarks.comparison: their parts, a user's data in their place, and bad data."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib import pyplot

import hf_models
from benchmarks.comparison import __main__ as program
from benchmarks.comparison import pictures, records, report, summary
from benchmarks.comparison.methods import method
from benchmarks.comparison.methods.base import is_head, layers, norms
from benchmarks.comparison.tasks import TASKS, images, markers, texts, volumes
from benchmarks.comparison.tasks.base import BadDataError, Sources
from benchmarks.comparison.training import train

transformers = pytest.importorskip("transformers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "thing", "of", "kind", "to", "go"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small BERT with its tokenizer, and a WordNet of the classes that WordNet has."""
    made = tmp_path_factory.mktemp("texts")
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    transformers.BertTokenizerFast(vocab=vocabulary).save_pretrained(made / "bert")
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    transformers.BertModel(config).save_pretrained(made / "bert")
    lines = ["  1 This software and database is being provided to you"]
    for number in range(26 * 120):
        lines.append(f"{number:08} {3 + number % 26:02} n 01 x 0 000 | a thing of kind; not this")
    (made / "data.noun").write_text("\n".join(lines) + "\n")
    verbs = [
        "00000001 29 v 01 go 0 000 01 + 02 00 | to go a kind",
        "00000002 29 v 02 go 0 to_go 0 002 ! 00000001 v 0101 @ 00000001 v 0000 00 | to go; or not",
        "00000003 29 v 01 go 0 001 @ 00000002 v 0000 00 | to kind a thing",
    ]
    (made / "data.verb").write_text("\n".join(verbs) + "\n")
    return made


@pytest.fixture
def sources(folder):
    return Sources(encoder=folder / "bert", wordnet=folder, quick=True)


def test_glosses_are_divided_once(folder):
    sources = Sources(encoder=folder / "bert", wordnet=folder)
    few, task, many = (texts.Glosses(sources, size, 0) for size in (8, 32, 128))
    counts = [{part: len(ids) for part, (ids, _) in each._parts.items()} for each in (few, task)]
    # A third of the texts is for the test, so a class has 80 texts, more or less, for the rest.
    assert counts[0] == {"training": 26 * 8, "validation": 26 * 20, "test": 1040}
    assert counts[1] == {"training": 26 * 32, "validation": 26 * 20, "test": 1040}
    ids, labels = task._parts["training"]
    assert labels.bincount().tolist() == [32] * 26
    assert ids[0] == [2, 5, 6, 7, 8, 3]  # up to the semicolon
    assert len(many._parts["training"][0]) == 26 * 120 - 1040 - 26 * 20
    assert torch.equal(many._parts["validation"][1], few._parts["validation"][1])
    assert task.steps == 200


def test_a_small_class_has_texts_for_validation():
    for count, wanted in ((60, 32), (41, 32), (10, 8), (6, 5)):
        training, validation = texts._divided(torch.arange(count), 32)
        assert len(training) == min(32, wanted)
        assert len(validation) == min(20, count - wanted)
        assert not set(training.tolist()) & set(validation.tolist())


def test_what_is_kept_of_glosses_is_the_rank_of_the_hypernym(sources, monkeypatch):
    assert texts._verbs(sources.wordnet) == [
        ("to go", "to go a kind"),
        ("to kind a thing", "to go"),
    ]
    task = texts.Glosses(sources, 8, 0)
    queries, candidates, right = task._pairs
    assert len(queries) == len(candidates) == 2
    assert sorted(right.tolist()) == [0, 1]
    # By hand: the first query is nearest to its own text, the second to the other one.
    directions = {5: (1.0, 0.1), 6: (0.9, 0.8), 7: (1.0, 0.0), 8: (0.0, 1.0)}
    texts_of = ([[2, 5, 3], [2, 6, 3]], [[2, 7, 3], [2, 8, 3]])
    monkeypatch.setattr(task, "_pairs", (*texts_of, torch.tensor([0, 1])))
    monkeypatch.setattr(
        texts.Classifier,
        "embed",
        lambda model, ids: torch.tensor([directions[int(word)] for word in ids[:, 1]]),
    )
    assert task.kept(task.model()) == (1 + 1 / 2) / 2


def test_texts_of_a_user(folder, tmp_path):
    rows = [f"a {word} of kind,{name}" for name in ("b", "a") for word in WORDS[5:]]
    (tmp_path / "own.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    (tmp_path / "pairs.csv").write_text("text,related\na thing,a kind\nto go,of a thing\n")
    own = {"texts": tmp_path / "own.csv", "encoder": folder / "bert", "quick": True}
    task = texts.Glosses(Sources(**own), 8, 0)
    assert task.base.head.out_features == 2
    assert np.isnan(task.kept(task.model()))
    task = texts.Glosses(Sources(**own, pairs=tmp_path / "pairs.csv"), 8, 0)
    assert 0.5 <= task.kept(task.model()) <= 1
    assert [name for name, _ in layers(task.model(), task)] == task.layers
    assert len(task.layers) == 6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"--texts: expected a CSV file in UTF-8, got .*own.csv"),
        (b"\xff\xfe", "--texts: expected a CSV file in UTF-8"),
        (b"text\na\n", "--texts: expected the columns text and label in .*own.csv, got text"),
        (b"", "--texts: expected the columns text and label in .*own.csv, got none"),
        (b"text,label\na,\n", "--texts: expected a label in line 2 of .*own.csv, got nothing"),
        (b"text,label\na\n", "--texts: expected a label in line 2 of .*own.csv, got nothing"),
        (b"text,label\na,x\nb,x\n", r"expected at least two classes in the .*, got \['x'\]"),
        (b"text,label\na,x\nb,y\n", "expected at least 6 texts of each class in .*, got 1 of x"),
    ],
)
def test_bad_texts(sources, tmp_path, content, message):
    if content is not None:
        (tmp_path / "own.csv").write_bytes(content)
    wrong = Sources(encoder=sources.encoder, texts=tmp_path / "own.csv")
    with pytest.raises(BadDataError, match=message):
        texts.Glosses(wrong, 8, 0)


def test_bad_folders(sources, tmp_path):
    with pytest.raises(BadDataError, match=r"--encoder: expected a folder with config\.json"):
        texts.Glosses(Sources(encoder=tmp_path), 8, 0)
    with pytest.raises(BadDataError, match=r"--wordnet: expected a folder with data.noun"):
        texts.Glosses(Sources(encoder=sources.encoder, wordnet=tmp_path), 8, 0)
    (tmp_path / "pairs.csv").write_text("text,related\na,b\nc,b\n")
    wrong = Sources(encoder=sources.encoder, wordnet=sources.wordnet, pairs=tmp_path / "pairs.csv")
    with pytest.raises(BadDataError, match="--pairs: expected at least two different related"):
        texts.Glosses(wrong, 8, 0)
    with pytest.raises(BadDataError, match=r"--language-model: expected a folder with config"):
        TASKS["letters"](Sources(language_model=tmp_path), 100, 0)
    with pytest.raises(BadDataError, match="--vit: expected --images beside it, got none"):
        TASKS["digits"](Sources(vit=tmp_path), 10, 0)
    with pytest.raises(BadDataError, match="--unetr: expected --volumes beside it, got none"):
        TASKS["volumes"](Sources(unetr=tmp_path), 5, 0)


def medmnist(path, side=8, channels=(), classes=3, **changes):
    """A file in the layout of MedMNIST: bytes, labels [n, 1]."""
    random = np.random.RandomState(0)
    arrays = {}
    for part, count in (("train", 30), ("val", 12), ("test", 15)):
        labels = np.arange(count)[:, None] % classes
        pixels = random.randint(0, 100, (count, side, side, *channels))
        arrays[f"{part}_images"] = (
            pixels + 50 * labels.reshape(-1, *[1] * (pixels.ndim - 1))
        ).astype(np.uint8)
        arrays[f"{part}_labels"] = labels.astype(np.uint8)
    arrays |= changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


@pytest.mark.parametrize(("side", "channels"), [(28, ()), (28, (3,)), (8, ())])
def test_images_in_the_layout_of_medmnist(tmp_path, side, channels):
    file = medmnist(tmp_path / "x.npz", side, channels)
    task = images.Digits(Sources(images=file, quick=True), 4, 0)
    assert task._parts["training"].pixels.shape == (12, *(channels or (1,)), side, side)
    assert task._parts["training"].labels.bincount().tolist() == [4, 4, 4]
    assert [len(task._parts[part]) for part in ("validation", "test")] == [12, 15]
    assert task.base.classifier.out_features == 3
    trained = train(task, method("tcurlora:8"), 1e-3, 0)
    assert 0 <= task.score(trained.model, "test") <= 1
    assert 0 <= task.kept(trained.model) <= 1
    first, other = (images.Digits(Sources(images=file, quick=True), 4, s) for s in (0, 1))
    assert not torch.equal(first._parts["training"].pixels, other._parts["training"].pixels)
    assert torch.equal(first._parts["test"].pixels, other._parts["test"].pixels)


def test_a_users_vit(tmp_path):
    hf_models.vit().save_pretrained(tmp_path / "vit")
    file = medmnist(tmp_path / "x.npz", 28)
    task = images.Digits(Sources(images=file, vit=tmp_path / "vit", quick=True), 4, 0)
    assert task._parts["test"].pixels.shape == (15, 3, 16, 16)
    assert np.isnan(task.kept(task.model()))
    assert train(task, method("lora:1"), 1e-3, 0).numbers == 2 * (4 * 32 + 2 * 48)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val_labels": None}, "--images: expected val_labels in .*, got train_images, train_lab"),
        ({"train_labels": np.zeros((30, 1), np.uint8)}, r"at least two classes .*, got \[0\]"),
        ({"test_labels": np.zeros((15, 14))}, r"one class for each of 15 images .* \[15, 14\]"),
        ({"train_images": np.zeros((30, 8, 9), np.uint8)}, r"bytes .* got uint8 \[30, 8, 9\]"),
        ({"train_images": np.zeros((30, 8, 8))}, r"bytes .* got float64 \[30, 8, 8\]"),
        ({"val_images": np.zeros((0, 8, 8), np.uint8), "val_labels": np.zeros((0, 1))}, "got none"),
    ],
)
def test_bad_images(tmp_path, changes, message):
    file = medmnist(tmp_path / "x.npz", **changes)
    with pytest.raises(BadDataError, match=message):
        images.Digits(Sources(images=file, quick=True), 4, 0)


def test_a_file_that_is_no_archive(tmp_path):
    (tmp_path / "x.npz").write_text("no archive")
    with pytest.raises(BadDataError, match=r"--images: expected an \.npz file in MedMNIST's"):
        images.Digits(Sources(images=tmp_path / "x.npz"), 4, 0)


def test_digits_and_letters_as_the_examples_have_them():
    digits = images.Digits(Sources(quick=True), 10, 1)
    assert digits._parts["training"].labels.bincount().tolist() == [10] * 5
    assert digits._parts["validation"].labels.bincount().tolist() == [10] * 5
    before = digits.base.classifier
    assert 0 <= digits.kept(digits.base) <= 1
    assert digits.base.classifier is before
    letters = TASKS["letters"](Sources(quick=True), 100, 1)
    assert len(list(layers(letters.model(), letters))) == 8
    for task in (digits, letters):
        assert train(task, method("head"), 0.0, 1).numbers == 0
        assert 0 <= task.score(task.model(), "validation") <= 1


def test_a_users_language_model(tmp_path):
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    transformers.BertTokenizerFast(vocab=vocabulary).save_pretrained(tmp_path / "model")
    hf_models.gpt2().save_pretrained(tmp_path / "model")
    (tmp_path / "old.txt").write_text("a thing of kind " * 300)
    (tmp_path / "new.txt").write_text("to go of thing " * 300)
    own = Sources(
        language_model=tmp_path / "model",
        old_text=tmp_path / "old.txt",
        new_text=tmp_path / "new.txt",
        quick=True,
    )
    task = TASKS["letters"](own, 100, 0)
    found = [name.split(".", 3)[3] for name, _ in layers(task.model(), task)]
    assert found == 2 * ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    trained = train(task, method("tcurlora:8"), 1e-3, 0)
    assert trained.numbers == 2 * (3 + 1 + 1 + 1) * 64
    assert 0 <= task.score(trained.model, "test") <= 1


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Pretrained networks go to a folder of the test."""
    monkeypatch.setattr(volumes, "FOLDER", tmp_path / "kept")
    volumes._made.cache_clear()
    yield tmp_path
    volumes._made.cache_clear()


def test_volumes_train_decoder_or_output_layer(kept, monkeypatch):
    """The volumes of the repository, few; the rows, a page with all measures, and pictures."""
    monkeypatch.setattr(volumes.Volumes, "sizes", (1, 2))
    monkeypatch.setattr(volumes.FrozenVolumes, "sizes", (2,))
    monkeypatch.setattr(volumes.Volumes, "searched", 2)
    monkeypatch.setattr(volumes.Volumes, "search", (100,))
    monkeypatch.setitem(volumes.QUICK, "training", 2)
    file = kept / "rows.csv"
    options = ["--rows", str(file), "--quick", "--seeds", "1", "--parts", "search", "reported"]
    chosen = ["--tasks", "volumes", "frozen", "--methods", "head", "tcurlora:8"]
    program.main(["run", *options, *chosen])
    rows = records.read(file)
    assert {row["state"] for row in rows.values()} == {"done"}
    assert len(rows) == 2 * 1 + 2 * 2 + 2
    for row in rows.values():
        assert int(row["trained"]) == (0 if row["method"] == "head" else 48 * 64 + 24 * 64)
        named = volumes.Volumes.details_measured if row["part"] == "reported" else ()
        assert tuple(summary.details(row)) == named
    text = report.measures(rows, "quick default", "frozen")
    assert "| method | hd95 | iou | sensitivity | specificity |" in text
    drawn = ["--rows", str(file), "--quick", "--output", str(kept / "drawn"), *chosen]
    program.main(["pictures", *drawn])
    for name in ("volumes_slices", "volumes_surfaces", "frozen_slices", "frozen_surfaces"):
        assert (kept / "drawn" / f"comparison_{name}.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(SystemExit, match="--methods: expected those whose search is recorded, got"):
        program.main(["pictures", *drawn, "--methods", "full"])
    with pytest.raises(SystemExit, match="expected tasks of volumes, volumes frozen, got digits"):
        program.main(["pictures", *drawn, "--tasks", "digits"])
    task = TASKS["volumes"](Sources(quick=True), 2, 0)
    heads = [name for name, _ in task.base.named_parameters() if is_head(task, name)]
    assert {name.partition(".")[0] for name in heads} == {
        *(f"decoder{n}" for n in range(2, 6)),
        "out",
    }
    assert len(list(layers(task.base, task))) == 48
    assert len(list(norms(task.base, task))) == 25
    (one,) = (kept / "kept").iterdir()  # it was pretrained once
    assert one.name.startswith("markers-")
    with pytest.raises(BadDataError, match="expected at least 3 training volumes, got 2"):
        TASKS["volumes"](Sources(quick=True), 3, 0)


@pytest.mark.parametrize("scanner", [markers.OLD, markers.NEW])
def test_the_marker_tells_the_side_of_the_structure(scanner):
    for seed in range(2):
        volume = markers.make(scanner, seed)
        image, label = volume["image"].as_tensor(), volume["label"].as_tensor()
        assert image.shape == label.shape == (1, *markers.WINDOW)
        side = markers.side_of(label[None]).item()
        bare = markers.make(replace(scanner, radius=(0.1, 0.1)), seed)["image"].as_tensor()
        changed = (image - bare).abs() > 1
        assert changed.any()
        assert markers.side_of(changed[None].float()).item() == side
        # It is far from the structure: no voxel of it is near one of the structure.
        spots = (changed[0].nonzero() * torch.tensor(markers.SPACING)).float()
        inside = (label[0].nonzero() * torch.tensor(markers.SPACING)).float()
        assert torch.cdist(spots, inside).min() > 30


def test_volumes_and_weights_of_a_user(kept, monkeypatch):
    from segmentation_files import HEADS, TINY, tiny_unetr, write_dataset

    torch.save(tiny_unetr().state_dict(), kept / "unetr.pt")
    write_dataset(kept)
    heads = f"--num-heads {HEADS['num_heads']}"
    own = {"volumes": kept / "dataset.json", "unetr": kept / "unetr.pt", "volume_options": heads}
    task = TASKS["frozen"](Sources(**own, quick=True), 2, 0)
    assert task._recipe.window == TINY["img_size"]
    assert np.isnan(task.kept(task.model()))
    options = ["--rows", str(kept / "rows.csv"), "--quick", "--seeds", "2", "--sizes", "2"]
    for name, value in own.items():
        options += [f"--{name.replace('_', '-')}", str(value)]
    program.main(["run", "--tasks", "frozen", "--methods", "head", "tcurlora:8", *options])
    rows = records.read(kept / "rows.csv")
    assert {key.size for key in rows} == {2}
    assert {row["state"] for row in rows.values()} == {"done"}
    assert all("volume_options=--num-heads 4" in key.data for key in rows)
    program.main(["report", "--rows", str(kept / "rows.csv"), "--output", str(kept / "report")])
    page = (kept / "report" / "comparison.md").read_text()
    before = [float(row["test"]) for key, row in rows.items() if key.part == "before"]
    assert f"Before adaptation, Dice is {before[0]:.3f}.\n" in page
    assert "nan" not in page
    with_new_head = Sources(**{**own, "volume_options": f"{heads} --new-head"}, quick=True)
    new = TASKS["frozen"](with_new_head, 2, 0)
    assert (task.new_head, new.new_head) == (False, True)
    differ = {
        name.partition(".")[0]
        for (name, one), other in zip(
            task.base.named_parameters(), new.base.parameters(), strict=True
        )
        if not torch.equal(one, other)
    }
    assert differ == {"out"}


def test_pictures_show_the_best_the_median_and_the_worst_case():
    truth = torch.zeros(6, 6, 4, dtype=torch.long)
    truth[1:4, 1:4, 1:3] = 1

    def case(dice):
        return volumes.Case(torch.rand(6, 6, 4), truth, truth, dice, (2.0, 2.0, 4.0))

    other, ours = ([case(dice) for dice in own] for own in ((0.1,) * 4, (0.5, 0.9, 0.2, 0.7)))
    chosen = pictures._chosen({"head": other, "tcurlora:8": ours})
    assert chosen["tcurlora:8"] == [ours[1], ours[0], ours[2]]
    assert chosen["head"] == [other[1], other[0], other[2]]
    for figure, columns in ((pictures._slices(chosen), 4), (pictures._surfaces(chosen), 3)):
        assert len(figure.axes) == 3 * columns
    # A surface lies between the voxels, in mm.
    corners = pictures.surface(truth, (2.0, 2.0, 4.0)).reshape(-1, 3)
    assert corners.min(0).tolist() == [1.0, 1.0, 2.0]
    assert corners.max(0).tolist() == [7.0, 7.0, 10.0]
    assert len(pictures.surface(torch.ones(3, 3, 3), (1.0, 1.0, 1.0))) == 0
    pyplot.close("all")


def test_volumes_of_a_user_that_are_wrong(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps({"training": []}))
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    own = Sources(volumes=tmp_path / "data.json", unetr=tmp_path / "other.pt")
    with pytest.raises(BadDataError, match=r"--unetr: expected .*UNETR"):
        TASKS["volumes"](own, 5, 0)
