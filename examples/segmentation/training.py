"""Trains one method in its own process, with checks on the way, and so that it can go on later."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import resource
import signal
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from monai.losses import DiceCELoss
from safetensors.torch import save_file
from torch.utils.data import RandomSampler

from progress import Whole
from segmentation.checkpoints import read_checkpoint
from segmentation.evaluation import NotFiniteError, evaluate, mean, predict
from segmentation.files import fail, save_state, whole_file, write_json
from segmentation.methods import METHODS, PRETRAINING, Settings, Trainee
from segmentation.preparation import Entry, Recipe, augmentation, load_volumes
from segmentation.unetr import load_unetr

PROBE = "probe.safetensors"  # logits of the trained model for one volume, for comparison


@dataclass(frozen=True)
class Job:
    """One training, as it is passed to its process.

    Attributes:
        method: a key of METHODS; any other value means the pretraining of the demo.
        entries: volumes to train with.
        held_out: volumes that choose the best step.
        base: the checkpoint; None for random weights.
        folder: where all files go that the training writes.
        whole: the program of which this is a stage.
        resume: go on where an earlier training in ``folder`` stopped.
    """

    method: str
    seed: int
    recipe: Recipe
    settings: Settings
    entries: list[Entry]
    held_out: list[Entry]
    base: Path | None
    folder: Path
    whole: Whole
    resume: bool = False

    @property
    def best(self) -> Path:
        """What was trained, at the check with the best Dice."""
        return self.folder / f"{self.method}.safetensors"

    @property
    def last(self) -> Path:
        """What was trained, at the last check."""
        return self.folder / f"{self.method}_last.safetensors"

    @property
    def state(self) -> Path:
        """All that is needed to go on; it is removed once the training is done."""
        return self.folder / f"{self.method}_state.pt"

    @property
    def report(self) -> Path:
        """The report of a training that is done."""
        return self.folder / f"{self.method}.json"

    def facts(self) -> dict[str, Any]:
        """What must be the same for a training to go on, in plain values."""
        sizes = [
            [str(name), Path(name).stat().st_size]
            for entry in (*self.entries, *self.held_out)
            for key in ("image", "label")
            for name in (entry[key] if isinstance(entry[key], list) else [entry[key]])
        ]
        settings = asdict(self.settings)
        facts = {
            **{
                name: value for name, value in settings.items() if name not in ("device", "threads")
            },
            "seed": self.seed,
            "recipe": self.recipe.as_metadata(),
            "files": sizes,
            "pretrained": None if self.base is None else _digest(self.base),
        }
        return json.loads(json.dumps(facts))


@dataclass
class Report:
    """What a training reports."""

    parameters: int = 0
    seconds_per_step: float = 0.0
    megabytes: float = 0.0
    best_step: int = 0
    loss: list[float] = field(default_factory=list)
    dice: dict[int, float] = field(default_factory=dict)  # step -> mean on held-out volumes
    core_norm: dict[str, list[float]] = field(default_factory=dict)  # stack -> norm at each step
    grad_norm: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def of_json(cls, facts: dict[str, Any]) -> Report:
        """The report that was written; JSON has no nan, and its keys are strings."""
        dice = {int(step): float("nan") if v is None else v for step, v in facts["dice"].items()}
        return cls(**{**facts, "dice": dice})


def in_own_process(job: Job) -> Report:
    """Trains in a fresh process, so that the peak memory is only that of this training."""
    if job.resume and job.report.is_file():
        kept = json.loads(job.report.read_text())
        _check_same(job, kept["facts"], job.facts())
        job.whole.skip(job.settings.steps * METHODS[job.method].seconds)
        print(f"{METHODS[job.method].label}: done in an earlier run, {job.report}")
        return Report.of_json(kept["report"])
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run_and_send, args=(job, sender), daemon=True)
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        process.join()
        wanted = "a process that ends by itself"
        fail("training", wanted, f"one that ended with {process.exitcode}; -9 is a lack of memory")
    except KeyboardInterrupt:
        process.terminate()
        raise
    finally:
        process.join()
    if isinstance(result, str):
        raise SystemExit(result)
    report, whole = result
    job.whole.follow(whole)
    return report


def _run_and_send(job: Job, sender: Any) -> None:
    """What the process of a training does. Its parent alone listens to interrupts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that temporary files go
    try:
        sender.send(run_job(job))
    except SystemExit as end:
        sender.send(str(end))
    except OSError as error:
        sender.send(f"{job.folder}: expected to be written, got {error}")


