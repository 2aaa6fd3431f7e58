"""Calls of the operators, past the Python layer: every language, right arguments and wrong ones."""

import functools
import itertools
from dataclasses import replace

import torch
from torch.nn import functional

import fuzz_draw
import fuzz_judge
from conformance import backends as table
from conformance import calls, data
from conformance.cases import IDS, Case
from fuzz_draw import CONTEXTS, LAYOUTS, WITHOUT_GRADIENTS, wrong_value
from fuzz_judge import (
    Call,
    Wrong,
    expect_close,
    expect_like,
    is_of_few,
    renewed,
    repeated,
    upstream,
)
from tcur_kernels.operators import contract, layout, native, reference
from tcur_kernels.operators.definitions.spectra import unpacked
from tolerance import PROMISE, relative_error

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16

OPERATORS = tuple(contract.OPERATORS)
#: What a gradient may be asked of.
DIFFERENTIABLE = {
    "materialize": ("core",),
    "core_grad_dense": ("grad",),
    "core_grad_tokens": ("x", "grad_y"),
    "cur_linear": ("x", "core"),
    "w_eff_linear": ("x", "core"),
}

#: Slices, and how many numbers of a stack: for fast backends, the emulator and the interpreter.
SLICES = (1, 1, 2, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 16, 17, 31, 32, 37, 47, 48, 64, 65, 97, 128)
LONG = (257, 509, 1021, 1024, 2047, 2048, 2049)
NUMBERS = {None: 40_000, table.BESIDE: 40_000, table.EMULATED: 3_000, table.INTERPRETER: 500}
#: Rows and columns.
AXES = (1, 1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 31, 32, 33, 48, 61, 64, 65, 127, 130, 257)
RANKS = (1, 1, 2, 3, 4, 5, 7, 8, 8, 9, 13, 16, 17, 33)


@functools.cache
def backends(without=()):
    """Those that run in this process, by name."""
    found = {}
    for each in table.chosen():
        if each.name in without:
            continue
        if table.absence(each) is None:
            found[each.name] = each
    return found


def make(draw, backend, operator=None):
    """A call of an operator by a backend."""
    operator = operator or draw.one_of(*OPERATORS)
    case = draw_case(draw, operator, backend)
    draw.note(f"{case} on {backend}:")
    given, exact = (dict(each) for each in data.arguments(case))
    if draw.chance(0.3) and "z" not in given and case.get("way") is None:
        repeat(draw, given, exact)
    given = laid_out(draw, given)
    if operator in ("materialize", "core_grad_dense") and draw.chance(0.3):
        with_panels(draw, backend, given)
    context = draw.one_of(*CONTEXTS) if draw.chance(0.5) else "none"
    draw.note("in", context)
    is_wrong = draw.chance(0.35)
    wanted = () if is_wrong or context in WITHOUT_GRADIENTS else asked_for(draw, case)
    if is_wrong:
        spoil(draw, given)
    on_meta = draw.chance(0.06)
    if on_meta:
        draw.note("on meta")
        given = {name: moved(value) for name, value in given.items()}
        wanted = ()
    one = Attempt(case, backend, given, exact, wanted, is_wrong, on_meta)
    return Call(
        name=operator,
        backend=str(backend),
        run=one.run,
        judge=one.judge,
        inputs=one.inputs(),
        refusable=is_wrong,
        context=CONTEXTS[context],
        on_refusal=one.on_refusal if is_wrong else None,
        text=" ".join(draw.text),
    )


# -- right arguments


