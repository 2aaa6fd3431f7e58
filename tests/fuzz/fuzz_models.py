"""Calls of what takes modules: stacks of layers, and `adapt` on small random models."""

import copy
import functools

import torch
from torch import nn

import fuzz_functions
import plain
import tcur_kernels as tcur
from fuzz_judge import Wrong, expect_close, expect_like, is_of_few, renewed, repeated, upstream
from tcur_kernels.decompose import RULES
from tcur_kernels.layers.weights import held
from tolerance import relative_error

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
WIDTHS = (1, 2, 3, 5, 8, 12, 17)
TOKENS = ((0,), (1,), (3,), (2, 5), (2, 0), (40,))


def _linear(draw, n2, n1, dtype):
    layer = nn.Linear(n2, n1, bias=draw.chance(0.5), dtype=dtype)
    return layer.requires_grad_(False)


def _random_core(stack):
    with torch.no_grad():
        stack.core.copy_(torch.randn(stack.core.shape, dtype=F64, device="cpu"))


def stack_of_layers(draw):
    """`TProductStack` and its `TProductLinear` layers: forward and backward of one of them."""
    n1, n2, dtype = draw.one_of(*WIDTHS), draw.one_of(*WIDTHS), draw.one_of(F32, F32, F64, BF16)
    linears = [_linear(draw, n2, n1 * draw.one_of(1, 1, 3), dtype) for _ in range(4)]
    if all(layer.out_features != n1 for layer in linears):
        linears.append(_linear(draw, n2, n1, dtype))
    which = draw.randrange(len(linears))
    leading = draw.one_of(*TOKENS)
    given = {"linears": linears, "rank": draw.randrange(1, min(n1, n2) + 1)}
    given |= {"alpha": draw.one_of(1.0, 0.5, 2), "selection": draw.one_of(*RULES)}
    given |= {"mode": draw.one_of("auto", "materialized", "factored")}
    given |= {"basis": draw.one_of("slices", "orthonormal")}
    x = fuzz_functions.tensor(draw, *leading, n2, dtype=dtype)
    now = {"x": x, "seed": 0}

    def function(linears, **how):
        torch.manual_seed(now["seed"])
        stack = tcur.TProductStack(copy.deepcopy(linears), **how)
        _random_core(stack)
        y = stack.layers[which % len(stack.layers)](now["x"])  # a wrong list may be shorter
        if not y.requires_grad:
            return stack, y, None
        (grad,) = torch.autograd.grad(y, stack.core, upstream(y))
        return stack, y.detach(), grad

    def computed(stack, dtype):
        x = now["x"]
        core = stack.core.detach().to(dtype if dtype == F64 else stack.core.dtype)
        core.requires_grad_()
        weights = plain.base_slices(stack)
        slices = torch.stack(weights).to(core.dtype)
        update = plain.scale_of(stack) * plain.product(*_order(plain.sides_of(stack, slices), core))
        place = stack.places[which]
        mine = slice(place.slice_index, place.slice_index + place.slices)
        layer, own = stack.layers[which], dtype or x.dtype
        bias = None if layer.bias is None else layer.bias.detach().to(own)
        base = nn.functional.linear(x.to(own), layer.base_weight.detach().to(own), bias)
        added = x.to(core.dtype) @ update[mine].reshape(-1, n2).mT
        y = (base.to(core.dtype) + added).to(own)
        return y.detach(), *torch.autograd.grad(y, core, upstream(y))

    def fresh(given, index):
        """Result and reference for other numbers, as `expect_close` wants them."""
        now.update(x=renewed(x), seed=now["seed"] + 1)
        try:
            stack, *found = function(**given)
            return found[index], computed(stack, None)[index], computed(stack, F64)[index]
        finally:
            now["x"] = x

    def judge(found, given):
        stack, *found = found
        same, exact = computed(stack, None), computed(stack, F64)
        expect_like(found[0], same[0], is_contiguous=False)
        for index, (one, like, wide) in enumerate(zip(found, same, exact, strict=True)):
            if one is None:
                continue
            is_few = is_of_few(one, {"x": x})
            again = functools.partial(fresh, given, index) if is_few else None
            if dtype == BF16:  # updates are rounded with a dither
                expect_half_of_the_digits(one, wide, again)
            else:
                expect_close(one, like, wide, lambda i=index: computed(stack, None)[i], again)

    made = fuzz_functions.Made(function, given, judge=judge, in_contexts=False, again=False)
    return made


def _order(sides, core):
    return sides[0], core, sides[1]


def expect_half_of_the_digits(one, wide, again):
    """Compares with float64; few numbers once more, by many calls."""
    error, limit = relative_error(one, wide), torch.finfo(one.dtype).eps ** 0.5
    if error > limit and again is not None:
        many, _, wide = repeated(again)
        error = relative_error(many, wide)
    if error > limit:
        raise Wrong(f"relative error {error:.3g}")


