"""For pytest in a checkout of peft: where a test is for VeRA too, it is run for tCUR instead.

VeRA stands for all methods on linear layers that share what they train between layers; GLoRA, where
a case has configs made for it, for those that take batches of several adapters, too. The lists of
cases that peft's tests are parametrized with are changed before tests are made of them, and what
is not for tCUR then is not run.
"""

import dataclasses
import os
import re
from pathlib import Path

import pytest
from _pytest.mark.structures import ParameterSet
from peft import GloraConfig, PeftConfig, VeraConfig

import tcur_kernels.peft as tcur
from peft_own_models import make_models

_FIELDS = {field.name for field in dataclasses.fields(tcur.TCURConfig)} | {"r"}

#: What VeRA cannot do, in the lists of `test_custom_models`: two models of linear layers, and more
#: than one adapter with other targets.
_MORE = {
    "TEST_CASES": [
        (f"{model} {number} TCUR", model, tcur.TCURConfig, settings)
        for model, cases in {
            "MLP": (
                {"target_modules": "lin0"},
                {"target_modules": ["lin0"], "r": 1},
                {"target_modules": ["lin1"]},
                {"target_modules": ["lin0", "lin1"]},
                {"target_modules": ["lin0", "lin1"], "exclude_modules": ["lin1"]},
                {"target_modules": ["lin0", "lin1"], "stacks": "layer", "alpha": 0.5},
                {"target_modules": ["lin0"], "modules_to_save": ["lin1"], "mode": "factored"},
                {"target_modules": ["lin0", "lin1"], "selection": "deim"},
            ),
            "MLP2": (
                {"target_modules": ["lin0", "lin1"]},
                {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
            ),
            "MLP_LayerNorm": ({"target_modules": ["lin0"]},),
            "Conv2d": ({"target_modules": ["lin0"]},),
        }.items()
        for number, settings in enumerate(cases, 1)
    ],
    "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": [
        (
            f"TCUR {kind}", "tcur", tcur.TCURConfig,
            {"target_modules": ["lin0"], "init_weights": False, "rank": 2},
            {"target_modules": [second], "init_weights": False, "rank": 2, "alpha": 0.5},
        )
        for kind, second in (("Same", "lin0"), ("Different", "lin1"))
    ],
}  # fmt: skip

_seen = set()


def _small_by_default(self, r, checked=tcur.TCURConfig.__post_init__):
    """The default rank exceeds the widths of peft's toy models, which tCUR refuses."""
    if self.rank is None and r is None:
        self.rank = 2
    checked(self, r)


def pytest_configure(config):
    tcur.TCURConfig.__post_init__ = _small_by_default
    names = set()
    for path in Path(config.rootpath, "tests").glob("*.py"):
        names |= set(re.findall(r"[\"']([\w-]+/[\w.-]+)[\"']", path.read_text()))
    make_models(sorted(names), Path(os.environ["HF_HOME"], "hub"))


class _Everything(dict):
    """For peft, all models of the hub have been asked for before: it stays offline."""

    def __contains__(self, name):
        return True

    def __missing__(self, name):
        return 0


def pytest_pycollect_makeitem(collector, name, obj):
    if not isinstance(collector, pytest.Module) or id(collector.obj) in _seen:
        return
    module = collector.obj
    _seen.add(id(module))
    more = {id(getattr(module, name, None)): cases for name, cases in _MORE.items()}
    for owner in [module, *(v for v in vars(module).values() if isinstance(v, type))]:
        for function in vars(owner).values():
            marks = getattr(function, "pytestmark", None)
            if isinstance(marks, list):
                marks[:] = [_mark_for_tcur(mark, more) for mark in marks]
    for settings in vars(module).values():
        if isinstance(settings, dict) and any(_mentions(v, VeraConfig) for v in settings.values()):
            kept = {k: _for_tcur(v) for k, v in settings.items() if _mentions(v, VeraConfig)}
            settings.clear()
            settings.update(kept)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    kept, dropped = [], []
    for item in items:
        parameters = getattr(item, "callspec", None)
        values = () if parameters is None else parameters.params.values()
        is_ours = any(_mentions(value, tcur.TCURConfig) for value in values)
        (kept if is_ours else dropped).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)


@pytest.fixture(autouse=True)
def _offline_and_supported(monkeypatch):
    from tests import testing_common, testing_utils

    monkeypatch.setattr(testing_utils, "_HUB_MODEL_ACCESSES", _Everything())
    # A list of the methods that take Conv1D layers: this one does.
    monkeypatch.setattr(testing_common, "_skip_if_conv1d_not_supported", lambda *_: None)


def _mark_for_tcur(mark, more):
    """A mark, parametrized with the cases for tCUR if it is with configs of methods."""
    if mark.name != "parametrize" or len(mark.args) != 2:
        return mark
    names, values = mark.args
    if not isinstance(values, list | tuple) or not any(_mentions(v, PeftConfig) for v in values):
        return mark
    cases = [_for_tcur(value) for value in values if _is_like_ours(value)]
    kwargs = {key: value for key, value in mark.kwargs.items() if key != "ids"}
    return pytest.mark.parametrize(names, [*cases, *more.get(id(values), ())], **kwargs).mark


def _mentions(value, kind):
    """Whether a case is about configs of a kind."""
    if isinstance(value, type):
        return issubclass(value, kind)
    if isinstance(value, ParameterSet):
        return _mentions(value.values, kind)
    if isinstance(value, tuple | list):
        return any(_mentions(each, kind) for each in value)
    return isinstance(value, kind)


def _is_like_ours(value):
    """Whether a case is one of a method that tCUR does as much as."""
    if isinstance(value, ParameterSet | tuple | list):
        return any(map(_is_like_ours, value.values if isinstance(value, ParameterSet) else value))
    return value is VeraConfig or isinstance(value, VeraConfig | GloraConfig)


def _for_tcur(value):
    """The same case for tCUR."""
    if value is VeraConfig:
        return tcur.TCURConfig
    if isinstance(value, VeraConfig | GloraConfig):
        left = ("peft_type", "r")
        settings = {k: v for k, v in value.to_dict().items() if k in _FIELDS and k not in left}
        return tcur.TCURConfig(**settings)
    if isinstance(value, ParameterSet):
        return ParameterSet(_for_tcur(value.values), value.marks, value.id)
    if isinstance(value, dict):
        return {key: own for key, own in value.items() if key in _FIELDS}
    if isinstance(value, tuple | list):
        made = type(value)(map(_for_tcur, value))
        for settings in made:
            if "EmbConv1D" in value and isinstance(settings, dict):
                # One number, which three small steps train.
                settings.update(rank=1, alpha=30.0, basis="slices")
        return made
    if isinstance(value, str):
        return re.sub("vera|glora", "TCUR", value, flags=re.IGNORECASE)
    return value
