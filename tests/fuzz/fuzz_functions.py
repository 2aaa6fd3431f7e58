"""Calls of public functions: of the t-product, of the operators by their names, of decompositions.

`fuzz_models` has those of layers and models. What is right is computed in float64 by the formula of
the mathematics, never by the function itself.
"""

import functools

import torch

import fuzz_models
import oracle
import plain
import tcur_kernels as tcur
from fuzz_draw import CONTEXTS, LAYOUTS, WITHOUT_GRADIENTS, contiguous, wrong_value
from fuzz_judge import (
    Call,
    Wrong,
    expect_close,
    expect_like,
    is_of_few,
    is_small,
    renewed,
    tensors_in,
    upstream,
)
from tcur_kernels import decompose
from tcur_kernels.operators import functional
from tolerance import relative_error

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = (F32, F32, F64, BF16, F16)
SLICES = (1, 1, 2, 3, 4, 5, 7, 8, 12, 13, 16, 31)
AXES = (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33)


def make(draw, name=None):
    """A call of a public function."""
    name = name or draw.one_of(*FUNCTIONS, *fuzz_models.FUNCTIONS)
    made = {**FUNCTIONS, **fuzz_models.FUNCTIONS}[name](draw)
    draw.note(name, {k: _told(v) for k, v in made.given.items()})
    context = "none"
    if made.in_contexts and draw.chance(0.5):
        context = draw.one_of(*CONTEXTS)
    draw.note("in", context)
    is_wrong = draw.chance(0.35)
    if is_wrong:
        argument = draw.one_of(*sorted(made.given))
        draw.note("wrong", argument)
        made.given[argument] = wrong_value(draw, made.given[argument])
    wanted = () if is_wrong or context in WITHOUT_GRADIENTS or draw.chance(0.5) else made.wanted
    one = Attempt(made, wanted, is_wrong)
    given = [value for key, value in made.given.items() if key != "out"]
    return Call(
        name=name,
        backend="functions",
        run=one.run,
        judge=one.judge,
        inputs=tensors_in(given),
        is_public=True,
        refusable=is_wrong or made.refusable,
        context=CONTEXTS[context],
        text=" ".join(draw.text),
        again=made.again,
    )


def _told(value):
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype)[6:]}{list(value.shape)}{list(value.stride())}"
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor):
        return [_told(each) for each in value[:2]]
    return value if isinstance(value, (int, float, str, bool, type(None))) else type(value).__name__


class Made:
    """A call before anything of it is wrong.

    Attributes:
        function: what is called, with ``given`` as keywords.
        judge: takes results and arguments; raises if they are not right.
        exact: the mathematics, of arguments of any dtype; compared by the bound.
        wanted: arguments whose gradients may be asked for.
    """

    def __init__(self, function, given, exact=None, judge=None, wanted=(), **how):
        self.function, self.given, self.exact, self.check = function, given, exact, judge
        self.wanted = wanted
        self.in_contexts = how.pop("in_contexts", True)
        self.refusable = how.pop("refusable", False)
        self.again = how.pop("again", True)
        self.own = how.pop("own", {})
        assert not how, how