def draw_case(draw, operator, backend):
    """Any call that a backend must be able to do."""
    n3 = draw.one_of(*SLICES)
    numbers = NUMBERS[backend.few]
    if backend.few != table.INTERPRETER and draw.chance(0.04):
        n3 = draw.one_of(*LONG)
    if n3 > (backend.longest or n3):
        n3 = backend.longest
    if backend.few == table.INTERPRETER:
        n3 = min(n3, draw.one_of(1, 2, 3, 4, 5, 12))
    n1 = draw.one_of(*AXES)
    n2 = draw.one_of(*AXES)
    while n1 > 1 and n3 * n1 > numbers:
        n1 = (n1 + 1) // 2
    while n2 > 1 and n3 * n1 * n2 > numbers:
        n2 = (n2 + 1) // 2
    rank = min(draw.one_of(*RANKS), n1, n2)
    while rank > 1 and n3 * rank * (rank + n1 + n2) > 20 * numbers:
        rank = (rank + 1) // 2
    elements, factors = draw.one_of(*backend.elements), F32
    precision = "ieee"
    if F64 in backend.factors and (elements == F64 or draw.chance(0.15)):
        factors = F64
    elif elements == F64:  # factors of fp32 take no wider numbers from Python, but operators do
        elements = F32
    precisions = [name for name in backend.languages if name == "ieee" or factors == F32]
    if draw.chance(0.3):
        precision = draw.one_of(*precisions)
    if precision == "bf16" and operator not in backend.narrow:
        precision = "ieee"
    how = how_of(draw, operator, n3, backend)
    if elements != factors and (how.get("z") or how.get("way") == "z"):
        elements = factors  # z is a product of x and the factors
    if precision == "bf16" and backend.bf16_in_fp32 and operator in table.ON_TOKENS:
        how["bf16_operands"] = draw.chance(0.5) or None
    if operator in ("core_of_packed",):
        elements, precision = factors, "ieee" if precision == "bf16" else precision
    result = elements
    if operator.startswith("materialize"):
        result = draw.one_of(*[e for e in backend.elements if e != F64 or factors == F64])
    pairs = tuple((name, value) for name, value in how.items() if value is not None)
    both = (elements, result) if result != elements else (elements,)
    case = Case(operator, n3, (n1, n2, rank), factors, both, precision, (), False, pairs)
    return case if backend.lacks(case) is None else replace(case, precision="ieee")


def how_of(draw, operator, n3, backend):
    """What the makers of arguments understand."""
    if operator.startswith("materialize"):
        ways = ["none", "stack", "layers", "odd"]
        if operator == "materialize_out":
            return {"weights": draw.one_of(*ways, "beside"), "counts": counts(draw, n3)}
        return {"weights": draw.one_of(*ways)}
    if operator == "core_of_packed":
        return {"count": draw.one_of(0, 1, 2, 3, 48)}
    if operator == "core_grad_dense":
        return {}
    first = draw.randrange(n3)
    slices = draw.randrange(1, min(n3 - first, 4) + 1)
    how = {"first": first, "slices": slices, "tokens": tokens(draw, backend)}
    is_many = draw.chance(0.25) and operator != "w_eff_linear"
    if is_many:
        ids = draw.one_of(*IDS)
        how |= {"ids": ids, "tokens": (len(IDS[ids]), draw.one_of(0, 1, 2, 5))}
        how["adapters"] = {"many": 40, "more": 7}.get(ids, draw.one_of(5, 6, 17))
    if operator == "core_grad_tokens":
        if not is_many:
            how["packed"] = draw.chance(0.3)
            how["way"] = draw.one_of(None, None, "z", "dense")
            if how["way"] == "dense":
                how["slices"] = 1
                how["tokens"] = how["tokens"] if len(how["tokens"]) == 1 else (3,)
        return how
    how["transposed"] = draw.chance(0.4)
    how["weight"] = operator == "w_eff_linear" or draw.chance(0.6)
    how["bias"] = how["weight"] and not how["transposed"] and draw.chance(0.5)
    how["z"] = not how["transposed"] and draw.chance(0.2)
    return {name: value for name, value in how.items() if value is not False or name == "weight"}


def counts(draw, n3):
    """How many slices lie side by side."""
    found = []
    while sum(found) < n3:
        found.append(min(draw.randrange(1, 5), n3 - sum(found)))
    return tuple(found)


def tokens(draw, backend):
    """Leading dimensions of tokens: none, one, none at all of some axis, many."""
    few = [(), (0,), (1,), (3,), (7,), (2, 5), (2, 0), (0, 3), (1, 1, 4), (16,)]
    return draw.one_of(*few, *([] if backend.few else [(300,), (3, 100), (513,)]))


def repeat(draw, given, exact):
    """Numbers of one argument repeat, in the same place of memory."""
    names = [name for name, value in given.items() if is_floating(value) and name != "out"]
    name = draw.one_of(*sorted(names))
    tensor = given[name]
    if tensor.ndim == 0 or 0 in tensor.shape:
        return
    if draw.chance(0.5):
        dim = draw.randrange(tensor.ndim)
        draw.note(f"{name} expanded along {dim}")
        change = functools.partial(fuzz_draw.expanded, dim=dim)
    else:
        draw.note(f"{name} of windows")
        change = fuzz_draw.windows
    given[name], exact[name] = Repeated(change(tensor)), change(exact[name])


class Repeated:
    """A tensor whose layout is what matters."""

    def __init__(self, tensor):
        self.tensor = tensor


