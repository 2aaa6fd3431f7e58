"""An adapter keeps its promises on the models of everybody: one function over all of them.

`families.check.check_family` says what the promises are. Families that stand for a way of using
layers are checked on every run, the others by ``make test-families``, which also has the libraries
that the other tests do not need.
"""

import importlib.util
import re

import pytest

import tcur_kernels as tcur
from families import hugging, others
from families.check import check_family

FAMILIES = [*others.families(), *hugging.families()]
#: Models warn of what is no concern of ours; this package may not.
QUIET = pytest.mark.filterwarnings("ignore", "error:::tcur_kernels")


def parameters(families):
    for family in families:
        marks = [] if family.often else [pytest.mark.families]
        yield pytest.param(family, id=f"{family.library}-{family.name}", marks=marks)


@pytest.fixture
def _offline(monkeypatch):
    """A model whose config would have it download something fails at once."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def need(family):
    if importlib.util.find_spec(family.library) is None:
        pytest.skip(f"{family.library} is not installed; make test-families has it")


@QUIET
@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize("family", parameters(FAMILIES))
def test_family(family):
    need(family)
    if family.refused:
        with pytest.raises(ValueError, match=family.refused):
            tcur.adapt(family.build(0), rank=4)
    else:
        check_family(family.build, family.inputs, smooth=family.smooth)


@QUIET
@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize("family", parameters(f for f in FAMILIES if f.compiles))
def test_compiled(family):
    need(family)
    check_family(family.build, family.inputs, ["compile"], smooth=family.smooth)


def test_every_type_of_transformers_is_checked_or_named():
    """A type that is neither called nor listed with a reason would be skipped silently."""
    pytest.importorskip("transformers")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    rows = hugging.rows()
    unknown = set(CONFIG_MAPPING.keys()) - set(rows)
    assert not unknown, f"run python -m families.survey {' '.join(sorted(unknown))}"
    assert all(bool(way) != bool(reason) for way, reason in rows.values())
    assert sum(bool(way) for way, _ in rows.values()) >= 200
    known = set(rows)
    for names in (hugging.OFTEN, hugging.COMPILED, hugging.REFUSED, hugging.JUMPING):
        assert set(names) <= known, set(names) - known
    assert all(re.compile(pattern) for pattern in hugging.REFUSED.values())
