"""A training of the segmentation job: interrupted, diverging, stopped early, and gone on with."""

import copy
import json
import multiprocessing
import os
import re
import signal
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import tcur_kernels as tcur
from segmentation_files import tiny_unetr, write_dataset

STEPS = 4


@pytest.fixture
def make(job, tmp_path):
    """Makes a `Job` of one method on tiny volumes; keywords change its settings."""
    base = tmp_path / "unetr.pt"
    torch.save(tiny_unetr().state_dict(), base)
    sections = job.datalist.read_datalist(write_dataset(tmp_path))
    argv = ["--data", str(tmp_path / "dataset.json"), "--pretrained", str(base), "--smoke"]
    args = job.options.parse_args(argv)
    checkpoint = job.checkpoints.read_checkpoint(base)
    architecture, _ = job.unetr.read_architecture(checkpoint, {"num_heads": 4})
    recipe = job.preparation.Recipe(architecture, (1.5, 1.25, 2.0))

    def one(method="tcurlora", folder="run", resume=False, **settings):
        settings = {"steps": STEPS, "validate_every": 1, **settings}
        trained = job.options.training_settings(args)
        return job.training.Job(
            method,
            0,
            recipe,
            type(trained)(**{**vars(trained), **settings}),
            sections["training"],
            sections["validation"],
            base,
            tmp_path / folder,
            job.training.Whole(1.0),
            resume,
        )

    return one


def scored(job, monkeypatch, dice):
    """Makes the checks give these scores, one after the other."""
    scores = iter(dice)

    def evaluate(recipe, model, volumes, measures):
        return {"dice": [next(scores)]}

    monkeypatch.setattr(job.training, "evaluate", evaluate)


