"""A model in its original, adapted and merged forms, and how much rounding changes its outputs."""

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

import tcur_kernels as tcur
from plain import scale_of, sides_of
from tolerance import same_mathematics

from .weights import randomise

#: How many times the weights are moved by one eps, at random, to measure the effect of rounding.
ROUNDINGS = 2
#: An adapted model may be off by this factor times the largest of these effects.
TIMES = 16
#: The bound must be below this fraction of what the adapter changed.
VISIBLE = 0.05
#: The intended size of an update with random cores, relative to the weight.
UPDATE = 0.3


class NoGradientError(Exception):
    """No output depends on a parameter in a way that autograd records."""


@dataclass(frozen=True)
class Family:
    """One model to check: its origin, how to make it, and what is known about it.

    Attributes:
        name: of the family in its library.
        library: the module that must be installed.
        build, inputs, smooth: the arguments of `check_family`.
        way: the way of calling it, for the table.
        compiles: whether torch.compile is checked, too, which takes seconds.
        refused: a pattern of the error of `adapt`, if the model cannot be adapted.
        often: whether every run of the tests checks it.
    """

    name: str
    library: str
    build: Callable[[int], nn.Module]
    inputs: Callable[[], dict]
    way: str = ""
    smooth: bool = True
    compiles: bool = False
    refused: str = ""
    often: bool = True


def family(name, library, make, inputs, **settings):
    """A `Family` of the models that ``make`` returns."""

    def build(seed):
        torch.manual_seed(seed)
        return randomise(make().float(), seed)

    def seeded():
        torch.manual_seed(7)
        return inputs()

    return Family(name, library, build, seeded, **settings)


@dataclass
class Report:
    """What was adapted, and what a reader of the table must know."""

    layers: int = 0
    stacks: int = 0
    left_out: Counter = field(default_factory=Counter)  # reason -> modules
    silent: list[str] = field(default_factory=list)  # layers that no gradient reached
    notes: list[str] = field(default_factory=list)  # what the model itself cannot do
    refused: str = ""  # the error of `adapt` for a model without a layer to adapt

    def __str__(self):
        lines = [f"{self.layers} layers in {self.stacks} stacks"]
        lines += [f"left out, {count}: {reason}" for reason, count in self.left_out.items()]
        lines += [f"no gradient: {name}" for name in self.silent]
        return "\n".join(lines + self.notes)


