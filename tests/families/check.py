"""What an adapter promises, checked on any model: `check_family`.

Nothing here knows how layers are adapted. The model, its merged copy and plain torch say what is
right: the merged copy has plain layers, so its outputs are those of the adapted model, and the
gradients of its weights give the gradient of every core.

**The bound.** An adapted and a merged model round at other places. How far roundings move the
outputs of this very model is measured: `ROUNDINGS` times, every weight of the merged copy is moved
by one eps up or down, at random. The outputs may differ by `TIMES` the largest of these movements,
and that must be small beside what the adapter changed, or the check would see nothing.
"""

import copy
import io
import itertools
import pickle
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

import tcur_kernels as tcur

#: Random movements of the weights by one eps that say what roundings do to a model.
ROUNDINGS = 2
#: How many times the largest of them an adapted model may be off.
TIMES = 16
#: The bound must lie below this part of what the adapter changed.
VISIBLE = 0.05
#: The update of a weight, relative to the weight, that the random cores are made for.
UPDATE = 0.3


class BrokenPromise(AssertionError):
    """The name of a promise, and how a model broke it."""


class NoGradientError(Exception):
    """No output depends on a parameter in a way that autograd knows of."""


@dataclass(frozen=True)
class Family:
    """One model to check: where it comes from, how it is made, and what is known of it.

    Attributes:
        name: of the family, as its library calls it.
        library: the module that has to be there.
        build, inputs, smooth: as `check_family` takes them.
        way: how it is called, for the table.
        compiles: whether torch.compile is checked too, which takes seconds.
        refused: what `adapt` says of it, as a pattern, where it cannot be adapted.
        often: whether it is checked on every run of the tests.
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


@dataclass
class Report:
    """What was adapted, and what a reader of the table has to know."""

    layers: int = 0
    stacks: int = 0
    left_out: Counter = field(default_factory=Counter)  # reason -> modules
    silent: list[str] = field(default_factory=list)  # layers that no gradient reached
    notes: list[str] = field(default_factory=list)  # what the model itself cannot do
    refused: str = ""  # what `adapt` said of a model without a layer to adapt

    def __str__(self):
        lines = [f"{self.layers} layers in {self.stacks} stacks"]
        lines += [f"left out, {count}: {reason}" for reason, count in self.left_out.items()]
        lines += [f"no gradient: {name}" for name in self.silent]
        return "\n".join(lines + self.notes)


def check_family(build, inputs, promises=None, rank=4, smooth=True):
    """Holds an adapter to its promises on one model; returns a `Report`.

    Args:
        build: ``build(seed)`` makes the model anew: the same module tree with random weights that
            depend on the seed alone. Train or eval mode is kept as it comes.
        inputs: makes the keyword arguments of the model's forward, always the same.
        promises: names out of `PROMISES`; default all but "compile", which is slow.
        rank: of all stacks.
        smooth: False for a model that sorts, picks or rounds on its way, whose outputs in half
            precision are not near those in fp32. They must be finite there all the same.

    Raises:
        BrokenPromise: the first promise that does not hold, by name, and how.
    """
    if promises is None:
        promises = [name for name in PROMISES if name != "compile"]
    subject = Subject(build, inputs, rank, smooth)
    for name in promises:
        try:
            PROMISES[name](subject)
        except Exception as error:
            raise BrokenPromise(f"{name}: {type(error).__name__}: {error}") from error
    return subject.report


# -- what all checks share


class Subject:
    """One model as it is, adapted, and merged, with its outputs; each made when it is asked for."""

    def __init__(self, build, inputs, rank, smooth):
        self.build, self.inputs, self.rank, self.smooth = build, inputs, rank, smooth
        self.report = Report()

    def outputs(self, model, grad=False, dtype=None):
        """All tensors that the model returns, of always the same random numbers and inputs."""
        inputs = self.inputs() if dtype is None else cast(self.inputs(), dtype)
        torch.manual_seed(1)
        with torch.set_grad_enabled(grad):
            return tensors_of(model(**inputs))

    def adapted(self, seed=0):
        """A model of that seed, adapted; its cores are zero."""
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
        """Adapter with cores as training leaves them: not zero, and large enough to be seen."""
        _, adapter = self.adapted()
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for stack, plan in zip(adapter.stacks.values(), adapter.plan.stacks, strict=True):
                # Sums of n3² r² products of an entry of C, of U and of R, both of size 1/sqrt(n2).
                size = UPDATE * plan.n2**0.5 / (stack.core.shape[-1] * plan.n3)
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
        """Copies of the merged model, their weights moved by one eps."""
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
        """For every output, how far roundings may move it."""
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
        """Asserts that outputs are those of the merged copy, but for roundings."""
        limits = zip(outputs, self.merged_outputs, self.bounds, strict=True)
        for i, (actual, wanted, limit) in enumerate(limits):
            error = distance(actual, wanted)
            assert error <= limit, f"{what}: output {i} is off by {error:.3g}, bound {limit:.3g}"

    def loss(self, model):
        """A sum of all outputs with random weights, each output of size one; differentiable."""
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
        """Has a model of plain layers ask for the gradients of the weights of these alone."""
        weights = {name: weight_of(model, name) for name in layers}
        parameters = {id(p): p for p, _ in weights.values()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in parameters)
        return weights, parameters

    def weight_gradients(self, model):
        """Layer -> the gradient of its weight [n_out, n_in], or None, of a merged model."""
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
        """Stack -> the gradient of its core, by the formula, from those of a merged model."""
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
            c, r = base[:, :, list(stack.columns)], base[:, list(stack.rows)]
            c, g, r = (torch.fft.fft(t, dim=0) for t in (c, slices, r))
            core = torch.fft.ifft(c.mH @ g @ r.mH, dim=0).real
            cores[plan.name] = stack.alpha * core
        return gradients, cores


def tensors_of(output):
    """The tensors of whatever a model returns, in their order."""
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
    """Floating tensors of the inputs in another dtype."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: cast(part, dtype) for key, part in value.items()}
    return type(value)(cast(p, dtype) for p in value) if isinstance(value, list | tuple) else value


