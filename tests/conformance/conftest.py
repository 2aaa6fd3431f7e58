"""Parameters ``backend`` and ``case`` of the tests, from the tables."""

import pytest

from tcur_kernels.operators import native

from .backends import BACKENDS, absence, chosen, one_of_each_language


def pytest_generate_tests(metafunc):
    """Backends of the session that take a case, next to each other: they share what is expected.

    A test is marked with its cases, ``@pytest.mark.cases(...)``, and with ``once`` where the
    instruction set makes no difference.
    """
    if "backend" not in metafunc.fixturenames:
        return
    option = metafunc.config.getoption
    backends = chosen(option("--device"), option("--isa"))
    if metafunc.definition.get_closest_marker("once"):
        backends = one_of_each_language(backends)
    cases = metafunc.definition.get_closest_marker("cases")
    if cases is None:
        metafunc.parametrize("backend", backends, indirect=True, ids=str)
        return
    pairs = [
        pytest.param(case, backend, id=f"{case}-{backend}", marks=marks(case, backend))
        for case in cases.args[0]
        for backend in backends
        if backend.takes(case)
    ]
    metafunc.parametrize(("case", "backend"), pairs, indirect=["backend"])


def marks(case, backend):
    """Slow backends leave some cases out."""
    return pytest.mark.matrix if case.matrix and backend.few else ()


@pytest.fixture
def backend(request):
    """A backend that is here, with its instruction set in force."""
    reason = absence(request.param)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    if request.param.isa is None:
        yield request.param
        return
    before = native.chosen_isa()
    native.force(request.param.isa)
    yield request.param
    native.force(before)


@pytest.fixture(params=BACKENDS.values(), ids=str)
def known(request):
    """Every backend of the table, here or not."""
    return request.param
