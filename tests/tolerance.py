"""The error bounds of the suite: for an operator, a long sum, a composition, and for float64.

Let E(y) = ‖y - exact‖_F / ‖exact‖_F, where ``exact`` is computed in float64.

**One operator.** A kernel and plain torch at the same dtype form the same sums of the same products
and round the same number of results. They differ in the order of summation, and with it in how the
roundings add up. Both errors grow like eps * sqrt(terms), with constants that differ by less than
two for any sensible order, so

    E(kernel) <= 2 * E(torch at the same dtype) + 2 * eps + ORACLE

where eps belongs to the dtype of the result. The second term is there because torch's own error can
be zero by chance: for n3 = 1, or where a result is exact. ORACLE is the error of ``exact`` itself,
which is a float64 result like any other: sums of some hundreds of products, so sqrt(256) = 16 times
the float64 eps. It only matters to kernels that compute in float64.

**A long sum** over tokens, elements of a matrix or layers. Here the constants differ by more than
two: plain torch may add up its terms one after another, and its own error is then no yardstick.
What a kernel has to keep is derived from the sum itself (Higham and Mary, "A new approach to
probabilistic rounding error analysis", 2019). Let t_1 … t_m be the terms, u = eps / 2, and let s_j
be the partial sums that are formed, each of them rounded to (1 + δ_j) s_j. The error is Σ δ_j s_j.

* Roundings are independent and have no mean, so its variance is Σ E[δ_j²] s_j². A rounding is
  uniform in ±u 2^e for numbers from 2^e to 2^(e+1), and mantissas have logarithms that are uniform,
  so E[δ²] = u² / 3 · (1 / ln 2) ∫₁² m⁻³ dm = u² / (8 ln 2), and the root of it is `ROUNDING` u.
* The order of the terms has nothing to do with their values. A sum of n of the m terms then has
  E[s²] <= n/m · (Σ t² + (Σ t)²): it grows like √n for terms of either sign, and like n for terms of
  one. The sum of all n_j / m is the number of additions that a term goes through, on average.
* That is what a kernel can choose. Adding up blocks of b terms one after another and the blocks in
  a tree, a term goes through b/2 + log2(m/b) additions, m/2 of them without blocks. Promised is
  `BLOCK` = 256, as long as the chunks of tokens of the CPU kernels are. A product rounds once more.
* Where the factors of a term are sums themselves, z = x R̂ᵀ and p = dy Ĉ, and where transforms
  follow, each of these sums has its own number of additions, and they add up. Σ t² is then the sum
  of the squares of all products of factors, where the square of a factor that is a sum is its own
  plus those of its terms. Beside these sums are `BESIDE` roundings: of two spectra, of two roots of
  one, and of the scale.

So with d for the number of roundings that a term goes through, in the norm of all results,

    E(kernel) <= SIGMAS * ROUNDING * u * √d * √(Σ t² + ‖exact‖²) / ‖exact‖

and the bound is the smaller one of this and the one above. The norm is that of many numbers; if all
of their errors were one normal number, it would be beyond three times its own deviation with a
probability of 0.003. The error of a sum without blocks grows like √m instead and fails from some
ten thousand terms on, whatever torch's is (`test_tolerance.py`).

**A composition**: a layer with its base, a network, a training step. Here the roundings of one
operator go through all that follow, and may be amplified or cancelled. One run of plain torch says
little about that: the next order of summation, or another processor, gives another error. So plain
torch computes the composition several times, each time with all of its sums in another order
(`AnotherOrder`), and the largest of these errors takes the place of the one above:

    E(adapted) <= 2 * max over the orders of E(torch in this order) + 2 * eps + ORACLE

The orders are a sample of the errors that rounding leads to, and the adapted composition is one
more of the same kind. Nine orders are enough for most. But where the error has one component only,
all of them may be small by chance. `CHANCE` has the probability that a normally distributed error
exceeds twice the largest of the others. With nine it is too high for a suite with hundreds of
compositions that must pass on every processor. So what exceeds that bound is held to the largest of
ninety-nine orders. With every further component the probability falls steeply.

**Neither bound believes what it is given.** A float64 tensor that holds numbers of fp32 alone is a
result of fp32 and not exact. Plain torch must be right to half of its digits, or it computes
something else; and it must not call an operator of this package.

**The same mathematics.** By the same token two ways of computing one thing agree in half of their
digits (`same_mathematics`), or they compute two things.

**float64.** `assert_equal_in_float64` compares two results of float64. `PROMISE` is the error that
each precision promises to users. Decompositions, whose errors are those of their conditions, have
limits of their own, in their tests.
"""

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ORACLE = 16 * torch.finfo(torch.float64).eps

