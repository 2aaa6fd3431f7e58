"""The two peft examples: the whole of each in a tiny size, their own inputs, and bad arguments."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_models import PEFT_SAYS, vit
from tolerance import FLOAT64

EXAMPLES = Path(__file__).parent.parent / "examples"

pytestmark = [pytest.mark.filterwarnings(text) for text in PEFT_SAYS]


#: Runs a script as it is, but for the dtype of the model that it makes.
IN_DOUBLE = """
import os, runpy, sys, torch
torch.set_default_dtype(torch.float64)
del sys.argv[0]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(script, *arguments, in_double=False):
    program = ["-c", IN_DOUBLE] if in_double else []
    command = [sys.executable, *program, str(EXAMPLES / script), "--smoke", *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def example(monkeypatch):
    """The scripts as modules."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import language_model
    import vit_classifier

    return {"language_model": language_model, "vit_classifier": vit_classifier}


def test_the_language_model_end_to_end(tmp_path):
    """In float64, where an adapter that is loaded or merged wrongly is told from roundings."""
    methods = ["tcurlora:4", "curlora:4", "lora:4", "full"]
    table = run("language_model.py", "--output", tmp_path, "--methods", *methods, in_double=True)
    summary = json.loads((tmp_path / "results.json").read_text())
    assert summary["texts"] == ["sherlock_holmes", "romeo_and_juliet"]
    results = {result["method"]: result for result in summary["results"]}
    base = results.pop("no adaptation")
    for name, result in results.items():
        assert f"\n{name}" in table
        assert result["new text"] < base["new text"]
        assert result["trained"] > 0
        if name != "full":
            assert max(result["loaded"], result["merged"]) <= FLOAT64
            assert (tmp_path / name.replace(":", "_") / "adapter_config.json").is_file()
    # GPT-2 of two layers, width 16: stacks of 8, 2 and 2 slices, cores of rank 4.
    assert results["tcurlora:4"]["trained"] == 12 * 4 * 4


def test_the_classifier_end_to_end(tmp_path):
    table = run("vit_classifier.py", "--output", tmp_path)
    summary = json.loads((tmp_path / "results.json").read_text())
    assert summary["images"] == {"training": 50, "validation": 50, "test": 796}
    trained = {result["method"]: result["trained"] for result in summary["results"]}
    head = 16 * 5 + 5
    assert trained["head"] == head
    assert trained["tcurlora"] == head + (8 + 2 + 2) * 2 * 2
    assert "tcurlora: logits of the loaded adapter differ by" in table


def test_a_classifier_and_images_of_ones_own(tmp_path):
    vit().save_pretrained(tmp_path / "model")
    for part, count in (("train", 5), ("test", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / "data" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                noise = np.random.default_rng(number).integers(0, 255, (20, 24, 3), np.uint8)
                Image.fromarray(noise).save(folder / f"{number}.png")
    run(
        "vit_classifier.py",
        *("--model", tmp_path / "model", "--data", tmp_path / "data", "--output", tmp_path / "out"),
        *("--methods", "tcurlora"),
    )
    summary = json.loads((tmp_path / "out" / "results.json").read_text())
    assert summary["images"] == {"training": 8, "validation": 2, "test": 4}


def test_a_language_model_of_ones_own(tmp_path):
    """A directory as save_pretrained writes it, with a tokenizer made of the text."""
    import tokenizers
    import transformers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    text = (EXAMPLES / "texts" / "romeo_and_juliet.txt").read_text()[:20_000]
    tokenizer.train_from_iterator([text], trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.save_pretrained(tmp_path / "model")
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    (tmp_path / "new.txt").write_text(text)
    (tmp_path / "old.txt").write_text(text[::-1])
    run(
        "language_model.py",
        *("--model", tmp_path / "model", "--output", tmp_path / "out", "--methods", "tcurlora:4"),
        *("--new-text", tmp_path / "new.txt", "--old-text", tmp_path / "old.txt"),
    )
    summary = json.loads((tmp_path / "out" / "results.json").read_text())
    assert summary["texts"] == ["old", "new"]
    assert summary["parameters"] > 0


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("language_model", ["--steps", "0"], "--steps: expected at least 1, got 0"),
        (
            "language_model",
            ["--methods", "lora"],
            "--methods: expected tcurlora:RANK, .*got 'lora'",
        ),
        ("language_model", ["--new-text", "x.txt"], "--new-text: expected a text file, got x.txt"),
        ("vit_classifier", ["--images", "0"], "--images: expected at least 1, got 0"),
        ("vit_classifier", ["--model", "x"], "--model expects --data beside it"),
    ],
)
def test_bad_arguments(example, capsys, script, arguments, message):
    with pytest.raises(SystemExit):
        example[script].parse_args(arguments)
    assert re.search(message, capsys.readouterr().err)


def test_bad_files(example, tmp_path):
    script = example["language_model"]
    args = script.parse_args(["--model", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"--model: expected a directory with config\.json"):
        script.load_base(args)
    short = tmp_path / "short.txt"
    short.write_text("To be, or not to be")
    with pytest.raises(SystemExit, match=r"expected more than 1940 tokens .*, got 19"):
        script.read_text(short, lambda text: [0] * len(text), args.context)
    short.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(SystemExit, match="expected a text file in UTF-8"):
        script.read_text(short, lambda text: [0] * len(text), args.context)
    script = example["vit_classifier"]
    with pytest.raises(SystemExit, match=r"--model: expected a directory with config\.json"):
        script.load_base(tmp_path)
    with pytest.raises(SystemExit, match="--data: expected a folder for each class"):
        script.read_folders(tmp_path, vit())
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"--data: expected images in .*train, got none"):
        script.read_folders(tmp_path, vit())