def finite(tensor):
    """Masked positions, which hold infinities or NaN, as zeros."""
    return torch.nan_to_num(tensor.detach(), nan=0.0, posinf=0.0, neginf=0.0)


def same_bits(a, b):
    """Whether two tensors are the same, NaN for NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_floating_point():
        return torch.equal(torch.nan_to_num(a, nan=7e30), torch.nan_to_num(b, nan=7e30))
    return torch.equal(a, b)


def distance(a, b):
    """‖a - b‖ of two outputs; infinite if they are masked elsewhere; 0 for integers."""
    if a.shape != b.shape:
        return float("inf")
    if not a.is_floating_point():
        return 0.0
    a, b = a.detach(), b.detach()
    if not torch.equal(torch.isfinite(a), torch.isfinite(b)):
        return float("inf")
    return float((finite(a).double() - finite(b).double()).norm())


def bound(wanted, moved):
    """How far ``wanted`` may be off, from what it is with weights moved by one eps."""
    if not wanted.is_floating_point():
        return 0.0
    eps = torch.finfo(wanted.dtype).eps
    noise = max(distance(wanted, other) for other in moved)
    return TIMES * (noise + eps * float(finite(wanted).double().norm()))


def members(plan):
    """Names of the adapted layers."""
    return [member.module for stack in plan.stacks for member in stack.members]


def owner_of(model, name):
    """The module that keeps the weight of a layer: itself, or the attention it is a part of."""
    try:
        model.get_submodule(name)
    except AttributeError:
        return name.rpartition(".")[0]
    return name


def weight_of(model, name):
    """The parameter with the weight of a layer, and how to view its like as [n_out, n_in]."""
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
    """The trained parameters of an adapted model, also of a copy that has no handle."""
    return [p for p in model.parameters() if p.requires_grad]


# -- the promises


def zero_core(s):
    """A core of zeros changes no bit of any output, with and without gradients.

    What torch computes depends on which weights ask for gradients, even where none is recorded:
    products are folded in another way, attention takes another kernel. Without gradients the
    adapted model computes what the model did as it came, whose parameters ask for them. With
    gradients some of what asked no longer does, so it is one of the ways that the model has.
    """
    wanted = {False: [s.base_outputs], True: []}
    model, adapter = s.adapted()
    s.base.requires_grad_()
    wanted[True].append(s.outputs(s.base, grad=True))
    for layers in (members(adapter.plan), []):
        s.only_trains(s.base, layers)
        wanted[True].append(s.outputs(s.base, grad=True))
    for grad, ways in wanted.items():
        outputs = s.outputs(model, grad)
        errors = [[distance(*pair) for pair in zip(outputs, way, strict=True)] for way in ways]
        is_one = any(all(map(same_bits, outputs, way)) for way in ways)
        assert is_one, (
            f"expected the same bits, got outputs that are off by {min(errors)} ({grad=})"
        )


def names(s):
    """The model's own entries of its state dict keep their names, and its modules stay."""
    model = s.build(0)
    modules, keys = dict(model.named_modules()), list(model.state_dict())
    tcur.adapt(model, rank=s.rank)
    missing = set(keys) - set(model.state_dict())
    assert not missing, f"expected the names of the state dict, got none of {sorted(missing)[:3]}"
    now = dict(model.named_modules())
    for name, module in modules.items():
        assert now.get(name) is module, f"expected the module {name} itself, got {now.get(name)}"