#: Root mean square of a rounding, in units of u = eps / 2: 1 / √(8 ln 2).
ROUNDING = 1 / math.sqrt(8 * math.log(2))
#: Terms that a kernel may add up one after another.
BLOCK = 256
#: Roundings of a term beside those of the sums that it goes through.
BESIDE = 5
#: How many standard deviations the error of a long sum may have.
SIGMAS = 3

#: Orders of summation that plain torch computes a composition in: its own, and some at random. The
#: second number is for what exceeds the bound of the first.
ORDERS = (9, 99)
#: Probability that a normal number is more than twice as far from 0 as each of so many others.
CHANCE = (0.0062, 3.4e-6)

#: Of two evaluations in float64 by different formulas. Compositions that make an error of eps up to
#: a million times larger stay below it; a wrong formula does not.
FLOAT64 = 1e-9

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
    """The bound of one operator; ``same_dtype`` is plain torch's result."""
    _check_exact(exact)
    return _bound(relative_error(same_dtype, exact), same_dtype.dtype)


def assert_close(actual, same_dtype, exact):
    """Asserts the bound of one operator, given plain torch's result at the same dtype."""
    _check(actual, bound(same_dtype, exact), exact)


def roundings_of_sum(terms):
    """How many roundings a term goes through, on average, in a sum of that many."""
    block = min(max(terms, 1), BLOCK)
    return 1 + block / 2 + math.log2(max(terms, 1) / block)


def bound_of_sum(exact, norm_of_terms, lengths):
    """The bound of a long sum in fp32, apart from what plain torch makes of it.

    Args:
        exact: the result in float64.
        norm_of_terms: √Σ t² over all terms of all results.
        lengths: of the sums that a term goes through, one after another.
    """
    _check_exact(exact)
    norm = float(exact.norm())
    if norm == 0:
        return ORACLE
    roundings = BESIDE + sum(map(roundings_of_sum, lengths))
    size = math.hypot(norm_of_terms, norm) / norm
    unit = torch.finfo(torch.float32).eps / 2
    return SIGMAS * ROUNDING * unit * math.sqrt(roundings) * size + ORACLE


def assert_sum_close(actual, same_dtype, exact, norm_of_terms, lengths):
    """Asserts the bound of a long sum in fp32: the smaller one of its own and an operator's."""
    limit = bound(same_dtype, exact)
    if same_dtype.dtype == torch.float32:
        limit = min(limit, bound_of_sum(exact, norm_of_terms, lengths))
    _check(actual, limit, exact)


def assert_composition_close(actual, plain, exact):
    """Asserts the bound of compositions.

    ``actual`` and ``exact`` are tensors, or tuples of them that are compared one by one; ``plain``
    is a function without arguments that returns the like, computed by plain torch in the dtype of
    ``actual``.
    """
    actual, exact = _as_tuple(actual), _as_tuple(exact)
    for wanted in exact:
        _check_exact(wanted)
    runs = []
    for count in ORDERS:
        runs += [_as_tuple(run(plain, seed)) for seed in range(len(runs), count)]
        largest = [max(relative_error(r[i], w) for r in runs) for i, w in enumerate(exact)]
        limits = [_bound(error, one.dtype) for error, one in zip(largest, runs[0], strict=True)]
        errors = [relative_error(a, w) for a, w in zip(actual, exact, strict=True)]
        if all(error <= limit for error, limit in zip(errors, limits, strict=True)):
            return
    for result, limit, wanted in zip(actual, limits, exact, strict=True):
        _check(result, limit, wanted)