class Attempt:
    """A call with what is known of it."""

    def __init__(self, made, wanted, is_wrong):
        self.made, self.wanted, self.is_wrong = made, wanted, is_wrong
        # Kept as they are now, because the fuzzer looks whether a call changes them.
        self.given = made.given

    def run(self):
        return self.results(self.made.function, self.given)

    def results(self, function, given):
        if not self.wanted:
            return function(**given)
        leaves = {name: given[name].detach().requires_grad_() for name in self.wanted}
        y = function(**{**given, **leaves})
        if not y.requires_grad:
            raise Wrong("the result does not require grad")
        with torch.autocast("cpu", enabled=False):  # as torch asks for of every backward pass
            found = torch.autograd.grad(y, [*leaves.values()], upstream(y))
        return (y.detach(), *found)

    def judge(self, found):
        if self.is_wrong:
            for each in tensors_in(found):
                if each.is_floating_point() and each.device.type == "cpu" and is_small(each):
                    self.is_sensible(each)
            return
        if self.made.check is not None:
            self.made.check(found, self.given)
            return
        results = found if isinstance(found, tuple) else (found,)
        same, exact = self.in_plain_torch(None), self.in_plain_torch(F64)
        for index, (one, like, wide) in enumerate(zip(results, same, exact, strict=True)):
            expect_like(one, like, is_contiguous=index == 0)
            again = functools.partial(self.again, index)
            fresh = functools.partial(self.fresh, index) if is_of_few(one, self.given) else None
            expect_close(one, like, wide, again, fresh)

    def fresh(self, index):
        """One of the results for other numbers: of the function, by torch, and in float64."""

        def other(name, value):
            if isinstance(value, list):
                return [other(name, each) for each in value]
            is_number = isinstance(value, torch.Tensor) and value.is_floating_point()
            if not is_number or name == "out":
                return value
            return renewed(value)

        kept, self.given = self.given, {n: other(n, v) for n, v in self.given.items()}
        try:
            results = (self.run(), self.in_plain_torch(None), self.in_plain_torch(F64))
            return [(each if isinstance(each, tuple) else (each,))[index] for each in results]
        finally:
            self.given = kept

    def again(self, index):
        return self.in_plain_torch(None)[index]

    def in_plain_torch(self, dtype):
        """The mathematics at the dtypes of the call, or of its numbers in another dtype."""

        def cast(value):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                value = value.detach().clone(memory_format=torch.contiguous_format)
                return value if dtype is None else value.to(dtype)
            if isinstance(value, (list, tuple)):
                return [cast(each) for each in value]
            return dtype if isinstance(value, torch.dtype) and dtype is not None else value

        found = self.results(self.made.exact, {k: cast(v) for k, v in self.given.items()})
        return found if isinstance(found, tuple) else (found,)

    def is_sensible(self, result):
        """What was taken although an argument is odd gives numbers where all arguments do."""
        given = [t for t in tensors_in(list(self.given.values())) if t.is_floating_point()]
        numbers = [v for v in self.given.values() if isinstance(v, float)]
        is_finite = all(bool(t.isfinite().all()) for t in given if t.device.type == "cpu")
        if not is_finite or any(v != v or abs(v) > 1e6 for v in numbers):
            return
        if result.dtype in (F32, F64) and not bool(result.isfinite().all()):
            raise Wrong("a result that is not finite of arguments that are")


# -- arguments


def tensor(draw, *shape, dtype):
    """Random numbers, somewhere in memory."""
    made = torch.randn(*shape, dtype=F64).to(dtype)
    return draw.one_of(*LAYOUTS)(made) if draw.chance(0.5) else contiguous(made)


def sizes(draw):
    n3, n1, n2 = draw.one_of(*SLICES), draw.one_of(*AXES), draw.one_of(*AXES)
    return n3, n1, n2


def wide(dtype):
    """The dtype that half precisions are computed in."""
    return F32 if dtype in (BF16, F16) else dtype


# -- the t-product


def t_product(draw):
    (n3, n1, p), n2, dtype = sizes(draw), draw.one_of(*AXES), draw.one_of(*DTYPES)
    a, b = tensor(draw, n3, n1, p, dtype=dtype), tensor(draw, n3, p, n2, dtype=dtype)

    def exact(a, b):
        if a.dtype == F64:
            return _circular(a, b)
        x, y = (torch.fft.rfft(t.to(wide(a.dtype)), dim=0) for t in (a, b))
        return torch.fft.irfft(x @ y, n=len(a), dim=0).contiguous().to(a.dtype)

    return Made(tcur.t_product, {"a": a, "b": b}, exact, wanted=("a", "b"))


def _circular(a, b):
    """The t-product by its definition, differentiable."""
    n3, n1, _ = a.shape
    return (oracle.bcirc(a) @ b.reshape(-1, b.shape[2])).reshape(n3, n1, b.shape[2])


def t_transpose(draw):
    a = tensor(draw, *sizes(draw), dtype=draw.one_of(*DTYPES))

    def judge(found, given):
        expect_like(found, oracle.t_transpose(given["a"]))
        if not torch.equal(found, oracle.t_transpose(given["a"])):
            raise Wrong("not the t-transpose")

    return Made(tcur.t_transpose, {"a": a}, judge=judge)


