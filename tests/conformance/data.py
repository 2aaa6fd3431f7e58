"""What the operators of a case are given, and what they must return: in float64, and by torch."""

import functools

import torch

from cases import counts_of, make_case, side_by_side, slices_of
from tcur_kernels.operators import reference

from .calls import call
from .cases import ADAPTERS, IDS

FACTORS = ("lateral_hat", "horizontal_hat")


@functools.lru_cache(maxsize=8)
def arguments(case):
    """Keyword arguments of a case on the CPU, and the same before anything was rounded."""
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        stack = make_case(case.n3, *case.shape, case.factors, case.elements[0])
        own = MAKERS[case.operator](case, stack)
    given, exact = dict(own), {name: _in_float64(value) for name, value in own.items()}
    if case.operator != "core_of_packed":
        for name, packed, wide in zip(FACTORS, stack.packed, stack.double().packed, strict=True):
            if name not in own:
                given[name] = packed.bfloat16() if case.precision == "bf16" else packed
                if case.get("bf16_operands"):
                    given |= {name: given[name].float(), "bf16_operands": True}
                exact[name] = wide
    return given, exact


def compute(case, run, given):
    """What ``run(operator, **arguments)`` returns, or leaves in the buffer of a case, as slices."""
    if case.operator != "materialize_out":
        return run(case.operator, **given)
    out = torch.full_like(given["out"], float("nan"))
    run(case.operator, **{**given, "out": out})
    return slices(case, out)


def slices(case, out):
    """W_eff [n3, n1, n2] of a buffer."""
    counts = counts_beside(case)
    return out if out.ndim == 3 else slices_of(out, counts, *case.shape[:2]).contiguous()


def by_torch(name, **given):
    """The operator in plain torch."""
    return call(name, "reference", **given)


@functools.lru_cache(maxsize=8)
def expected(case):
    """What plain torch makes of a case at its dtypes (of rounded factors: None), and in float64."""
    given, exact = arguments(case)
    same = None if case.precision == "bf16" else compute(case, by_torch, given)
    return same, compute(case, by_torch, exact)


# -- makers of arguments, without the factors


def materialize(case, stack):
    """W_eff from no weights, a stack, its layers, or matrices of several slices."""
    weights = case.get("weights", "stack")
    return {
        "weights": WEIGHTS[weights](case, stack.weight),
        "core": stack.core,
        "scale": 1.0 if weights == "none" else 0.5,
        "out_dtype": case.elements[-1],
    }


def _at_odd_addresses(case, stacked):
    n1, n2, _ = case.shape
    numbers = torch.empty(case.n3, n1 * n2 + 1, dtype=stacked.dtype)
    numbers[:, 1:] = stacked.flatten(1)
    return [row[1:].view(n1, n2) for row in numbers]


def counts_beside(case):
    """How many slices each matrix of a case has."""
    return list(case.get("counts", counts_of(case.n3)))


WEIGHTS = {
    "none": lambda case, stacked: [],
    "stack": lambda case, stacked: [stacked],
    "layers": lambda case, stacked: [each.clone() for each in stacked],
    "odd": _at_odd_addresses,
    "beside": lambda case, stacked: side_by_side(stacked, counts_beside(case)),
}


def materialize_out(case, stack):
    """The same into a buffer, which is flat where slices are side by side."""
    given = materialize(case, stack)
    dtype, (n1, n2, _) = given.pop("out_dtype"), case.shape
    is_flat = case.get("weights") == "beside" and len(counts_beside(case)) < case.n3
    shape = (case.n3 * n1 * n2,) if is_flat else (case.n3, n1, n2)
    return {**given, "out": torch.full(shape, float("nan"), dtype=dtype)}


def core_grad_dense(case, stack):
    """A gradient of all slices."""
    return {"grad": torch.randn_like(stack.weight) + case.get("mean", 0.0)}


