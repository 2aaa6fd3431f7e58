"""The one error bound of the suite.

Let E(y) = ‖y - exact‖_F / ‖exact‖_F with ``exact`` computed in float64. A kernel and plain torch at
the same dtype form the same sums of the same products and round the same number of results; they
differ in the order of summation, and with it in how the roundings add up. Both errors grow like
eps * sqrt(terms), with constants that differ by less than two for any sensible order, so

    E(kernel) <= 2 * E(torch at the same dtype) + 2 * eps + ORACLE

where eps belongs to the dtype of the result. The second term is there because torch's own error can
be zero by chance: for n3 = 1, or where a result is exact. ORACLE is the error of ``exact`` itself,
which is a float64 result like any other: sums of some hundreds of products, so sqrt(256) = 16 times
the float64 eps. It only matters to kernels that compute in float64. No other tolerance stands in
the suite, except the promises per precision below, which users rely on.
"""

import torch

ORACLE = 16 * torch.finfo(torch.float64).eps

#: Error of the update C * U * R, relative to its norm, that each precision promises.
PROMISE = {"ieee": 1e-6, "tf32": 1e-3, "bf16": 6e-3}


def relative_error(actual, exact):
    """‖actual - exact‖ / ‖exact‖ in float64; infinite for anything that is not finite."""
    actual, exact = actual.detach().double(), exact.detach().double()
    assert actual.shape == exact.shape, (actual.shape, exact.shape)
    error, norm = (actual - exact).norm(), exact.norm()
    if not torch.isfinite(error):
        return float("inf")
    return float(error / norm) if norm > 0 else float(error)


def bound(same_dtype, exact):
    """The right-hand side above; ``same_dtype`` is plain torch's result."""
    eps = torch.finfo(same_dtype.dtype).eps
    return 2 * relative_error(same_dtype, exact) + 2 * eps + ORACLE


def assert_close(actual, same_dtype, exact):
    """Asserts the bound for ``actual``, given plain torch's result at the same dtype."""
    error, limit = relative_error(actual, exact), bound(same_dtype, exact)
    assert error <= limit, f"relative error {error:.3g} exceeds the bound {limit:.3g}"