def t_identity(draw):
    n, n3, dtype = draw.one_of(1, 2, 5, 17), draw.one_of(*SLICES), draw.one_of(*DTYPES, None)
    given = {"n": n, "n3": n3, "dtype": dtype, "device": draw.one_of("cpu", "meta")}

    def judge(found, given):
        expect_like(found, torch.empty(n3, n, n, dtype=dtype))
        if found.device.type == "cpu":
            wanted = torch.cat([torch.eye(n)[None], torch.zeros(n3 - 1, n, n)]).to(found)
            if not torch.equal(found, wanted):
                raise Wrong("not the identity")

    return Made(tcur.t_identity, given, judge=judge)


def t_pinv(draw):
    n3, n1, n2 = sizes(draw)
    dtype = draw.one_of(F32, F64, F32, BF16)
    a = tensor(draw, n3, n1, 2 * n1 + 1 if draw.chance(0.7) else n2, dtype=dtype)
    rtol = 1e-3 if dtype == BF16 else draw.one_of(None, 1e-5)

    def judge(found, given):
        a = given["a"]
        expect_like(found, a.new_empty(len(a), a.shape[2], a.shape[1]))
        spectrum = torch.fft.fft(a.double(), dim=0)
        values = torch.linalg.svdvals(spectrum)
        if float(values.min() / values.max()) < 0.02:  # as exact as its condition allows
            return
        wanted = torch.fft.ifft(torch.linalg.pinv(spectrum), dim=0).real
        if relative_error(found, wanted) > torch.finfo(dtype).eps ** 0.5:
            raise Wrong(f"relative error {relative_error(found, wanted):.3g}")

    return Made(tcur.t_pinv, {"a": a, "rtol": rtol}, judge=judge)


def t_svd(draw):
    dtype = draw.one_of(*DTYPES)
    a = tensor(draw, *sizes(draw), dtype=dtype)

    def judge(found, given):
        u, s, v = (each.double() for each in found)
        again = _circular(_circular(u, s), oracle.t_transpose(v))
        half = torch.finfo(dtype).eps ** 0.5
        if relative_error(again, given["a"].double()) > half:
            raise Wrong("u * s * vᵀ is not a")
        unit = _circular(oracle.t_transpose(u), u)
        if relative_error(unit, tcur.t_identity(u.shape[2], len(u), F64, "cpu")) > half:
            raise Wrong("u is not isometric")

    return Made(tcur.t_svd, {"a": a}, judge=judge)


def _ranked(draw):
    """A tensor of a known tubal rank, with singular values of one: no other rank is near."""
    (n3, n1, n2), dtype = sizes(draw), draw.one_of(F32, F64)
    rank = draw.randrange(0, min(n1, n2) + 1)
    if rank == 0:
        return torch.zeros(n3, n1, n2, dtype=dtype), rank
    sides = (torch.randn(n3, size, rank, dtype=F64) for size in (n1, n2))
    left, right = (torch.linalg.qr(torch.fft.rfft(side, dim=0)).Q for side in sides)
    a = torch.fft.irfft(left @ right.mH, n=n3, dim=0)
    return contiguous(a.to(dtype)), rank


def multirank(draw):
    a, rank = _ranked(draw)

    def judge(found, given):
        wanted = torch.full((len(a),), rank)
        if found.dtype != torch.int64 or not torch.equal(found, wanted):
            raise Wrong(f"{found.tolist()} of rank {rank}")

    return Made(tcur.multirank, {"a": a, "rtol": 1e-5}, judge=judge)


def tubal_rank(draw):
    a, rank = _ranked(draw)

    def judge(found, given):
        if found != rank:
            raise Wrong(f"{found} of rank {rank}")

    return Made(tcur.tubal_rank, {"a": a, "rtol": 1e-5}, judge=judge)


# -- operators by their public names


