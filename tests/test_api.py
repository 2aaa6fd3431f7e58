"""What is public is listed, documented, and the page of it is that of the docstrings."""

import importlib
import importlib.util
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
MODULES = ("tcur_kernels", "tcur_kernels.decompose", "tcur_kernels.peft")


@pytest.fixture
def api():
    spec = importlib.util.spec_from_file_location("api", DOCS / "api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_that_of_the_docstrings(api):
    assert api.page() == api.PAGE.read_text(encoding="utf-8"), "run python docs/api.py"


def test_all_that_is_public_is_listed(api):
    """No other name of ours can be had from the package by a star, or by accident."""
    assert tuple(api.MODULES) == MODULES
    for name in MODULES:
        module = importlib.import_module(name)
        assert sorted(module.__all__) == sorted(set(module.__all__))
        star = {}
        exec(f"from {name} import *", star)
        assert set(module.__all__) <= star.keys()
        for public in module.__all__:
            value = getattr(module, public)
            assert value.__doc__, public


def test_all_that_is_public_has_types_for_its_arguments(api):
    assert "inspect._empty" not in api.page()