def same_mathematics(actual, wanted):
    """Whether two results of one dtype agree in half of their digits.

    For tests of what is computed, with which weights and cores, and not of how exactly: if they do
    not, they are not the same mathematics.
    """
    assert actual.dtype == wanted.dtype, f"expected {wanted.dtype}, got {actual.dtype}"
    if actual.layout == torch.jagged:
        actual, wanted = actual.values(), wanted.values()
    return relative_error(actual, wanted) <= torch.finfo(actual.dtype).eps ** 0.5


def assert_equal_in_float64(actual, wanted):
    """Asserts that two results of float64 are the same but for what FLOAT64 allows."""
    for a, b in zip(_as_tuple(actual), _as_tuple(wanted), strict=True):
        assert a.dtype == b.dtype == torch.float64, f"expected float64, got {a.dtype}, {b.dtype}"
        error = relative_error(a, b)
        assert error <= FLOAT64, f"relative error {error:.3g} of float64 results"


def run(plain, seed):
    """What ``plain`` computes with its sums in order number ``seed``; 0 is torch's own order."""
    with _NoOperators(), AnotherOrder(seed):
        return plain()


class AnotherOrder(TorchDispatchMode):
    """Products of matrices, convolutions and sums add their terms in a random order."""

    def __init__(self, seed):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)
        self.is_changed = seed > 0

    def permuted(self, *tensors):
        """(tensor, dimension) pairs of one size there, each permuted alike."""
        tensor, dim = tensors[0]
        order = torch.randperm(tensor.shape[dim], generator=self.generator).to(tensor.device)
        return [_resolved(tensor).index_select(dim, order) for tensor, dim in tensors]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        args = list(args)
        if self.is_changed:
            self.change(func, args)
        return func(*args, **(kwargs or {}))

    def change(self, func, args):
        aten = torch.ops.aten
        if func in (aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default):
            a, b = args
            args[:2] = self.permuted((a, a.dim() - 1), (b, max(b.dim() - 2, 0)))
        elif func in (aten.addmm.default, aten.baddbmm.default, aten.addmv.default):
            _, a, b = args
            args[1:3] = self.permuted((a, a.dim() - 1), (b, max(b.dim() - 2, 0)))
        elif func is aten.convolution.default and args[8] == 1:  # groups
            is_transposed = args[6]
            args[:2] = self.permuted((args[0], 1), (args[1], 0 if is_transposed else 1))
        elif func in (aten.sum.dim_IntList, aten.mean.dim) and args[0].dim() > 0 and args[1]:
            args[:1] = self.permuted((args[0], args[1][0]))
        elif func in (aten.sum.default, aten.mean.default):
            args[:1] = self.permuted((args[0].flatten(), 0))


def _resolved(tensor):
    """Without the marks of conjugates and negatives, which nobody looks at within a mode."""
    if tensor.is_conj():
        tensor = tensor.conj().conj_physical()
    return tensor._neg_view().neg() if tensor.is_neg() else tensor


class _NoOperators(TorchDispatchMode):
    """What is compared with is plain torch."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.namespace != "tcur", f"plain: expected plain torch, got {func}"
        return func(*args, **(kwargs or {}))


def _bound(error_of_torch, dtype):
    eps = torch.finfo(dtype).eps
    assert error_of_torch <= eps**0.5, (
        f"plain torch is off by {error_of_torch:.3g}: it computes something else"
    )
    return 2 * error_of_torch + 2 * eps + ORACLE


def _check(actual, limit, exact):
    error = relative_error(actual, exact)
    assert error <= limit, f"relative error {error:.3g} exceeds the bound {limit:.3g}"


def _check_exact(exact):
    exact = exact.detach()
    assert exact.dtype == torch.float64, f"exact: expected float64, got {exact.dtype}"
    is_rounded = torch.equal(exact.float().double(), exact) and bool(exact.any())
    assert not is_rounded, "exact: expected a result of float64, got numbers of fp32"


def _as_tuple(results):
    return (results,) if isinstance(results, torch.Tensor) else tuple(results)
