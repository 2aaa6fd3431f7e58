"""The README's code runs as it stands, and its figures are those that were recorded."""

import json
import re
import statistics
from pathlib import Path

import pytest
import torch

import hf_models
import tcur_kernels as tcur
from cases import make_case
from models import Tiny
from oracle import w_eff
from tcur_kernels.adapters.install import stacks_of
from tolerance import assert_close

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TRAIN, PEFT, KERNELS, TWIN = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(code, **names):
    exec(compile(code, "README.md", "exec"), scope := {"tcur": tcur, "torch": torch, **names})
    return scope


def test_the_first_door_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model, base, x = Tiny(), Tiny(), torch.randn(4, 7, 6)
    base.load_state_dict(model.state_dict())

    def train(model, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()

    run(TRAIN.replace("rank=8", "rank=2"), model=model, base=base, train=train)
    assert torch.equal(base.eval()(x), model.eval()(x))
    assert all(stack.core.any() for stack in stacks_of(model).values())


@pytest.mark.filterwarnings(*hf_models.PEFT_SAYS)
def test_the_second_door_is_a_method_of_peft(tmp_path, monkeypatch, capsys):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=20, n_positions=8)
    base = transformers.GPT2LMHeadModel(config)
    run(PEFT, base=base, get_peft_model=peft.get_peft_model)
    assert "trainable params: " in capsys.readouterr().out
    again = transformers.GPT2LMHeadModel(config)
    again.load_state_dict(transformers.GPT2LMHeadModel(config).state_dict())
    with pytest.raises(ValueError, match="expected the base that the adapter was made for"):
        peft.PeftModel.from_pretrained(again, "adapter")  # drawn anew


def test_the_third_door_is_the_t_product():
    torch.manual_seed(0)
    w, core = torch.randn(6, 16, 16), torch.randn(6, 8, 8, requires_grad=True)
    a, b = torch.randn(6, 4, 5), torch.randn(6, 5, 3)
    scope = run(KERNELS, w=w, core=core, a=a, b=b)
    assert core.grad is not None
    assert scope["y"].shape == (6, 4, 3)


def test_the_two_columns_are_one_function():
    case = make_case(6, 5, 7, 2)
    columns = [(line[:66].rstrip(), line[66:]) for line in TWIN.splitlines()]
    left = "\n".join(column for column, _ in columns if column)
    right = "\n".join(column for _, column in columns)
    names = {"w": case.weight, "c": case.lateral, "u": case.core, "r": case.horizontal}
    results = [run(code, **names, alpha=0.5)["w_eff"] for code in (left, right)]
    exact = w_eff(case.weight, case.lateral, case.core, case.horizontal, 0.5)
    assert_close(results[0], results[1], exact)


#: Row of the README's table -> its method in the recorded run.
METHODS = {
    "output layer": "output layer only",
    "cores and output layer": "core + output layer",
    "whole transformer and output layer": "full ViT + output layer",
    "decoder": "decoder-only",
    "cores and decoder": "tCURLoRA",
    "nothing": "zero-shot",
}


def test_the_result_is_the_recorded_one():
    recorded = json.loads((ROOT / "examples" / "results" / "three_seeds.json").read_text())["runs"]
    for row, method in METHODS.items():
        means = [statistics.mean(one["scores"][method]["dice"]) for one in recorded]
        dice = f"{statistics.mean(means):.3f} ± {statistics.stdev(means):.3f}"
        reports = recorded[0]["reports"]
        numbers = reports[method]["parameters"] if method in reports else 0
        assert re.search(rf"\| {row} +\| {numbers:,} +\| {dice} \|", README), (row, numbers, dice)


def test_the_size_of_an_adapter():
    """The 72 linear layers of a ViT-B at rank 8: cores in fp32, and what LoRA trains of them."""
    layers = {(768, 768): 48, (3072, 768): 12, (768, 3072): 12}
    cores = sum(layers.values()) * 8**2
    assert f"{cores * 4 / 1000:.0f} KB for a ViT-B" in README
    lora = sum(count * 8 * (n1 + n2) for (n1, n2), count in layers.items())
    table = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    assert f"| {lora:,} | {cores:,} |" in table
