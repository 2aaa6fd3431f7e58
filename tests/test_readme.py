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


RESULTS = ROOT / "examples" / "results"
RECORDED = json.loads((RESULTS / "three_seeds.json").read_text())


def over_seeds(method, metric, form):
    """Mean ± standard deviation over the seeds of the recorded run, as the report has them."""
    seeds = [run["scores"][method][metric] for run in RECORDED["runs"]]
    found = [[value for value in values if value is not None] for values in seeds]
    means = [statistics.mean(values) for values in found if values]
    if not means:
        return "–"
    deviation = f" ± {statistics.stdev(means):{form}}" if means[1:] else ""
    return f"{statistics.mean(means):{form}}{deviation}"


def numbers_of(method):
    reports = RECORDED["runs"][0]["reports"]
    return f"{reports[method]['parameters'] if method in reports else 0:,}"


def test_the_result_is_the_recorded_one():
    said = " ".join(README.split())
    head, cores, vit = (
        over_seeds(method, "dice", ".3f").split()[0]
        for method in ("output layer only", "core + output layer", "full ViT + output layer")
    )
    numbers = [
        int(numbers_of(m).replace(",", "")) for m in ("core + output layer", "output layer only")
    ]
    assert f"cores of {numbers[0] - numbers[1]:,} numbers bring the mean Dice" in said
    assert f"from {head} to {cores}, over three seeds" in said
    assert f"training the whole transformer brings it to {vit}." in said


def test_the_table_of_the_recorded_run():
    page = (RESULTS / "README.md").read_text(encoding="utf-8")
    for method in RECORDED["runs"][0]["scores"]:
        cells = [over_seeds(method, "dice", ".3f"), over_seeds(method, "hd95", ".1f")]
        cells = [re.escape(cell) + " +" for cell in (method, *cells, numbers_of(method))]
        assert re.search(r"\| " + r"\| ".join(cells) + r"\|", page), cells
    # The figures of the text.
    said = " ".join(page.split())
    by_seed = {
        method: [
            f"{statistics.mean(run['scores'][method]['dice']):.3f}" for run in RECORDED["runs"]
        ]
        for method in RECORDED["runs"][0]["scores"]
    }
    both = zip(by_seed["tCURLoRA"], by_seed["decoder-only"], strict=True)
    assert ", ".join(map("/".join, both)) in said
    assert "{}, {} and {}".format(*by_seed["core + output layer"]) in said
    found = [run["scores"]["output layer only"]["dice"] for run in RECORDED["runs"]]
    assert f"nothing at all in {sum(d == 0 for dice in found for d in dice)} of 24" in said
    head, cores, vit = (
        statistics.mean(statistics.mean(run["scores"][method]["dice"]) for run in RECORDED["runs"])
        for method in ("output layer only", "core + output layer", "full ViT + output layer")
    )
    assert f"{(cores - head) / (vit - head):.0%} of the gain".replace("%", " %") in said
    reports = [run["reports"]["tCURLoRA"] for run in RECORDED["runs"]]
    norms = [norm[-1] for report in reports for norm in report["core_norm"].values()]
    assert f"from 0 to between {min(norms):.1f} and {max(norms):.1f} per stack" in said
    names = ("core + output layer", "output layer only", "full ViT + output layer")
    seeds = zip(*([float(dice) for dice in by_seed[name]] for name in names), strict=True)
    least = min((core - head) / (vit - head) for core, head, vit in seeds)
    assert f"and on no seed less than {least:.0%}".replace("%", " %") in said
    slices = json.loads((RESULTS / "three_seeds_in_slices.json").read_text())["runs"]
    published = {
        method: [f"{statistics.mean(run['scores'][method]['dice']):.3f}" for run in slices]
        for method in ("core + output layer", "tCURLoRA")
    }
    assert "is then {}, {} and {}, and that of".format(*published["core + output layer"]) in said
    assert "of tCURLoRA {}, {} and {} ([".format(*published["tCURLoRA"]) in said
    assert all(run["scored"] == "test" for run in RECORDED["runs"])
    assert {run["volumes"] for run in RECORDED["runs"]} == {8}


def test_the_table_and_the_text_of_two_modalities():
    summary = json.loads((RESULTS / "two_modalities.json").read_text())
    said = " ".join((RESULTS / "README.md").read_text(encoding="utf-8").split())
    runs = summary["runs"]
    rows = {"head": "head", "shared": "head, cores shared", "apart": "head, cores apart"}
    for name, row in {**rows, "full": "everything"}.items():
        results = [run["methods"][name] for run in runs]
        mean, deviation = summary["dice"][name]
        assert mean == pytest.approx(statistics.mean(result["dice"] for result in results))
        rates = " ".join(f"{result['rate']:g}" for result in results)
        seconds = statistics.mean(result["seconds_per_step"] for result in results)
        cells = (row, f"{mean:.3f} ± {deviation:.3f}", f"{results[0]['trained']:,}", rates)
        assert f"| {' | '.join((*cells, f'{seconds:.3f}'))} |" in said

    def gain(one, other):
        """Mean and standard error of the difference of two methods, paired by seed."""
        dice = [[run["methods"][name]["dice"] for name in (one, other)] for run in runs]
        each = [a - b for a, b in dice]
        return each, statistics.mean(each), statistics.stdev(each) / len(each) ** 0.5

    each, mean, error = gain("shared", "apart")
    assert f"Shared - apart is {mean:+.3f} ± {error:.3f}" in said
    assert f"{', '.join(f'{one:+.3f}' for one in each[:4])} and {each[4]:+.3f}" in said
    half = 2.776 * error  # Student's t for five seeds
    assert f"reaches from {mean - half:.3f} to {mean + half:+.3f} (" in said
    pairs = {"by {}": ("shared", "head"), "and by {} apart": ("apart", "head")}
    for text, names in {**pairs, "and {}": ("full", "apart")}.items():
        each, mean, error = gain(*names)
        assert min(each) > 0
        assert text.format(f"{mean:.3f} ± {error:.3f}") in said
    numbers = {name: runs[0]["methods"][name]["trained"] for name in rows | {"full": ""}}
    cores, encoders = numbers["shared"] - numbers["head"], numbers["full"] - numbers["head"]
    assert f"So {cores:,} numbers of core bring about two thirds" in said
    assert f"{encoders:,} numbers of the encoders" in said