def run_job(job: Job) -> tuple[Report, Whole]:
    """Trains, and writes what was trained; returns the report and the progress so far."""
    if job.settings.threads is not None:
        torch.set_num_threads(job.settings.threads)
    job.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(job.seed)
    model = job.recipe.architecture.build()
    if job.base is not None:
        checkpoint = read_checkpoint(job.base, job.recipe.entry)
        model, _ = load_unetr(job.recipe.architecture, checkpoint, job.recipe.new_head)
    model.to(job.settings.device)
    trainee = Trainee(model, METHODS.get(job.method, PRETRAINING), job.settings, job.recipe)
    report = Training(job, trainee).run()
    return report, job.whole


def segmentation_loss() -> DiceCELoss:
    """Dice and cross entropy of logits and classes, the Dice without the background."""
    return DiceCELoss(softmax=True, to_onehot_y=True, include_background=False)


class Training:
    """Adam with batch size 1; learning rates are warmed up and annealed.

    Step k depends on the seed and on k alone, not on how many steps this process did before, so a
    training that goes on ends as it would have without the interruption.
    """

    def __init__(self, job: Job, trainee: Trainee) -> None:
        self.job, self.trainee, settings = job, trainee, job.settings
        self.volumes = load_volumes(job.recipe, job.entries)
        self.held_out = load_volumes(job.recipe, job.held_out)
        self.facts = job.facts()
        self.augment = augmentation(job.recipe, settings.mirror)
        generator = torch.Generator().manual_seed(job.seed)
        sampler = RandomSampler(self.volumes, num_samples=settings.steps, generator=generator)
        self.order = list(sampler)
        self.loss_of = segmentation_loss()
        self.optimizer = torch.optim.Adam(trainee.groups)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            [group["lr"] for group in trainee.groups],
            total_steps=max(settings.steps, 20),
            pct_start=0.1,
        )
        self.stacks = trainee.adapter.stacks if trainee.adapter is not None else {}
        self.report = Report(parameters=trainee.count())
        self.report.core_norm = {name: [] for name in self.stacks}
        self.report.grad_norm = {name: [] for name in self.stacks}
        self.seconds: list[float] = []
        self.step = 0
        self.good = self.best = trainee.snapshot()

    def run(self) -> Report:
        """Trains to the end, or until validation no longer improves."""
        job, settings, report = self.job, self.job.settings, self.report
        if job.resume and job.state.is_file():
            self._go_on()
        else:
            for stale in (job.report, job.state):
                stale.unlink(missing_ok=True)
        method, left = METHODS.get(job.method, PRETRAINING), settings.steps - self.step
        steps = job.whole.track(
            method.label,
            range(left),
            left,
            left * method.seconds,
            lambda: f"loss {statistics.fmean(self.report.loss[-20:]):.3f}",
        )
        self.trainee.model.train()
        parent = multiprocessing.parent_process()
        for _ in steps:
            if parent is not None and not parent.is_alive():
                raise SystemExit("the program that started this training was killed")
            self._one_step()
            if self.step % settings.validate_every == 0 or self.step == settings.steps:
                self._check()
                if self._has_waited_enough():
                    break
        report = self.report
        self._write_probe()
        report.seconds_per_step = statistics.median(self.seconds) if self.seconds else 0.0
        report.megabytes = peak_megabytes(settings.device)
        write_json(job.report, {"facts": self.facts, "report": asdict(report)})
        job.state.unlink(missing_ok=True)
        return report

    def _one_step(self) -> None:
        job, trainee, volume = self.job, self.trainee, self.volumes[self.order[self.step]]
        seed = 1_000_003 * job.seed + self.step
        torch.manual_seed(seed)
        self.augment.set_random_state(seed % 2**32)
        batch = self.augment({key: volume[key].clone() for key in ("image", "label")})
        image, label = (
            batch[key].as_tensor()[None].to(job.settings.device) for key in ("image", "label")
        )
        before = trainee.snapshot()
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.loss_of(trainee.model(image), label)
        loss.backward()
        gradients = [p.grad for group in trainee.groups for p in group["params"]]
        size = torch.nn.utils.get_total_norm([g for g in gradients if g is not None])
        for what, value in (("the loss", loss), ("the gradient", size)):
            if not torch.isfinite(value):
                reason = f"{what} of {volume['entry']['image']} is {value.item()}"
                self._stop(f"at step {self.step + 1}: {reason}")
        self.optimizer.step()
        self.report.loss.append(loss.item())  # waits for the device
        self.seconds.append(time.perf_counter() - start)
        self.schedule.step()
        self.good, self.step = before, self.step + 1
        for name, stack in self.stacks.items():
            assert stack.core.grad is not None
            self.report.core_norm[name].append(stack.core.norm().item())
            self.report.grad_norm[name].append(stack.core.grad.norm().item())

    def _check(self) -> None:
        """Scores the held-out volumes; writes what was trained, and how to go on."""
        job, report = self.job, self.report
        try:
            scores = evaluate(job.recipe, self.trainee.model, self.held_out, ("dice",))
        except NotFiniteError as error:
            self._stop(f"after step {self.step}: {error} is not finite")
        self.trainee.model.train()
        earlier = [dice for dice in report.dice.values() if dice == dice]
        dice = report.dice[self.step] = mean(scores["dice"])
        if not earlier or dice > max(earlier):
            report.best_step, self.best = self.step, self.trainee.snapshot()
            self.trainee.save(job.best)
        self.trainee.save(job.last)
        state = {
            "facts": json.dumps(self.facts),
            "report": json.dumps(asdict(report)),
            "step": self.step,
            "seconds": self.seconds,
            "trained": self.trainee.snapshot(),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }
        with whole_file(job.state) as fresh:
            save_state(state, fresh)

    def _go_on(self) -> None:
        """Takes up a training from its last check."""
        job = self.job
        state = torch.load(job.state, map_location=job.settings.device, weights_only=True)
        _check_same(job, json.loads(state["facts"]), self.facts)
        self.report = Report.of_json(json.loads(state["report"]))
        self.trainee.restore(state["trained"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.seconds, self.step, self.best = state["seconds"], state["step"], state["best"]
        self.good = self.trainee.snapshot()
        job.whole.skip(self.step * METHODS[job.method].seconds)
        print(f"{METHODS[job.method].label}: goes on after step {self.step}", flush=True)

    def _has_waited_enough(self) -> bool:
        """Whether the best check lies ``patience`` checks back."""
        checks = list(self.report.dice)
        patience = self.job.settings.patience
        return patience > 0 and len(checks) - 1 - checks.index(self.report.best_step) >= patience

    def _stop(self, reason: str) -> None:
        """Saves what was trained before the step that went wrong, and ends the program."""
        job, settings = self.job, self.job.settings
        self.trainee.restore(self.good)
        self.trainee.save(job.last)
        text = (
            f"{METHODS.get(job.method, PRETRAINING).label}: training stopped {reason}. What was "
            f"trained while all was finite is in {job.last}."
        )
        if self.report.dice:
            text += f" The best so far, of step {self.report.best_step}, is {job.best}."
        raise SystemExit(
            f"{text} If the volume is well, the learning rate is too large: --core-lr is "
            f"{settings.core_lr:g}, --decoder-lr {settings.decoder_lr:g}, --vit-lr "
            f"{settings.vit_lr:g}"
        )

    def _write_probe(self) -> None:
        """Writes logits of the best network for one volume, for `PROBE`."""
        self.trainee.restore(self.best)
        if self.job.method == "tcurlora":
            logits = predict(self.job.recipe, self.trainee.model, self.held_out[0]["image"])
            with whole_file(self.job.folder / PROBE) as fresh:
                save_file({"logits": logits.cpu().contiguous()}, fresh)


def peak_megabytes(device: str) -> float:
    """Peak memory of this process: on the GPU if it uses one, else resident memory."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.is_file():  # on Linux ru_maxrss starts at the parent's peak, but VmHWM does not
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS


def _check_same(job: Job, began: Any, now: Any, what: str = "") -> None:
    """Refuses to go on with anything else than what the training began with."""
    if began == now:
        return
    if isinstance(began, dict) and isinstance(now, dict) and began.keys() == now.keys():
        for name in began:
            _check_same(job, began[name], now[name], f"{what}{name} ")
    fail("--resume", f"{what}{began}, with which {job.folder}/{job.method} began", now)


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(2**22):
            digest.update(block)
    return digest.hexdigest()