def core_grad_tokens(case, stack):
    """Tokens and their gradients, in one of several ways."""
    (n1, n2, rank), slices, way = case.shape, case.get("slices", 1), case.get("way", "x")
    tokens, dtype, mean = case.get("tokens"), case.elements[0], case.get("mean", 0.0)
    where = {"n3": case.n3, "slice_index": case.get("first", 0), "slices": slices}
    if case.get("ids"):
        where |= {"adapter_ids": ids_of(case), "adapters": case.get("adapters", ADAPTERS)}
    else:
        where["packed"] = case.get("packed", False)
    if way == "ones":
        q = case.n3 * rank
        x, grad_y = torch.randn(*tokens, q), torch.randn(*tokens, slices * q)
        lateral_hat = torch.eye(q, dtype=dtype)
        factors = {"lateral_hat": lateral_hat, "horizontal_hat": None}
        return {"x": x.to(dtype), "grad_y": grad_y.to(dtype), **factors, **where}
    x = (mean + torch.randn(*tokens, n2)).to(dtype)
    grad_y = (mean + torch.randn(*tokens, slices * n1)).to(dtype)
    if way == "z":
        where["horizontal_hat"] = None
        return {"x": x @ stack.packed[1].T, "grad_y": grad_y, **where}
    if way == "dense":
        return {"x": grad_y.T @ x, "grad_y": None, **where}
    return {"x": x, "grad_y": grad_y, **where}


def ids_of(case):
    """The cores that the rows go by."""
    return torch.tensor(IDS.get(case.get("ids"), []), dtype=torch.int64)


def core_of_packed(case, stack):
    """Packed gradients of several layers."""
    core = stack.core
    packed = case.get("mean", 0.0) + torch.randn(case.get("count"), *core.shape, dtype=core.dtype)
    return {"packed": packed, "scale": 0.7}


def cur_linear(case, stack):
    """Tokens on their way through some slices, or back."""
    (n1, n2, rank), slices, first = case.shape, case.get("slices", 1), case.get("first", 0)
    tokens, turned, dtype = case.get("tokens"), case.get("transposed", False), case.elements[0]
    given = {"core": stack.core, "slice_index": first, "slices": slices, "scale": 0.5}
    given |= {"transposed": turned, "weight": None, "bias": None}
    if case.get("way") == "ones":
        n1 = n2 = case.n3 * rank
        one = torch.eye(n1)
        one = one.bfloat16() if case.precision == "bf16" else one
        given |= {"lateral_hat": one, "horizontal_hat": one}
    if case.get("weight", True):
        given["weight"] = stack.weight[first : first + slices].reshape(slices * n1, n2)
    if case.get("bias"):
        given["bias"] = torch.randn(slices * n1).to(dtype)
    if case.get("ids"):
        cores = torch.randn(
            case.get("adapters", ADAPTERS), *stack.core.shape, dtype=stack.core.dtype
        )
        given |= {"core": cores, "adapter_ids": ids_of(case)}
    x = torch.randn(*tokens, slices * n1 if turned else n2).to(dtype)
    if case.get("z"):
        given["z"] = x @ stack.packed[1].T
    return {"x": x, **given}


def w_eff_linear(case, stack):
    """The same by W_eff of these slices, which is at hand."""
    given = cur_linear(case, stack)
    w_eff = given.pop("weight")
    return {**given, "w_eff": w_eff}


MAKERS = {
    "materialize": materialize,
    "materialize_out": materialize_out,
    "core_grad_dense": core_grad_dense,
    "core_grad_tokens": core_grad_tokens,
    "core_of_packed": core_of_packed,
    "cur_linear": cur_linear,
    "w_eff_linear": w_eff_linear,
}


def _in_float64(value):
    if isinstance(value, torch.dtype):
        return torch.float64
    if isinstance(value, list):
        return [_in_float64(each) for each in value]
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().double()
    return value


# -- the size of what is added up


def norm_of_terms(case):
    """The root of the summed squares of all terms of a reduction, in the norm of its result.

    Rounded factors of a sum are sums themselves, with terms of their own: z = x R̂ᵀ is off by what
    its own terms are, and so on. Each square is that of a number plus those of its terms.
    """
    _, given = arguments(case)
    return float(_SQUARES[case.operator](case, given).clamp(min=0).sqrt())


