"""Every test starts from one seed, and uninitialised memory is full of NaN."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
    # Fills torch.empty, new_empty of the compiled library included, with NaN: an element that a
    # kernel forgets to write cannot pass for a zero.
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
