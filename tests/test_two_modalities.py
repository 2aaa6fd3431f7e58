"""The example of two modalities: the whole of it in a tiny size, and bad arguments."""

import json
import re
from pathlib import Path

import pytest
import torch

from tolerance import FLOAT64

EXAMPLES = Path(__file__).parent.parent / "examples"

pytestmark = pytest.mark.filterwarnings("default")  # of nilearn and what it imports


@pytest.fixture
def example(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import two_modalities

    return two_modalities


@pytest.fixture
def in_double():
    """Makes models and volumes in float64, to tell a wrong adapter from roundings."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_the_example_end_to_end(example, in_double, tmp_path, capsys):
    example.main(["--smoke", "--seeds", "0", "1", "--output", str(tmp_path)])
    printed = capsys.readouterr()
    told = [int(part) for part in re.findall(r"all (\d+)%, \d+:\d\d left", printed.err)]
    assert told == sorted(told)
    assert told[-1] == 100
    for stack in ("16x16: 16", "T1_attention: 8", "T2_attention: 8", "T2_narrowing: 2"):
        assert f"  {stack} slices of 16 x" in printed.out

    summary = json.loads((tmp_path / "results.json").read_text())
    assert [run["seed"] for run in summary["runs"]] == [0, 1]
    for run in summary["runs"]:
        trained = {name: result["trained"] for name, result in run["methods"].items()}
        head = (2 * 16 + 1) * 16 * 16 * 8  # of both tokens and a bias, to the voxels of a patch
        cores = (2 * 2 * 4 + 2 * 2 + 2 * 2) * 2 * 2  # encoders, blocks, layers; rank 2
        model = example.TwoEncoders(1, 16, 2, (16, 16, 8))
        everything = sum(p.numel() for p in model.parameters())
        assert trained == {
            "head": head,
            "shared": head + cores,
            "apart": head + cores,
            "full": everything,
        }
        assert max(run["round_trip"]["loaded"], run["round_trip"]["merged"]) <= FLOAT64
        assert (tmp_path / f"shared_seed{run['seed']}.safetensors").is_file()
        for result in run["methods"].values():
            assert 0 <= result["dice"] <= 1
            assert result["validation"].keys() == {"0.01"}
    check_table(summary, printed.out)
    check_one_seed(example, summary)


def check_table(summary, printed):
    """The numbers of the table are those of the runs."""
    runs = summary["runs"]
    for name, (mean, deviation) in summary["dice"].items():
        one, other = (run["methods"][name]["dice"] for run in runs)
        assert mean == pytest.approx((one + other) / 2)
        assert deviation == pytest.approx(abs(one - other) / 2**0.5)
        trained = runs[0]["methods"][name]["trained"]
        assert re.search(rf"\n{name} +{mean:.3f} ± {deviation:.3f} +{trained:,} ", printed)
    difference = summary["shared - apart"]
    one, other = difference["each"]
    shared, apart = (runs[0]["methods"][name]["dice"] for name in ("shared", "apart"))
    assert one == pytest.approx(shared - apart)
    assert difference["standard error"] == pytest.approx(abs(one - other) / 2)
    said = f"{difference['mean']:+.3f} ± {difference['standard error']:.3f}"
    assert f"shared - apart: {said}" in printed


def check_one_seed(example, summary):
    """One seed has no deviation, and the table says none."""
    runs = summary["runs"][:1]
    one = {**summary, **example.summarise(runs), "runs": runs}
    assert one["shared - apart"]["standard error"] is None
    assert re.search(r"\nhead +0\.\d{3} +67,584 ", example.report(one))


def test_both_modalities_show_one_brain(example):
    """Noise and bias differ, and so do the contrasts; outside of the brain there is noise alone."""
    volumes = example.take(example.SOURCE, 0, (1, 1), lambda name, seeds: seeds)
    assert [len(part) for part in volumes] == [1, 1]
    images = torch.cat([part.images for part in volumes])
    masks = torch.cat([part.masks for part in volumes])
    assert images.shape == (2, 2, *example.SIZE)
    assert masks.shape == (2, len(example.SOURCE.structures), *example.SIZE)
    assert set(masks.unique().tolist()) == {0, 1}
    frontal, white = masks.bool().unbind(1)
    for subject in range(2):
        t1, t2 = images[subject]
        assert t1[white[subject]].mean() > t1[frontal[subject]].mean()
        assert t2[white[subject]].mean() < t2[frontal[subject]].mean()
    outside = images[:, :, :4, :4].flatten(2)  # a corner of the slab
    assert all(abs(torch.corrcoef(pair)[0, 1]) < 0.2 for pair in outside)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "0"], "--rank: expected a finite number above 0, got 0"),
        (["--rank", "65"], "--rank: expected at most --width 64, got 65"),
        (["--rates", "1e-3", "inf"], "--rates: expected a finite number above 0, got [0.001, inf]"),
        (["--seeds", "1", "1"], "--seeds: expected different numbers of at least 0, got [1, 1]"),
        (["--patch", "8", "8", "5"], "--patch: expected divisors of (48, 48, 16), got [8, 8, 5]"),
        (["--width", "30"], "--width: expected a multiple of 4, got 30"),
    ],
)
def test_bad_arguments(example, capsys, arguments, message):
    with pytest.raises(SystemExit):
        example.parse_args(arguments)
    assert message in capsys.readouterr().err