def _factors(draw, n3, n1, n2):
    """Factors, a core for them, and the backend that is asked for."""
    dtype, rank = draw.one_of(F32, F32, F64, BF16), draw.randrange(1, min(n1, n2, 8) + 1)
    lateral = tensor(draw, n3, n1, rank, dtype=dtype)
    horizontal = tensor(draw, n3, rank, n2, dtype=dtype)
    basis = "orthonormal" if draw.chance(0.2) else "slices"
    factors = tcur.CURFactors(lateral, horizontal, basis)
    core = tensor(draw, n3, rank, rank, dtype=factors.dtype)
    return factors, core, draw.one_of("auto", "reference", "cpu")


def _product(factors, core):
    """C * U * R at the dtype of a core."""
    sides = [side.to(core.dtype) for side in (factors.lateral, factors.horizontal)]
    return plain.product(sides[0], core, sides[1])


def cur_product(draw):
    factors, core, backend = _factors(draw, *sizes(draw))

    def exact(factors, core, backend):
        return _product(factors, core).contiguous()

    given = {"factors": factors, "core": core, "backend": backend}
    return Made(tcur.cur_product, given, exact, wanted=("core",))


def materialize(draw):
    n3, n1, n2 = sizes(draw)
    factors, core, backend = _factors(draw, n3, n1, n2)
    dtypes = (F32, BF16, F16, F64) if factors.dtype == F64 else (F32, BF16, F16)
    weight = tensor(draw, n3, n1, n2, dtype=draw.one_of(*dtypes))
    if draw.chance(0.5):
        weight = [tensor(draw, n1, n2, dtype=weight.dtype) for _ in range(n3)]
    given = {"weight": weight, "factors": factors, "core": core, "backend": backend}
    given |= {"scale": draw.one_of(0.5, 0.0, -2.0, 1), "out_dtype": draw.one_of(None, *dtypes)}
    into = draw.chance(0.3)
    if into:
        dtype = given.pop("out_dtype") or (weight[0] if isinstance(weight, list) else weight).dtype
        given["out"] = torch.empty(n3, n1, n2, dtype=dtype)

    def exact(weight, factors, core, scale, backend, out_dtype=None, out=None):
        stacked = torch.stack(weight) if isinstance(weight, list) else weight
        w_eff = stacked.to(core.dtype) + scale * _product(factors, core)
        dtype = stacked.dtype if out_dtype is None else out_dtype
        return w_eff.to(dtype if out is None else out.dtype).contiguous()

    return Made(tcur.materialize, given, exact, wanted=() if into else ("core",))


def _layer(draw):
    n3, n1, n2 = sizes(draw)
    factors, core, backend = _factors(draw, n3, n1, n2)
    first = draw.randrange(n3)
    slices = draw.randrange(1, min(n3 - first, 3) + 1)
    leading = draw.one_of((), (0,), (1,), (3,), (2, 5), (2, 0), (70,))
    return factors, core, backend, first, slices, leading, (n1, n2)