def hooks(s):
    """Forward hooks of layers run as often as they did."""
    layers = {owner_of(s.base, name) for name in members(s.trained.plan)}
    model = s.build(0)
    ran = Counter()
    for name in layers:
        count = _counting(ran, name)
        model.get_submodule(name).register_forward_hook(count)
    s.outputs(model)
    before = dict(ran)
    tcur.adapt(model, rank=s.rank)
    ran.clear()
    s.outputs(model)
    assert dict(ran) == before, f"expected hooks to run {before}, got {dict(ran)}"


def _counting(ran, name):
    def count(module, args, output):
        ran[name] += 1

    return count


def merged_copy(s):
    """The adapted model and a merged copy agree, and the copy is of plain layers."""
    s.near(s.trained_outputs, "adapted")
    # By name: torch's parametrizations make a class for each module.
    kinds = [type(module).__qualname__ for module in s.merged.modules()]
    own = [type(module).__qualname__ for module in s.base.modules()]
    assert kinds == own, "expected the model's own types"
    assert list(s.merged.state_dict()) == list(s.base.state_dict()), "expected the model's names"


def merge_in_place(s):
    """Merged in place the model computes the same; unmerged it has its state bit for bit."""
    model = s.trained.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    s.trained.merge()
    s.near(s.outputs(model), "merged in place")
    s.trained.unmerge()
    after = model.state_dict()
    assert list(after) == list(before), "unmerged: expected the same names in the state dict"
    for name, tensor in before.items():
        assert same_bits(after[name], tensor), f"unmerged: expected {name} as it was"
    s.near(s.outputs(model), "unmerged")


def saved(s, tmp):
    """Saved and loaded on the same base it is the same adapter."""
    s.trained.save(tmp)
    model = s.build(0)
    tcur.load_adapter(model, tmp)
    for a, b in zip(s.outputs(model), s.trained_outputs, strict=True):
        assert same_bits(a, b), f"loaded: off by {distance(a, b):.3g}"


def _saved_in_a_folder(s):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        saved(s, Path(folder) / "adapter.safetensors")


def state_dict(s):
    """The state dict carries the model to one that began with other weights."""
    model, _ = s.adapted(seed=1)
    model.load_state_dict(s.trained.model.state_dict())
    s.near(s.outputs(model), "state dict")


def gradients(s):
    """Every core gets the gradient that its layers' weights have, and nothing else gets one."""
    model = s.trained.model
    for parameter in model.parameters():
        parameter.grad = None
    try:
        by_weight, exact = s.core_gradients(s.merged)
    except NoGradientError:
        # Functions of a model's own, which ask their inputs alone. The adapted model says so, too.
        s.report.notes.append("no weight gets a gradient unless an input does, adapted or not")
        try:
            s.loss(model)
        except NoGradientError:
            return
        raise
    s.loss(model).backward()
    moved = [s.core_gradients(twin)[1] for twin in s.moved]
    s.report.silent = [
        name for name, gradient in by_weight.items() if gradient is None or not gradient.any()
    ]
    cores = {id(parameter): name for name, parameter in _named_cores(s.trained)}
    for name, parameter in model.named_parameters():
        is_core = id(parameter) in cores
        assert is_core or parameter.grad is None, f"expected no gradient of {name}, got one"
    for name, stack in s.trained.stacks.items():
        wanted, actual = exact[name], stack.core.grad
        if not wanted.any():
            assert actual is None or not actual.any(), f"{name}: expected no gradient, got one"
            continue
        assert actual is not None, f"{name}: expected a gradient of the core, got none"
        # A sum over all slices, formed in fp32: its terms are larger than what is left of them.
        limit = bound(wanted.float(), [m[name].float() for m in moved])
        error = distance(actual.double(), wanted)
        assert error <= limit, f"{name}: gradient is off by {error:.3g}, bound {limit:.3g}"
        for index, part in enumerate(actual):
            assert part.any(), f"{name}: expected a gradient of slice {index}, got zeros"
    if hasattr(s.trained, "unused"):
        ran = set(s.trained.unused()) - set(s.report.silent)
        assert not ran, f"expected layers without gradient as unused, got {sorted(ran)}"
    for parameter in model.parameters():
        parameter.grad = None
    for each in (model, s.merged):  # what a model keeps of its last call must have no graph
        s.outputs(each)