def is_floating(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def laid_out(draw, given):
    """Every tensor somewhere in memory."""

    def place(name, value):
        if isinstance(value, Repeated):
            return value.tensor
        if isinstance(value, (list, tuple)):
            return [place(name, each) for each in value]
        if not isinstance(value, torch.Tensor):
            return value
        if name == "out":
            return fuzz_draw.shifted(value)
        chosen = draw.one_of(*LAYOUTS) if draw.chance(0.6) else fuzz_draw.contiguous
        if chosen is not fuzz_draw.contiguous:
            draw.note(name, chosen.__name__)
        return chosen(value)

    return {name: place(name, value) for name, value in given.items()}


def with_panels(draw, backend, given):
    """R̂ once more, as the CPU kernels read it."""
    if backend.isa is None or given["horizontal_hat"].dtype not in (F32, F64):
        return
    native.force(isa=backend.isa)
    strip = native.strip_columns(given["horizontal_hat"].dtype)
    given["panels"] = layout.panels(given["horizontal_hat"].contiguous(), strip)
    draw.note("with panels")


def asked_for(draw, case):
    """The arguments whose gradients are asked for."""
    if case.get("packed") or draw.chance(0.5):
        return ()
    names = DIFFERENTIABLE.get(case.operator, ())
    wanted = tuple(name for name in names if draw.chance(0.7))
    if case.get("way") == "dense":
        wanted = tuple(name for name in wanted if name == "x")
    if wanted:
        draw.note("gradients of", *wanted)
    return wanted


# -- wrong arguments


def spoil(draw, given):
    """One argument is wrong, or two are."""
    for _ in range(draw.one_of(1, 1, 1, 2)):
        name = draw.one_of(*sorted(given))
        draw.note("wrong", name)
        given[name] = wrong_value(draw, given[name])


def moved(value):
    """On the device that has shapes alone."""
    if isinstance(value, torch.Tensor):
        return value if value.layout != torch.strided else value.to("meta")
    if isinstance(value, (list, tuple)):
        return [moved(each) for each in value]
    return value


# -- attempts


class Attempt:
    """One call with all that is known of it."""

    def __init__(self, case, backend, given, exact, wanted, is_wrong, on_meta):
        self.case, self.backend, self.exact = case, backend, exact
        self.wanted, self.is_wrong, self.on_meta = wanted, is_wrong, on_meta
        self.given = given
        self.language = backend.languages[case.precision]
        both = (self.plain, linear_by_planes)
        self.ways = itertools.cycle(both if case.operator == "cur_linear" else both[:1])

    def inputs(self):
        """Every tensor that is not written; of the buffer, nobody has said what is around it."""
        found = [v for name, v in self.given.items() if name != "out"]
        return [t for t in fuzz_judge.tensors_in(found) if not t.requires_grad]

    def run(self):
        """The result, and gradients behind it."""
        if self.backend.isa is not None:
            native.force(isa=self.backend.isa)
        return self.results(self.given, lambda **given: self.call(self.language, given))

    def call(self, language, given):
        """The operator in a language; what is written into a buffer is what it returns."""
        name = self.case.operator
        if name != "materialize_out" or not is_floating(given["out"]):
            return calls.call(name, language, **given)
        out = given["out"]
        memory = fuzz_judge._bytes(out)
        if out.device.type != "meta" and out.layout == torch.strided:
            out.fill_(float("nan"))
            filled = out.clone()
        assert calls.call(name, language, **given) is None
        if out.device.type == "meta" or out.layout != torch.strided:
            return out
        found = out.clone()
        out.copy_(filled)
        expect_untouched(out, memory)
        if self.is_wrong:
            return found
        with torch.autocast("cpu", enabled=False):  # a copy, in which it would mix dtypes
            return data.slices(self.case, found)

    def results(self, given, function):
        """What ``function`` returns, and gradients of what is wanted."""
        if not self.wanted:
            return (function(**given),)
        leaves = {name: given[name].detach().requires_grad_() for name in self.wanted}
        y = function(**{**given, **leaves})
        if not y.requires_grad:
            raise Wrong("the result does not require grad")
        found = torch.autograd.grad(y, list(leaves.values()), upstream(y))
        return (y.detach(), *found)

    def same(self):
        """What plain torch makes of it at these dtypes."""
        given = {name: plain_copy(value) for name, value in self.given.items()}
        given.pop("panels", None)
        if self.wanted:
            return self.results(given, self.plain)
        return (self.call("reference", given),)

    def plain(self, **given):
        """The operator in functions that torch differentiates."""
        y = calls.plain(self.case.operator, **given)
        if self.case.operator != "w_eff_linear":
            return y
        # W_eff at hand hides the core: its gradient is that of the factors.
        by_factors = {name: value for name, value in given.items() if name != "w_eff"}
        by_factors |= {"weight": None, "bias": None, "x": given["x"].detach()}
        update = calls.plain("cur_linear", **by_factors)
        return y + (update - update.detach())

    def in_float64(self):
        """The same of the numbers before they were rounded."""
        exact = {name: plain_copy(value) for name, value in self.exact.items()}
        if "z" in exact and exact["z"] is not None:  # z is x R̂ᵀ, whatever it was rounded to
            exact["z"] = exact["x"] @ exact["horizontal_hat"].T
        if self.wanted:
            return self.results(exact, self.plain)
        return (self.call("reference", exact),)

    def judge(self, found):
        """Compares with float64; of wrong arguments, with what plain torch makes of them."""
        if self.is_wrong:
            self.judge_what_was_taken(found)
            return
        if self.on_meta and self.case.operator == "materialize_out":
            return  # there is nothing to see
        same = self.same() if not self.on_meta else self.on_the_cpu()
        for one, like in zip(found, same, strict=True):
            if one.device.type != ("meta" if self.on_meta else "cpu"):
                raise Wrong(f"result on {one.device}")
            if self.case.precision == "ieee" or self.on_meta:
                expect_like(one, like)
            elif one.shape != like.shape:
                raise Wrong(f"expected {like.shape}, got {one.shape}")
        if self.on_meta:
            return
        exact = self.in_float64()
        if self.case.precision != "ieee" and self.case.operator != "core_of_packed":
            self.judge_promise(found, exact)
            return
        for index, (one, like, wide) in enumerate(zip(found, same, exact, strict=True)):
            plain = functools.partial(self.plain_again, index)
            fresh = functools.partial(self.fresh, index) if is_of_few(one, self.given) else None
            expect_close(one, like, wide, plain, fresh)

    def fresh(self, index):
        """One of the results for other numbers: by the operator, by torch, and in float64."""

        def other(name, value):
            if isinstance(value, (list, tuple)):
                return [other(name, each) for each in value]
            if not is_floating(value) or name == "out":
                return value
            return renewed(value)

        kept = self.given, self.exact
        given = {name: other(name, value) for name, value in self.given.items()}
        given.pop("panels", None)
        if given.get("z") is not None:
            given["z"] = given["x"] @ given["horizontal_hat"].T
        self.given = given
        self.exact = {name: data._in_float64(value) for name, value in given.items()}
        try:
            return self.run()[index], self.same()[index], self.in_float64()[index]
        finally:
            self.given, self.exact = kept

    def plain_again(self, index):
        """One of the results once more by functions of torch alone, whose order may be changed."""
        given = {name: plain_copy(value) for name, value in self.given.items()}
        given.pop("panels", None)
        if self.case.operator == "materialize_out":
            calls.plain("materialize_out", **given)
            return data.slices(self.case, given["out"])
        return self.results(given, next(self.ways))[index]

    def on_the_cpu(self):
        return (self.call("reference", dict(data.arguments(self.case)[0])),)

    def judge_promise(self, found, exact):
        """Rounded operands: the promise for the result, half of the digits for gradients."""
        half = torch.finfo(BF16).eps ** 0.5
        for index, (one, wide) in enumerate(zip(found, exact, strict=True)):
            limit = half
            if index == 0 and self.case.operator.startswith("materialize"):
                limit = PROMISE[self.case.precision] + 2 * torch.finfo(one.dtype).eps
            error = relative_error(one, wide)
            if error > limit and is_of_few(one, self.given):  # whose terms may cancel
                many, _, wide = repeated(functools.partial(self.fresh, index))
                error = relative_error(many, wide)
            if error > limit:
                raise Wrong(f"relative error {error:.3g} of {self.case.precision}")

    # -- what is taken or refused of wrong arguments must be the same in every language

    def judge_what_was_taken(self, found):
        if self.language == "reference" and not self.on_meta:
            return
        try:
            wanted = self.by_reference()
        except fuzz_judge.ERRORS as error:
            if self.may_differ() or (self.on_meta and "out of range" in str(error)):
                return
            raise Wrong(f"took what the reference refuses: {error}") from error
        if self.on_meta:
            if found[0].shape != wanted.shape:
                raise Wrong(f"{list(found[0].shape)} on meta, {list(wanted.shape)} else")
            return
        if self.case.precision != "ieee" or self.is_at_odds():
            return
        if not fuzz_judge.same_up_to_rounding(found[0], wanted):
            raise Wrong("took it, and computed something else than the reference")

    def on_refusal(self, error):
        """What one language refuses of wrong arguments, the reference refuses, too."""
        if self.language == "reference" and not self.on_meta:
            return
        if isinstance(error, OverflowError) or self.may_differ():
            return
        try:
            self.by_reference()
        except fuzz_judge.ERRORS:
            return
        raise Wrong(f"refused what the reference takes: {error}")

    def by_reference(self):
        given = {name: plain_copy(v) for name, v in self.given.items()}
        if is_floating(given.get("out")):
            given["out"] = self.given["out"].clone()  # whose strides may be what is wrong
        return self.call("reference", given)

    def is_at_odds(self):
        """Whether something is given twice, R̂ or z, and may differ; or a factor is rounded."""
        twice = self.given.get("panels"), self.given.get("z")
        return any(each is not None for each in twice) or self.is_narrow()

    def is_narrow(self):
        """Factors of bf16, by which kernels multiply in that precision."""
        return any(t.dtype == BF16 for t in (self.factor(), self.factor("horizontal_hat")))

    def may_differ(self):
        """Precisions and lengths that a language does not have; ids, which a GPU does not check."""
        tensors = fuzz_judge.tensors_in(list(self.given.values()))
        if any(t.device.type == "meta" or t.layout != torch.strided for t in tensors):
            return True
        if self.given.get("panels") is not None or self.given.get("bf16_operands"):
            return True
        if self.is_narrow() or self.case.precision == "bf16":
            return True
        return self.backend.checks != "compiled" or self.backend.few == table.EMULATED

    def factor(self, name="lateral_hat"):
        value = self.given.get(name)
        return value if isinstance(value, torch.Tensor) else torch.zeros(0)


def linear_by_planes(**given):
    """``cur_linear`` in plain torch, with one sum over all planes of all r numbers of a token.

    Its other form adds up the bins by themselves. As long as these are few, that changes little.
    """
    args, keywords = calls.bound("cur_linear", "reference", given)
    a = contract.CurLinear(*args, **keywords)
    n3, is_transposed = a.core.shape[-3], a.transposed
    lateral, horizontal = unpacked(a.lateral_hat, a.horizontal_hat, n3)
    first, last = (lateral, a.horizontal_hat) if is_transposed else (horizontal.mT, a.lateral_hat.T)
    cores = a.scale * reference._inverse_weights(lateral, n3)
    cores = cores * reference._core_of_rows(a.core, a.adapter_ids)
    blocks = a.slices if is_transposed else 1
    tokens = a.x.reshape(a.x[..., 0].numel(), blocks, -1).to(lateral.dtype)
    each = []
    for s in range(a.slices):
        z = reference._rows(tokens[:, s % blocks] @ first, a.adapter_ids)
        of_slice = cores * reference._phases(lateral, n3, a.slice_index + s)
        mixed = (z @ (of_slice if is_transposed else of_slice.mT)).flatten(1, 2)
        # The real part of a product is that of the real planes, minus that of the imaginary ones.
        each.append(reference.pack(mixed.conj(), n3).movedim(0, 1).flatten(1) @ last)
    update = sum(each) if is_transposed else torch.cat(each, 1)
    update = update.reshape(*a.x.shape[:-1], update.shape[1])
    if a.weight is None:
        return update.to(a.x.dtype)
    base = a.x @ a.weight if is_transposed else functional.linear(a.x, a.weight, a.bias)
    return (base.to(update.dtype) + update).to(base.dtype)


def plain_copy(value):
    """Contiguous copies, which nothing else shares."""
    if isinstance(value, torch.Tensor):
        is_plain = value.layout == torch.strided and value.device.type != "meta"
        return value.detach().clone(memory_format=torch.contiguous_format) if is_plain else value
    if isinstance(value, (list, tuple)):
        return [plain_copy(each) for each in value]
    return value


def expect_untouched(out, before):
    """Around a buffer that was restored, no byte may have changed; within it there are NaN."""
    after = fuzz_judge._bytes(out)
    kept = torch.empty(0, dtype=out.dtype, device="cpu").set_(out.untyped_storage())
    inside = torch.zeros(kept.shape, dtype=torch.bool, device="cpu")
    inside.as_strided(out.shape, out.stride(), out.storage_offset()).fill_(True)
    changed = (after != before).view(-1, out.element_size()).any(1)
    if bool((changed & ~inside).any()):
        raise Wrong("wrote outside of the buffer")