def cur_linear(draw):
    factors, core, backend, first, slices, leading, (n1, n2) = _layer(draw)
    dtype = draw.one_of(F32, F64) if factors.dtype == F64 else F32
    given = {"x": tensor(draw, *leading, n2, dtype=dtype), "factors": factors, "core": core}
    given |= {"weight": tensor(draw, slices * n1, n2, dtype=dtype), "backend": backend}
    given |= {"bias": draw.one_of(None, tensor(draw, slices * n1, dtype=dtype))}
    given |= {"slice_index": first, "scale": draw.one_of(0.5, -1.0, 2)}
    if draw.chance(0.3) and leading:
        cores = draw.one_of(1, 2, 4)
        given["adapter_ids"] = torch.randint(cores, (leading[0],))
        given["core"] = tensor(draw, cores, *core.shape, dtype=core.dtype)
    elif draw.chance(0.3):
        given["dense_grad"] = True

    def exact(x, factors, core, weight, backend, bias, slice_index, scale, adapter_ids=None,
              dense_grad=False):  # fmt: skip
        y = torch.nn.functional.linear(x, weight, bias)
        cores = core[None] if adapter_ids is None else core
        last = slice_index + slices
        each = [_product(factors, one)[slice_index:last].reshape(-1, n2) for one in cores]
        if adapter_ids is None:
            update = x.to(core.dtype) @ each[0].mT
        else:
            updates = torch.stack(each)[adapter_ids]
            rows = x.to(core.dtype).reshape(len(adapter_ids), x[:1].numel() // n2, n2)
            update = (rows @ updates.mT).reshape(y.shape)
        return (y.to(update.dtype) + scale * update).to(x.dtype)

    return Made(tcur.cur_linear, given, exact, wanted=("x", "core"))


def update_linear(draw):
    factors, core, backend, first, slices, leading, (n1, n2) = _layer(draw)
    transposed = draw.chance(0.5)
    dtype = draw.one_of(F32, F64) if factors.dtype == F64 else F32
    x = tensor(draw, *leading, slices * n1 if transposed else n2, dtype=dtype)
    given = {"x": x, "factors": factors, "core": core, "slice_index": first, "slices": slices}
    given |= {"scale": 0.5, "backend": backend, "transposed": transposed}

    def exact(x, factors, core, slice_index, slices, scale, backend, transposed):
        w = _product(factors, core)[slice_index : slice_index + slices].reshape(-1, n2)
        return (scale * (x.to(core.dtype) @ (w if transposed else w.mT))).to(x.dtype)

    return Made(functional.update_linear, given, exact, wanted=("x", "core"))


def slice_update(draw):
    factors, core, backend, first, slices, _, (_, n2) = _layer(draw)
    given = {"factors": factors, "core": core, "slice_index": first, "slices": slices}
    given |= {"scale": 0.5, "backend": backend}

    def exact(factors, core, slice_index, slices, scale, backend):
        last = slice_index + slices
        return scale * _product(factors, core)[slice_index:last].reshape(-1, n2)

    return Made(functional.slice_update, given, exact, wanted=("core",))


def project(draw):
    factors, _, _, _, _, leading, (_, n2) = _layer(draw)
    x = tensor(draw, *leading, n2, dtype=factors.dtype)

    def exact(x, factors):
        return x @ factors.horizontal_hat.to(x.dtype).T

    return Made(functional.project, {"x": x, "factors": factors}, exact, wanted=("x",))


def curfactors(draw):
    (n3, n1, n2), dtype = sizes(draw), draw.one_of(*DTYPES)
    rank = draw.randrange(1, min(n1, n2) + 1)
    lateral = tensor(draw, n3, n1, rank, dtype=dtype)
    horizontal = tensor(draw, n3, rank, n2, dtype=dtype)
    basis = draw.one_of("slices", "orthonormal")

    def judge(found, given):
        for hat in found[:2]:
            if hat.dtype != torch.promote_types(dtype, F32) or not bool(hat.isfinite().all()):
                raise Wrong(f"spectrum in {hat.dtype}, finite: {bool(hat.isfinite().all())}")
        if basis == "slices" and not torch.equal(found[2], lateral):
            raise Wrong("C is not what was given")

    def function(lateral, horizontal, basis):
        made = tcur.CURFactors(lateral, horizontal, basis)
        return made.lateral_hat, made.horizontal_hat, made.lateral

    given = {"lateral": lateral, "horizontal": horizontal, "basis": basis}
    return Made(function, given, judge=judge)


# -- decompositions


def _cur_arguments(draw, a, most):
    given = {
        "a": a,
        "rank": draw.randrange(1, most + 1),
        "selection": draw.one_of(*decompose.RULES),
    }
    given["core"] = draw.one_of(*decompose.CORES)
    return given


def _judge_cur(found, given, a):
    """C and R are slices of ``a``; the core is finite; a projection is no worse than nothing."""
    if bool((found.columns.diff() <= 0).any()) or bool((found.rows.diff() <= 0).any()):
        raise Wrong("indices that do not ascend")
    if not torch.equal(found.lateral, a[..., found.columns]):
        raise Wrong("C is not made of lateral slices")
    if not torch.equal(found.horizontal, a[..., found.rows, :]):
        raise Wrong("R is not made of horizontal slices")
    if not bool(found.core.isfinite().all()):
        raise Wrong("a core that is not finite")
    error = found.relative_error(a)
    limit = 1 + 8 * torch.finfo(a.dtype).eps * a.numel()
    if given["core"] == "projection" and not error <= limit:
        raise Wrong(f"error {error} of a projection")
    is_whole = len(found.columns) == a.shape[-1] and len(found.rows) == a.shape[-2]
    if is_whole and given["core"] != "zero" and error > torch.finfo(a.dtype).eps ** 0.5:
        raise Wrong(f"error {error} with all rows and columns")
    if given["core"] == "zero" and bool(found.core.any()):
        raise Wrong("a core that is not zero")


def tensor_cur(draw):
    a = tensor(draw, *sizes(draw), dtype=draw.one_of(*DTYPES))
    given = _cur_arguments(draw, a, min(a.shape[1:]))

    def judge(found, given):
        _judge_cur(found, given, given["a"])

    return Made(tcur.tensor_cur, given, judge=judge, again=False)


def matrix_cur(draw):
    a = tensor(draw, *sizes(draw)[1:], dtype=draw.one_of(*DTYPES))
    given = _cur_arguments(draw, a, min(a.shape))

    def judge(found, given):
        _judge_cur(found, given, given["a"])

    return Made(tcur.matrix_cur, given, judge=judge, again=False)


def modewise_cur(draw):
    a = tensor(draw, *sizes(draw), dtype=draw.one_of(F32, F64, BF16))
    most = [min(size, a.numel() // size) for size in a.shape]
    ranks = [draw.randrange(1, size + 1) for size in most]

    def judge(found, given):
        error = found.relative_error(given["a"])
        full = all(rank == size for rank, size in zip(ranks, given["a"].shape, strict=True))
        limit = torch.finfo(a.dtype).eps ** 0.5 if full else 1 + 16 * torch.finfo(a.dtype).eps
        if not error <= limit:
            raise Wrong(f"error {error} of ranks {ranks} of {list(a.shape)}")

    return Made(tcur.modewise_cur, {"a": a, "ranks": ranks}, judge=judge, again=False)


def error_curve(draw):
    a = tensor(draw, *sizes(draw), dtype=draw.one_of(F32, F64))
    most = min(a.shape[1:])
    ranks = sorted({draw.randrange(1, most + 1) for _ in range(2)})
    given = {"stack": decompose.HeldSlices("a", list(a)), "ranks": ranks}
    given["selections"] = [draw.one_of("norm", "leverage", "deim")]

    def judge(found, given):
        for name, errors in found.items():
            if not all(0 <= error <= 1 + 1e-4 for error in errors):
                raise Wrong(f"errors of {name}: {errors}")
        best = found.pop("best")
        for errors in found.values():
            if any(e < b - 1e-4 for e, b in zip(errors, best, strict=True)):
                raise Wrong(f"better than the best: {errors} < {best}")

    return Made(decompose.error_curve, given, judge=judge, again=False)


def held_slices(draw):
    a = tensor(draw, *sizes(draw), dtype=draw.one_of(F32, F64, BF16))

    def function(name, matrices):
        stack = decompose.HeldSlices(name, matrices)
        stack.check_finite()
        return [block.clone() for _, _, block in stack.blocks("all")]

    def judge(found, given):
        if sum(block.numel() for block in found) != a.numel():
            raise Wrong("not all numbers were read")

    return Made(function, {"name": "a", "matrices": list(a)}, judge=judge)


#: Every public function whose arguments are tensors, but those of models.
FUNCTIONS = {
    "t_product": t_product,
    "t_transpose": t_transpose,
    "t_identity": t_identity,
    "t_pinv": t_pinv,
    "t_svd": t_svd,
    "multirank": multirank,
    "tubal_rank": tubal_rank,
    "cur_product": cur_product,
    "materialize": materialize,
    "cur_linear": cur_linear,
    "update_linear": update_linear,
    "slice_update": slice_update,
    "project": project,
    "CURFactors": curfactors,
    "tensor_cur": tensor_cur,
    "matrix_cur": matrix_cur,
    "modewise_cur": modewise_cur,
    "error_curve": error_curve,
    "HeldSlices": held_slices,
}
