"""`check_family` checks on any model what an adapter promises.

The checks do not know how layers are adapted. They compare with the model itself, its merged copy
and plain torch. The merged copy has plain layers, so its outputs must be those of the adapted
model, and the gradients of its weights give the gradient of every core.

**The bound.** An adapted and a merged model round at different places. The check measures how much
rounding changes the outputs of this model: `ROUNDINGS` times it moves every weight of the merged
copy by one eps up or down, at random. The outputs may differ by `TIMES` the largest resulting
change. That bound must be small compared with what the adapter changed, or the check could not
detect anything.
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
    """Checks the promises of an adapter on one model; returns a `Report`.

    Args:
        build: ``build(seed)`` makes a new model: the same module tree, with random weights that
            depend only on the seed. The check keeps its train or eval mode.
        inputs: makes the keyword arguments of the model's forward, always the same.
        promises: names from `PROMISES`; by default all but "compile", which is slow.
        rank: of all stacks.
        smooth: False if the model sorts, picks or rounds in its forward. Its outputs in half
            precision are then not near those in fp32, but they must be finite.

    Raises:
        BrokenPromise: a promise does not hold; the message names the first one and says why.
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

    What torch computes depends on which weights require grad, even if no gradient is recorded: it
    folds products differently, and attention uses another kernel. The adapted model must therefore
    agree with the original model in one of several states. Without gradients: as it was built; or
    with everything frozen but the layers of the stacks, since torch alone computes layers that are
    left out. With gradients: all parameters require grad, or only those layers, or nothing.
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
    """The model's own entries of its state dict keep their names; its modules stay the same."""
    model = s.build(0)
    modules, keys = dict(model.named_modules()), list(model.state_dict())
    tcur.adapt(model, rank=s.rank)
    missing = set(keys) - set(model.state_dict())
    assert not missing, f"expected the names of the state dict, got none of {sorted(missing)[:3]}"
    now = dict(model.named_modules())
    for name, module in modules.items():
        assert now.get(name) is module, f"expected the module {name} itself, got {now.get(name)}"


def hooks(s):
    """Forward hooks of layers run as often as before."""
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
    """The adapted model and a merged copy agree, and the copy has only plain layers."""
    s.near(s.trained_outputs, "adapted")
    # Compare names, because torch's parametrizations make a new class for each module.
    kinds = [type(module).__qualname__ for module in s.merged.modules()]
    own = [type(module).__qualname__ for module in s.base.modules()]
    assert kinds == own, "expected the model's own types"
    assert list(s.merged.state_dict()) == list(s.base.state_dict()), "expected the model's names"


def merge_in_place(s):
    """Merged in place, the model computes the same; unmerged, it has its old state bit for bit."""
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
    """An adapter that is saved and loaded on the same base is the same adapter."""
    s.trained.save(tmp)
    model = s.build(0)
    tcur.load_adapter(model, tmp)
    for a, b in zip(s.outputs(model), s.trained_outputs, strict=True):
        assert same_bits(a, b), f"loaded: off by {distance(a, b):.3g}"


def _saved_in_a_folder(s):
    with tempfile.TemporaryDirectory() as folder:
        saved(s, Path(folder) / "adapter.safetensors")


def state_dict(s):
    """Loading the state dict into a model with other weights gives the same model."""
    model, _ = s.adapted(seed=1)
    model.load_state_dict(s.trained.model.state_dict())
    s.near(s.outputs(model), "state dict")


def gradients(s):
    """Every core gets the gradient that follows from its layers' weights; nothing else gets one."""
    model = s.trained.model
    for parameter in model.parameters():
        parameter.grad = None
    try:
        by_weight, exact = s.core_gradients(s.merged)
    except NoGradientError:
        # The model has its own functions, which only check their inputs. Adapted, it does the same.
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
        s.right_gradient(name, actual, wanted, moved)
        for index, part in enumerate(actual):
            assert part.any(), f"{name}: expected a gradient of slice {index}, got zeros"
    if hasattr(s.trained, "unused"):
        ran = set(s.trained.unused()) - set(s.report.silent)
        assert not ran, f"expected layers without gradient as unused, got {sorted(ran)}"
    for parameter in model.parameters():
        parameter.grad = None
    for each in (model, s.merged):  # tensors that a model keeps of its last call must have no graph
        s.outputs(each)


def _named_cores(adapter):
    return [(name, stack.core) for name, stack in adapter.stacks.items()]


def copies(s):
    """A deep copy and a pickled copy compute the same, and are independent of the original."""
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
    """Cast to float64 and bfloat16, the model runs wherever the base does, with close results."""
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
    """Compiled, the model has the same outputs and gradients; in one graph if the base is."""

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


#: All promises, in the order of the checks. "compile" takes seconds.
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
    """All broken promises, by name, for a survey, and the report."""
    subject, broken = Subject(build, inputs, **{"rank": 4, "smooth": True, **settings}), {}
    for name in promises or [name for name in PROMISES if name != "compile"]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                PROMISES[name](subject)
            except Exception as error:
                broken[name] = f"{type(error).__name__}: {error}"
    return broken, subject.report