@pytest.mark.parametrize("method", ["tcurlora", "decoder", "full"])
def test_a_training_that_goes_on_ends_as_without_the_interruption(
    job, make, method, monkeypatch, capsys
):
    whole = make(method)
    report, _ = job.training.run_job(whole)
    one_step = job.training.Training._one_step

    def interrupted(training):
        if training.step == 2:
            raise KeyboardInterrupt
        one_step(training)

    with monkeypatch.context() as patch:
        patch.setattr(job.training.Training, "_one_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            job.training.run_job(make(method, "again"))
    again = make(method, "again", resume=True)
    assert again.state.is_file()
    assert not again.report.is_file()
    resumed, _ = job.training.run_job(again)
    assert "goes on after step 2" in capsys.readouterr().out
    assert again.whole.done == pytest.approx(2 * job.methods.METHODS[method].seconds)
    assert whole.whole.work - again.whole.work == pytest.approx(again.whole.done)
    for name in ("loss", "dice", "best_step", "core_norm", "grad_norm", "parameters"):
        assert getattr(resumed, name) == getattr(report, name), name
    for file in ("best", "last"):
        expected, came = (load_file(getattr(one, file)) for one in (whole, again))
        assert expected.keys() == came.keys()
        assert all(torch.equal(tensor, came[name]) for name, tensor in expected.items())
    assert not again.state.exists()
    assert not list(again.folder.glob(".*"))

    # What is done is not done again, and its report is the same.
    monkeypatch.setattr(job.training, "run_job", None)
    kept = job.training.in_own_process(again)
    assert json.dumps(vars(kept)) == json.dumps(vars(resumed))


def test_a_training_goes_on_only_with_what_it_began_with(job, make, monkeypatch, tmp_path):
    job.training.run_job(make())
    for changed, message in (
        ({"core_lr": 0.5}, r"--resume: expected core_lr 0\.01, with which .*, got 0\.5"),
        ({"steps": 5}, "--resume: expected steps 4, with which .*, got 5"),
    ):
        with pytest.raises(SystemExit, match=message):
            job.training.in_own_process(make(resume=True, **changed))
    torch.save(tiny_unetr(1).state_dict(), tmp_path / "unetr.pt")
    with pytest.raises(SystemExit, match="--resume: expected pretrained "):
        job.training.in_own_process(make(resume=True))


def test_without_resume_an_earlier_run_does_not_matter(job, make):
    first, _ = job.training.run_job(make(core_lr=0.5))
    again, _ = job.training.run_job(make())
    fresh, _ = job.training.run_job(make(folder="fresh"))
    assert first.loss != again.loss == fresh.loss


@pytest.mark.parametrize("method", ["core", "full"])
def test_a_loss_that_is_not_finite_stops_the_training(job, make, method):
    one = make(method, core_lr=1e30, vit_lr=1e30, decoder_lr=1e30)
    with pytest.raises(SystemExit) as stopped:
        job.training.run_job(one)
    message = str(stopped.value)
    assert re.search(r"stopped a\w+ step \d: the \w+ of .*_image\.nii\.gz is n", message), message
    assert f"is in {one.last}" in message
    assert all(torch.isfinite(tensor).all() for tensor in load_file(one.last).values())
    job.methods.load_trained(tiny_unetr(), one.last)


@pytest.mark.parametrize("validate_every", [2, STEPS])
def test_a_stop_keeps_what_was_trained_before(job, make, monkeypatch, validate_every):
    """The volume of step 3 has a NaN: the steps before it are kept, and the volume is named."""
    one, kept = make(validate_every=validate_every), {}
    training = job.training.Training
    one_step = training._one_step

    def spoiled(self):
        if self.step == 2:
            self.volumes[self.order[2]]["image"][:] = float("nan")
        if self.step == 1:
            kept.update(self.trainee.snapshot())
        kept["entry"] = self.volumes[self.order[self.step]]["entry"]["image"]
        one_step(self)

    monkeypatch.setattr(training, "_one_step", spoiled)
    with pytest.raises(SystemExit) as stopped:
        job.training.run_job(one)
    name = kept.pop("entry")
    assert f"stopped at step 3: the loss of {name} is nan" in str(stopped.value)
    assert f"is in {one.last}" in str(stopped.value)
    best = f"The best so far, of step 2, is {one.best}"
    assert (best in str(stopped.value)) == one.best.is_file() == (validate_every == 2)
    adapter = tcur.load_adapter(tiny_unetr(), one.last)
    for parameter, value in adapter.named_parameters():
        assert torch.equal(value, kept[parameter]), parameter


def test_a_gradient_that_is_not_finite_stops_the_training(job, make, monkeypatch):
    one = make("decoder")
    monkeypatch.setattr(
        torch.nn.utils, "get_total_norm", lambda gradients: torch.tensor(float("inf"))
    )
    with pytest.raises(SystemExit, match=r"step 1: the gradient of .*nii\.gz is inf"):
        job.training.run_job(one)


def test_a_prediction_that_is_not_finite_stops_the_training(job, make, monkeypatch):
    def evaluate(*args, **keywords):
        raise job.evaluation.NotFiniteError("the prediction of x.nii.gz")

    one = make("decoder")
    monkeypatch.setattr(job.training, "evaluate", evaluate)
    with pytest.raises(
        SystemExit, match=r"after step 1: the prediction of x\.nii\.gz is not finite"
    ):
        job.training.run_job(one)
    assert one.last.is_file()


def test_a_network_of_nan_is_not_scored(job, make):
    one = make()
    volumes = job.preparation.load_volumes(one.recipe, one.held_out)
    model = tiny_unetr()
    with torch.no_grad():
        model.out.conv.conv.bias[0] = float("nan")
    with pytest.raises(job.evaluation.NotFiniteError, match=r"validation0_image\.nii\.gz"):
        job.evaluation.evaluate(one.recipe, model, volumes)


def test_the_best_check_is_kept_and_the_last(job, make, monkeypatch):
    one, seen = make(), []
    scored(job, monkeypatch, [float("nan"), 0.5, 0.5, 0.25])
    save = job.methods.Trainee.save

    def watched(trainee, file):
        seen.append((file.name, trainee.snapshot()))
        save(trainee, file)

    monkeypatch.setattr(job.methods.Trainee, "save", watched)
    report, _ = job.training.run_job(one)
    assert report.best_step == 2
    assert list(report.dice) == [1, 2, 3, 4]
    names = [name for name, _ in seen]
    assert names.count("tcurlora.safetensors") == 2  # the first check and the better one
    assert names.count("tcurlora_last.safetensors") == STEPS
    best = [snapshot for name, snapshot in seen if name == "tcurlora.safetensors"][-1]
    for file, snapshot in ((one.best, best), (one.last, seen[-1][1])):
        adapter = tcur.load_adapter(tiny_unetr(), file)
        for name, value in adapter.named_parameters():
            assert torch.equal(value, snapshot[name]), (file, name)
    assert job.methods.read_recipe(one.best) == one.recipe
    # The probe is of the best network, and not of the last.
    model = tiny_unetr()
    tcur.load_adapter(model, one.best)
    image = job.preparation.load_volumes(one.recipe, one.held_out)[0]["image"]
    probe = load_file(one.folder / job.training.PROBE)["logits"]
    assert torch.equal(job.evaluation.predict(one.recipe, model, image), probe)


@pytest.mark.parametrize(
    ("patience", "steps"), [(0, 6), (1, 3), (2, 4), (3, 6)], ids="patience {}".format
)
def test_patience(job, make, monkeypatch, patience, steps):
    scored(job, monkeypatch, [0.1, 0.4, 0.3, 0.3, 0.5, 0.2])
    report, whole = job.training.run_job(make("head", steps=6, patience=patience))
    assert list(report.dice) == list(range(1, steps + 1))
    assert whole.done == pytest.approx(6 * job.methods.METHODS["head"].seconds)  # it need not go on


def test_a_process_that_stops_the_training(job, make):
    with pytest.raises(SystemExit, match=r"core.*: training stopped "):
        job.training.in_own_process(make("core", core_lr=1e30))


def test_an_interrupt_leaves_whole_files(job, make):
    one = make("head", steps=200)
    # A shell may start what runs in the background with interrupts ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt():
        while not one.state.is_file():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            job.training.in_own_process(one)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not multiprocessing.active_children()
    assert {file.name for file in one.folder.iterdir()} == {
        "head.safetensors",
        "head_last.safetensors",
        "head_state.pt",
    }
    job.methods.load_trained(tiny_unetr(), one.last)
    assert torch.load(one.state, weights_only=True)["step"] > 0


def test_a_training_ends_with_the_program_that_started_it(job, make, monkeypatch):
    class Dead:
        @staticmethod
        def is_alive():
            return False

    monkeypatch.setattr(job.training.multiprocessing, "parent_process", Dead)
    with pytest.raises(SystemExit, match="the program that started this training was killed"):
        job.training.run_job(make("head"))


def test_a_full_disk(job, make, monkeypatch):
    """What a training's process tells the program, without a process."""
    said = []
    sender = SimpleNamespace(send=said.append)
    monkeypatch.setattr(job.training.signal, "signal", lambda *_: None)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(job.methods.Trainee, "save", full)
    one = make("head")
    job.training._run_and_send(one, sender)
    assert said == [f"{one.folder}: expected to be written, got [Errno 28] No space left on device"]


class Deadly:
    """Kills the process in which it is unpickled."""

    def __reduce__(self):
        return eval, ("__import__('os').kill(__import__('os').getpid(), 9)",)


def test_a_process_that_is_killed(job, make):
    message = "training: expected a process that ends by itself, got one that ended with -9"
    with pytest.raises(SystemExit, match=message):
        job.training.in_own_process(replace(make("head"), whole=Deadly()))


def test_a_volume_that_vanished(job, make):
    one = make("head")
    os.remove(one.entries[1]["image"])
    with pytest.raises(SystemExit, match=r"training1_image\.nii\.gz"):
        job.training.run_job(one)


def test_files_that_vanish_while_training_do_no_harm(job, make, monkeypatch):
    """Everything is in memory by then."""
    one_step = job.training.Training._one_step

    def vanish(training):
        if training.step == 1:
            for file in one.base.parent.glob("*.nii.gz"):
                file.unlink()
            one.base.unlink()
        one_step(training)

    expected, _ = job.training.run_job(make("head", "before"))
    one = make("head")
    monkeypatch.setattr(job.training.Training, "_one_step", vanish)
    report, _ = job.training.run_job(one)
    assert report.loss == expected.loss
    assert report.dice == expected.dice


@pytest.mark.parametrize("method", ["tcurlora", "core", "decoder", "head", "vit", "full"])
def test_what_is_saved_is_what_was_trained(job, make, method, tmp_path):
    """For every method: loaded onto the base, the file computes what the trained network does."""
    one = make(method)
    model = tiny_unetr()
    trainee = job.methods.Trainee(model, job.methods.METHODS[method], one.settings, one.recipe)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for group in trainee.groups:
            for parameter in group["params"]:
                parameter += 0.01 * torch.rand_like(parameter)
    frozen = [n for n in before if n not in trainee.tensors() and not n.startswith("tcur.")]
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in frozen)
    assert sum(p.numel() for group in trainee.groups for p in group["params"]) == trainee.count()
    file = tmp_path / "trained.safetensors"
    trainee.save(file)
    fresh, x = tiny_unetr(), torch.rand(1, 1, 32, 32, 32)
    job.methods.load_trained(fresh, file)
    with torch.no_grad():
        assert torch.equal(fresh.eval()(x), model.eval()(x))
    if method != "full":  # nothing of the base is left in it
        message = f"--adapter: expected {file} to fit the network in --pretrained"
        with pytest.raises(SystemExit, match=message):
            job.methods.load_trained(tiny_unetr(1), file)