class Subject:
    """One model: original, adapted and merged, with its outputs; each is made when needed."""

    def __init__(self, build, inputs, rank, smooth):
        self.build, self.inputs, self.rank, self.smooth = build, inputs, rank, smooth
        self.report = Report()

    def outputs(self, model, grad=False, dtype=None):
        """All tensors that the model returns, always with the same random numbers and inputs."""
        inputs = self.inputs() if dtype is None else cast(self.inputs(), dtype)
        torch.manual_seed(1)
        with torch.set_grad_enabled(grad):
            return tensors_of(model(**inputs))

    def adapted(self, seed=0):
        """An adapted model with that seed; its cores are zero."""
        model = self.build(seed)
        return model, tcur.adapt(model, rank=self.rank)

    @cached_property
    def base(self):
        return self.build(0)

    @cached_property
    def base_outputs(self):
        first, second = self.outputs(self.base), self.outputs(self.base)
        assert any(t.is_floating_point() for t in first), "expected outputs, got none"
        for a, b in zip(first, second, strict=True):
            assert same_bits(a, b), "expected a model that repeats itself, got another output"
        return first

    @cached_property
    def trained(self):
        """An adapter with cores as after training: not zero, and large enough to see an effect."""
        _, adapter = self.adapted()
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for stack, plan in zip(adapter.stacks.values(), adapter.plan.stacks, strict=True):
                # C and R are isometric, so an update has the norm of its scaled core, and
                # n3 r² numbers of this size have that of n3 n1 n2 weights of size 1/sqrt(n2).
                size = UPDATE * plan.n1**0.5 / (stack.scale * stack.rank)
                stack.core.normal_(std=size, generator=generator)
        plan = adapter.plan
        self.report.layers = sum(len(stack.members) for stack in plan.stacks)
        self.report.stacks = len(plan.stacks)
        self.report.left_out = Counter(item.reason for item in plan.left_out)
        return adapter

    @cached_property
    def trained_outputs(self):
        return self.outputs(self.trained.model)

    @cached_property
    def merged(self):
        return self.trained.merge(inplace=False)

    @cached_property
    def merged_outputs(self):
        return self.outputs(self.merged)

    @cached_property
    def moved(self):
        """Copies of the merged model with weights moved by one eps."""
        copies = []
        for seed in range(ROUNDINGS):
            generator = torch.Generator().manual_seed(seed)
            twin = copy.deepcopy(self.merged)
            with torch.no_grad():
                for parameter in twin.parameters():
                    if parameter.is_floating_point():
                        signs = torch.randint(2, parameter.shape, generator=generator) * 2.0 - 1
                        eps = torch.finfo(parameter.dtype).eps
                        parameter.mul_(1 + eps * signs.to(parameter))
            copies.append(twin)
        return copies

    @cached_property
    def bounds(self):
        """How much rounding may change each output."""
        wanted = self.merged_outputs
        moved = [self.outputs(model) for model in self.moved]
        bounds = [bound(w, [m[i] for m in moved]) for i, w in enumerate(wanted)]
        change = sum(distance(a, b) for a, b in zip(self.base_outputs, wanted, strict=True))
        assert change > 0, "expected the cores to change the outputs, got the base's"
        total = sum(bounds)
        assert total <= VISIBLE * change, (
            f"expected roundings below {VISIBLE} of what the cores change, got {total / change:.2g}"
        )
        return bounds

    def near(self, outputs, what):
        """Asserts that outputs are those of the merged copy, up to rounding."""
        limits = zip(outputs, self.merged_outputs, self.bounds, strict=True)
        for i, (actual, wanted, limit) in enumerate(limits):
            error = distance(actual, wanted)
            assert error <= limit, f"{what}: output {i} is off by {error:.3g}, bound {limit:.3g}"

    def loss(self, model):
        """A random weighted sum of all outputs, each scaled to size one; differentiable."""
        generator = torch.Generator().manual_seed(3)
        total = torch.zeros((), dtype=torch.float64)
        for output, merged in zip(self.outputs(model, grad=True), self.merged_outputs, strict=True):
            if not output.is_floating_point():
                continue
            weights = torch.randn(output.shape, generator=generator).double()
            kept = torch.isfinite(merged)
            scale = finite(merged).double().square().mean().sqrt().clamp_min(1e-30)
            if output.requires_grad:
                total = total + (output.double() / scale * weights)[kept].sum()
        if not total.requires_grad:
            raise NoGradientError("expected outputs with a gradient, got none")
        return total

    @staticmethod
    def only_trains(model, layers):
        """Freezes a model of plain layers, except for the weights of these layers."""
        weights = {name: weight_of(model, name) for name in layers}
        parameters = {id(p): p for p, _ in weights.values()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in parameters)
        return weights, parameters

    def weight_gradients(self, model):
        """Layer -> the gradient of its weight [n_out, n_in] in a merged model, or None."""
        weights, parameters = self.only_trains(model, members(self.trained.plan))
        own = list(parameters.values())
        found = torch.autograd.grad(self.loss(model), own, allow_unused=True)
        by_parameter = dict(zip(parameters, found, strict=True))
        gradients = {}
        for name, (parameter, view) in weights.items():
            gradient = by_parameter[id(parameter)]
            gradients[name] = None if gradient is None else view(gradient)
        return gradients

    def core_gradients(self, model):
        """Stack -> the gradient of its core, by the formula, from the merged model's gradients."""
        gradients, cores = self.weight_gradients(model), {}
        for plan in self.trained.plan.stacks:
            stack = self.trained.stacks[plan.name]
            base, slices = [], []
            for member in plan.members:
                parameter, view = weight_of(self.base, member.module)
                base += view(parameter.detach()).split(plan.n1)
                own = gradients[member.module]
                own = torch.zeros_like(view(parameter)) if own is None else own
                slices += own.split(plan.n1)
            base, slices = torch.stack(base).double(), torch.stack(slices).double()
            lateral, horizontal = sides_of(stack, base)
            c, g, r = (torch.fft.fft(t, dim=0) for t in (lateral, slices, horizontal))
            core = torch.fft.ifft(c.mH @ g @ r.mH, dim=0).real
            cores[plan.name] = scale_of(stack) * core
        return gradients, cores

    def right_gradient(self, name, actual, wanted, moved):
        """Asserts that the gradient of a stack's core is the wanted one, up to rounding.

        Where a model has kinks, as ReLU and the maximum of several numbers have, its gradient
        jumps. A rounding decides on which side a number falls that is nearly at a kink, and no
        bound says how far that moves the gradient. Then the gradients must agree in half of their
        digits, and up to rounding in float64, where no number is that near.

        Args:
            actual, wanted: from the adapted model, and by the formula.
            moved: by the formula from the models with moved weights.
        """
        # This is a sum over all slices in fp32, in which large terms cancel.
        limit = bound(wanted.float(), [m[name].float() for m in moved])
        error = distance(actual.double(), wanted)
        if error > limit and same_mathematics(actual.float(), wanted.float()):
            error, limit = self._errors_in_float64[name]
        assert error <= limit, f"{name}: gradient is off by {error:.3g}, bound {limit:.3g}"

    @cached_property
    def _errors_in_float64(self):
        """Stack -> how far the gradient of its core is off in a model of float64, and its bound."""
        build = lambda seed: self.build(seed).double()  # noqa: E731
        inputs = lambda: cast(self.inputs(), torch.float64)  # noqa: E731
        same = Subject(build, inputs, self.rank, self.smooth)
        same.loss(same.trained.model).backward()
        _, wanted = same.core_gradients(same.merged)
        moved = [same.core_gradients(twin)[1] for twin in same.moved]
        errors = {}
        for name, stack in same.trained.stacks.items():
            limit = bound(wanted[name], [m[name] for m in moved])
            errors[name] = distance(stack.core.grad, wanted[name]), limit
        return errors


