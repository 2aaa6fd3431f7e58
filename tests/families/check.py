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
import pickle
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import torch

import tcur_kernels as tcur

from .subject import (
    NoGradientError,
    Subject,
    bound,
    cores_of,
    distance,
    members,
    owner_of,
    same_bits,
)


class BrokenPromise(AssertionError):
    """The name of a promise, and how a model broke it."""


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


# -- the promises


def zero_core(s):
    """A core of zeros changes no bit of any output, with and without gradients.

    What torch computes depends on which weights ask for gradients, even where none is recorded:
    products are folded in another way, attention takes another kernel. Without gradients the
    adapted model computes what the model did as it came, whose parameters ask for them, or did with
    those frozen that are no layers of a stack: a layer that is left out is torch's alone. With
    gradients some of what asked no longer does, so it is one of the ways that the model has.
    """
    wanted = {False: [s.base_outputs], True: []}
    model, adapter = s.adapted()
    s.base.requires_grad_()
    wanted[True].append(s.outputs(s.base, grad=True))
    for layers in (members(adapter.plan), []):
        s.only_trains(s.base, layers)
        if layers:
            wanted[False].append(s.outputs(s.base))
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
        for a, b in zip(s.outputs(twin), s.outputs(s.adapted()[0]), strict=True):
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