def _named_cores(adapter):
    return [(name, stack.core) for name, stack in adapter.stacks.items()]


def copies(s):
    """A deep copy, and a pickled one, compute the same, and what happens to them stays theirs."""
    model = s.trained.model
    twins = {"deep copy": copy.deepcopy(model)}
    if _pickles(s.merged):
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twins["pickle"] = torch.load(file, weights_only=False)
    else:
        s.report.notes.append("does not pickle, adapted or not")
    for what, twin in twins.items():
        s.near(s.outputs(twin), what)
        cores = cores_of(twin)
        assert len(cores) == len(s.trained.stacks), f"{what}: expected its cores, got {len(cores)}"
        with torch.no_grad():
            for core in cores:
                core.zero_()
        for a, b in zip(s.outputs(twin), s.base_outputs, strict=True):
            assert same_bits(a, b), f"{what}: expected the base with cores of zero, got another"
        s.near(s.outputs(model), f"{what}, its cores written: the model it was made from")


def _pickles(model):
    try:
        torch.save(model, io.BytesIO())
    except (AttributeError, TypeError, RuntimeError, pickle.PicklingError):
        return False
    return True


def dtypes(s):
    """Moved to float64 and to bfloat16, the model runs where it did, and computes nearly that."""
    for dtype in (torch.float64, torch.bfloat16):
        plain = copy.deepcopy(s.merged).to(dtype)
        try:
            wanted = s.outputs(plain, dtype=dtype)
        except Exception as error:
            kind = str(dtype).removeprefix("torch.")
            s.report.notes.append(f"does not run in {kind} ({type(error).__name__})")
            continue
        actual = s.outputs(copy.deepcopy(s.trained.model).to(dtype), dtype=dtype)
        for i, (a, w, fp32) in enumerate(zip(actual, wanted, s.merged_outputs, strict=True)):
            if not a.is_floating_point():
                continue
            assert a.dtype == w.dtype, f"output {i}: expected {w.dtype}, got {a.dtype}"
            if not s.smooth:
                is_finite = torch.isfinite(a).all() or not torch.isfinite(w).all()
                assert is_finite, f"output {i}: expected finite numbers in {dtype}"
            else:
                own = distance(w.float(), fp32)
                error, limit = distance(a.float(), fp32), 4 * own + s.bounds[i]
                message = f"output {i} in {dtype} is off by {error:.3g}, bound {limit:.3g}"
                assert error <= limit, message


def compiled(s):
    """The compiled model computes the same and has the same gradients, whole where the base is."""

    def run(model, whole):
        torch._dynamo.reset()
        function = torch.compile(model, backend="aot_eager", fullgraph=whole)
        return function, s.outputs(function)

    try:
        run(s.base, True)
        whole = True
    except Exception:
        whole = False
        s.report.notes.append("does not compile with fullgraph, adapted or not")
        try:
            run(s.base, False)
        except Exception as error:
            s.report.notes.append(f"does not compile, adapted or not ({type(error).__name__})")
            return
    model = s.trained.model
    function, outputs = run(model, whole)
    s.near(outputs, "compiled")
    s.loss(function).backward()
    actual = {name: stack.core.grad.clone() for name, stack in s.trained.stacks.items()}
    model.zero_grad()
    s.loss(model).backward()
    _, exact = s.core_gradients(s.merged)
    moved = [s.core_gradients(twin)[1] for twin in s.moved]
    for name, gradient in actual.items():
        limit = bound(exact[name].float(), [m[name].float() for m in moved])
        error = distance(gradient.double(), exact[name])
        assert error <= limit, f"{name}: gradient is off by {error:.3g}, bound {limit:.3g}"
    torch._dynamo.reset()


#: All promises, in the order in which they are checked. "compile" takes seconds.
PROMISES = {
    "zero core": zero_core,
    "names": names,
    "hooks": hooks,
    "merged copy": merged_copy,
    "merged in place": merge_in_place,
    "saved and loaded": _saved_in_a_folder,
    "state dict": state_dict,
    "gradients": gradients,
    "copies": copies,
    "dtypes": dtypes,
    "compile": compiled,
}


def broken_promises(build, inputs, promises=None, **settings):
    """All that is broken, by name, for a survey; empty if nothing is. The report comes beside."""
    subject, broken = Subject(build, inputs, **{"rank": 4, "smooth": True, **settings}), {}
    for name in promises or [name for name in PROMISES if name != "compile"]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                PROMISES[name](subject)
            except Exception as error:
                broken[name] = f"{type(error).__name__}: {error}"
    return broken, subject.report