def tensors_of(output):
    """The tensors in whatever a model returns, in their order."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    elif hasattr(output, "to_tuple"):
        output = output.to_tuple()
    if isinstance(output, list | tuple):
        return list(itertools.chain.from_iterable(tensors_of(part) for part in output))
    return []


def cast(value, dtype):
    """The inputs with their floating tensors in another dtype."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: cast(part, dtype) for key, part in value.items()}
    return type(value)(cast(p, dtype) for p in value) if isinstance(value, list | tuple) else value


def finite(tensor):
    """The tensor with zeros at masked positions, which hold infinities or NaN."""
    return torch.nan_to_num(tensor.detach(), nan=0.0, posinf=0.0, neginf=0.0)


def same_bits(a, b):
    """Whether two tensors are the same; NaN equals NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_floating_point():
        return torch.equal(torch.nan_to_num(a, nan=7e30), torch.nan_to_num(b, nan=7e30))
    return torch.equal(a, b)


def distance(a, b):
    """‖a - b‖ of two outputs; infinite if they are masked differently; 0 for integers."""
    if a.shape != b.shape:
        return float("inf")
    if not a.is_floating_point():
        return 0.0
    a, b = a.detach(), b.detach()
    if not torch.equal(torch.isfinite(a), torch.isfinite(b)):
        return float("inf")
    return float((finite(a).double() - finite(b).double()).norm())


def bound(wanted, moved):
    """How far ``wanted`` may be off, given its values with weights moved by one eps."""
    if not wanted.is_floating_point():
        return 0.0
    eps = torch.finfo(wanted.dtype).eps
    noise = max(distance(wanted, other) for other in moved)
    return TIMES * (noise + eps * float(finite(wanted).double().norm()))


def members(plan):
    """Names of the adapted layers."""
    return [member.module for stack in plan.stacks for member in stack.members]


def owner_of(model, name):
    """The module that holds the weight of a layer: the layer itself, or its attention."""
    try:
        model.get_submodule(name)
    except AttributeError:
        return name.rpartition(".")[0]
    return name


def weight_of(model, name):
    """The parameter with a layer's weight, and a function that views it as [n_out, n_in]."""
    owner = model.get_submodule(owner_of(model, name))
    if not isinstance(owner, nn.MultiheadAttention):
        is_transposed = any(base.__name__ == "Conv1D" for base in type(owner).__mro__)
        return owner.weight, (lambda t: t.T) if is_transposed else (lambda t: t)
    projection = name.rpartition(".")[2]
    if owner.in_proj_weight is None:
        return getattr(owner, f"{projection}_weight"), lambda t: t
    block = ("q_proj", "k_proj", "v_proj").index(projection)
    return owner.in_proj_weight, lambda t: t.chunk(3)[block]


def cores_of(model):
    """The trained parameters of an adapted model; also works for a copy without a handle."""
    return [p for p in model.parameters() if p.requires_grad]