def test_the_size_of_an_adapter():
    """The 72 linear layers of a ViT-B at rank 8: cores in fp32, and what LoRA trains of them."""
    layers = {(768, 768): 48, (3072, 768): 12, (768, 3072): 12}
    cores = sum(layers.values()) * 8**2
    assert f"{cores * 4 / 1000:.0f} KB for a ViT-B" in README
    lora = sum(count * 8 * (n1 + n2) for (n1, n2), count in layers.items())
    table = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    assert f"| {lora:,} | {cores:,} |" in table


#: Setting in the sweep -> its row in the table.
SWEPT = {
    "defaults": "**defaults, 1e-2**",
    "core-lr-3e-4": "core learning rate 3e-4",
    "core-lr-1e-3": "core learning rate 1e-3",
    "core-lr-3e-3": "core learning rate 3e-3",
    "core-lr-3e-2": "core learning rate 3e-2",
    "core-lr-1e-1": "core learning rate 1e-1",
    "rank-2": "rank 2",
    "rank-32": "rank 32",
    "alpha-4": "alpha 4",
    "uniform": "uniform selection",
    "decoder-lr-1e-3": "decoder learning rate 1e-3",
    "steps-360": "360 steps",
}


def test_the_table_of_the_sweep():
    """It is what the script printed, and the script has the settings of the table."""
    page = (RESULTS / "README.md").read_text(encoding="utf-8")
    dice, slices = (
        {
            (setting, method): value
            for setting, method, value in re.findall(
                r"(\S+): (\S.*?) +(0\.\d+) ", (RESULTS / name).read_text()
            )
        }
        for name in ("sweep.txt", "sweep_in_slices.txt")
    )
    cores = ("tCURLoRA", "core + output layer")
    for setting, row in SWEPT.items():
        cells = [row, *(found[setting, method] for found in (dice, slices) for method in cores)]
        cells = [re.escape(cell) + " +" for cell in cells]
        assert re.search(r"\| " + r"\| ".join(cells) + r"\|", page), cells
    script = (RESULTS / "sweep.sh").read_text().partition("<<'SETTINGS'\n")[2]
    assert [line.split()[0] for line in script.splitlines()[:-1]] == list(SWEPT)
    alone = dice["decoder-lr-1e-3", "decoder-only"], dice["steps-360", "decoder-only"]
    assert "to {} at a learning rate of 1e-3, and to {} in".format(*alone) in page
    said = " ".join(page.split())
    alone = dice["rank-2", cores[1]], dice["rank-32", cores[1]]
    assert "rank 2 comes to {} and rank 32 to {}. In slices".format(*alone) in said
    assert f"hardly moves ({slices['rank-2', cores[1]]}), and rank 32 spoils the model" in said
    assert f"with the decoder beside it, too ({slices['rank-32', cores[0]]})" in said


def test_the_page_of_the_peft_examples():
    page = (RESULTS / "peft.md").read_text(encoding="utf-8")
    found = json.loads((RESULTS / "language_model.json").read_text())["results"]
    results = {result["method"]: result for result in found}
    for name, result in results.items():
        cells = [name, *(f"{result[f'{kind} text']:.3f}" for kind in ("new", "old"))]
        cells.append(f"{result['trained']:,}")
        assert re.search(r"\n" + " +".join(map(re.escape, cells)) + " ", page), cells
    said, base = " ".join(page.split()), results["no adaptation"]

    def new(name):
        return f"{results[name]['new text']:.1f}"

    def lost(name):
        return f"{results[name]['old text'] - base['old text']:.1f}"

    gained = f"from {new('no adaptation')} to {new('tcurlora:8')}"
    assert f"{gained} and lose {lost('tcurlora:8')} on Sherlock Holmes" in said
    assert f"gains more ({new('lora:1')}) and loses more ({lost('lora:1')});" in said
    assert f"Rank 32 comes to {new('tcurlora:32')} at half the rate of rank 8." in said
    assert results["tcurlora:32"]["rate"] * 2 == results["tcurlora:8"]["rate"]
    seeds = json.loads((RESULTS / "vit_classifier.json").read_text())
    for method in seeds[0]["results"]:
        name, trained = method["method"], f"{method['trained']:,}"
        accuracies = [
            f"{own['accuracy']:.3f}"
            for seed in seeds
            for own in seed["results"]
            if own["method"] == name
        ]
        assert re.search(rf"\| {name} \| {trained} \| \S+ \| " + r" \| ".join(accuracies), page)