def _squares(t):
    return t.abs().square()


def _all_bins(packed, n3):
    """Half spectra [K, ...] from packed planes [n3, ...], and how often each bin counts."""
    spectra = reference.unpack(packed)
    counted = torch.full((len(spectra),), 2.0, dtype=torch.float64)
    counted[0] = 1.0
    if n3 % 2 == 0:
        counted[-1] = 1.0
    return spectra, counted


def _spectra(case, given):
    lateral_hat, horizontal_hat = given["lateral_hat"], given["horizontal_hat"]
    if horizontal_hat is None:
        horizontal_hat = torch.eye(lateral_hat.shape[1], dtype=torch.float64)
    n3, q = case.n3, lateral_hat.shape[1]
    lateral, counted = _all_bins(lateral_hat.reshape(-1, n3, q // n3).movedim(0, 1), n3)
    horizontal, _ = _all_bins(horizontal_hat.reshape(n3, q // n3, -1), n3)
    return lateral, horizontal, counted


def _in_result(case, of_bins, counted):
    """Squares of bins in the norm of the core, or of its packed planes."""
    if case.get("packed"):
        return of_bins.sum()
    return (of_bins * counted).sum() / case.n3


def _projected(tokens, factor):
    """Squares of projected tokens, each with those of its terms."""
    return _squares(tokens.to(factor.dtype) @ factor) + tokens.square() @ _squares(factor)


def _of_tokens(case, given):
    lateral, horizontal, counted = _spectra(case, given)
    grad_y, n1 = given["grad_y"], lateral.shape[1]
    if grad_y is None:
        grad_y = torch.eye(n1, dtype=torch.float64)
    x = given["x"].flatten(0, -2)
    grad_y = grad_y.reshape(len(x), case.get("slices", 1), n1)
    z = _projected(x, horizontal.mH)
    total = torch.zeros(len(lateral), dtype=torch.float64)
    for part in grad_y.unbind(1):
        p = _projected(part, lateral.conj())
        total += (p.sum(2) * z.sum(2)).sum(1)
    return _in_result(case, total, counted)


def _of_dense(case, given):
    lateral, horizontal, counted = _spectra(case, given)
    grad = given["grad"]
    grad_hat = reference.half_spectrum(grad)
    each = _squares(grad_hat) + grad.square().sum(0)
    first, second = grad_hat @ horizontal.mH, lateral.mH @ grad_hat
    right, left = _squares(horizontal).mT, _squares(lateral).mT
    total = left @ (each @ right + _squares(first)) + _squares(second) @ right
    return _in_result(case, total.sum((1, 2)), counted)


def _of_packed(case, given):
    squares = given["packed"].square().sum(0).flatten(1).sum(1)
    n3 = case.n3
    counted = torch.full((n3,), 2.0, dtype=torch.float64)
    counted[0] = 1.0
    if n3 % 2 == 0:
        counted[-1] = 1.0
    return given["scale"] ** 2 * (squares * counted).sum() / n3


_SQUARES = {
    "core_grad_tokens": _of_tokens,
    "core_grad_dense": _of_dense,
    "core_of_packed": _of_packed,
}


def lengths(case):
    """Lengths of the sums that a term of a reduction goes through, one after another."""
    n1, n2, rank = case.shape
    if case.operator == "core_of_packed":
        return (case.get("count"), case.n3)
    if case.operator == "core_grad_dense":
        return (case.n3, n2, n1, case.n3)
    given, _ = arguments(case)
    tokens = given["x"].flatten(0, -2).shape[0]
    if case.get("ids"):
        rows = torch.bincount(given["adapter_ids"], minlength=1)
        tokens = tokens // max(1, len(given["adapter_ids"])) * int(rows.max())
    if case.get("way") == "ones":
        n1 = case.n3 * rank
    return (n2, n1, tokens * case.get("slices", 1), case.n3)