class _Model(nn.Module):
    """Some layers, of which some have the same shape, and some may have no size at all."""

    def __init__(self, draw):
        super().__init__()
        width = draw.one_of(2, 3, 4, 6)
        self.first = nn.Linear(width, width)
        kinds = [draw.one_of("linear", "norm", "empty", "conv", "attention") for _ in range(3)]
        parts = []
        for kind in kinds:
            if kind == "linear":
                parts.append(nn.Linear(width, width, bias=draw.chance(0.5)))
            elif kind == "norm":
                parts.append(nn.LayerNorm(width))
            elif kind == "empty":
                parts.append(nn.Sequential())
            elif kind == "conv":
                parts.append(_Conv(width))
            else:
                parts.append(_Attention(width))
        self.parts = nn.ModuleList(parts)
        self.width = width
        if draw.chance(0.3):  # layers that hold nothing, which some models have
            self.nothing = nn.Parameter(torch.zeros(draw.one_of(0, width), 0))
            self.none = _empty_linear(draw.one_of((0, width), (width, 0), (0, 0)))

    def forward(self, x):
        x = self.first(x)
        for part in self.parts:
            x = part(x)
        return x


def _empty_linear(sizes):
    layer = nn.Linear(1, 1)
    layer.in_features, layer.out_features = sizes
    layer.weight = nn.Parameter(torch.zeros(sizes[1], sizes[0]))
    layer.bias = nn.Parameter(torch.zeros(sizes[1]))
    return layer


class _Conv(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv1d(width, width, 1)

    def forward(self, x):
        return self.conv(x.mT).mT


class _Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 1, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


def adapt(draw):
    """An adapted model computes what it did; with cores, what its merged copy does."""
    model = _Model(draw).eval()
    given = {"model": model, "rank": draw.one_of(1, 1, 2, {"*": 1}), "alpha": draw.one_of(1.0, 0.5)}
    given |= {"targets": draw.one_of(None, None, "first", ["first", "parts.*"], "*.conv", [])}
    given |= {"mode": draw.one_of("auto", "factored", "materialized")}
    given |= {"stacks": draw.one_of("shape", "layer"), "selection": draw.one_of("norm", "deim")}
    given |= {"train_also": draw.one_of((), "first", "no.such"), "basis": "orthonormal"}
    x = torch.randn(2, 3, model.width)
    given["gradients"] = None
    if draw.chance(0.3):
        given["rank"] = tcur.Budget(draw.one_of(1, 10, 100))
        given["gradients"] = {n: torch.randn_like(m.weight) for n, m in _linears(model)}

    def function(model, **how):
        torch.manual_seed(0)
        if not isinstance(model, nn.Module):
            return tcur.adapt(model, **how)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        own = copy.deepcopy(model)
        try:
            adapter = tcur.adapt(own, **how)
        except Exception:
            after = own.state_dict()
            if set(after) != set(state) or any(not torch.equal(after[k], state[k]) for k in state):
                raise Wrong("a refusal changed the model") from None
            raise
        # torch's attention computes otherwise where its weights require grad, even under no_grad.
        # So the twin is as frozen as the adapted model, and W_eff requires grad, as its core does.
        twin, flags = copy.deepcopy(model), dict(own.named_parameters())
        places = [place for stack in adapter.stacks.values() for place in stack.places]
        adapted = {id(held(place.module, place.parameter)) for place in places}
        for name, parameter in twin.named_parameters():
            parameter.requires_grad = flags[name].requires_grad or id(flags[name]) in adapted
        with torch.no_grad():
            before, same = twin(x), own(x)
            for stack in adapter.stacks.values():
                _random_core(stack)
            changed = own(x)
            merged = adapter.merge(inplace=False)(x)
        return before, same, changed, merged

    def judge(found, given):
        before, same, changed, merged = found
        if not torch.equal(before, same):
            raise Wrong("cores of zeros changed the model")
        if not bool(changed.isfinite().all()):
            raise Wrong("the adapted model is not finite")
        scale = 1 + float(changed.norm())
        if float((changed - merged).norm()) > scale * torch.finfo(F32).eps ** 0.5:
            raise Wrong("the merged model computes something else")

    return fuzz_functions.Made(
        function, given, judge=judge, in_contexts=False, refusable=True, again=False
    )


def _linears(model):
    return [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear]


def collect_gradients(draw):
    model = _Model(draw)
    batches = [torch.randn(2, 3, model.width) for _ in range(draw.one_of(1, 2))]

    def loss_fn(model, batch):
        try:
            return model(batch).square().sum()
        except Exception as error:  # whatever torch says of it: these words are not ours
            raise ValueError("batches: expected one of the model, got another") from error

    given = {"model": model, "batches": batches, "loss_fn": loss_fn}
    given["targets"] = draw.one_of(None, "first", ["*"])

    def judge(found, given):
        taken = {n for n, _ in _linears(model)} & set(found)
        if "first" not in taken or not bool(found["first"].any()):
            raise Wrong(f"gradients of {sorted(found)}")

    return fuzz_functions.Made(
        tcur.collect_gradients, given, judge=judge, in_contexts=False, refusable=True, again=False
    )


def budget(draw):
    given = {"parameters": draw.one_of(1, 5, 10**12)}

    def judge(found, given):
        if found.parameters != given["parameters"]:
            raise Wrong("another number")

    return fuzz_functions.Made(tcur.Budget, given, judge=judge, again=False)


def build_info(draw):
    def function(**given):
        return tcur.build_info() if draw is not None else None

    def judge(found, given):
        if "reference" not in found["backends"]:
            raise Wrong("no reference")

    # Of what takes no arguments, none can be wrong: one that is unknown is Python's to refuse.
    return fuzz_functions.Made(lambda **given: function(), {"any": None}, judge=judge, again=False)


#: Every public function whose arguments are modules, or numbers alone.
FUNCTIONS = {
    "TProductStack": stack_of_layers,
    "adapt": adapt,
    "collect_gradients": collect_gradients,
    "Budget": budget,
    "build_info": build_info,
}
