"""Reentrant checkpoints that would leave cores without gradients are refused, and no others."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import tcur_kernels as tcur
from adapted import randomise
from models import Checkpointed, Tiny
from tcur_kernels import checkpoints
from tolerance import assert_equal_in_float64

#: torch warns of the same inputs, also where nobody wants gradients; it does not know of cores.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")

REFUSED = pytest.raises(
    RuntimeError, match="checkpoint: expected use_reentrant=False, or an input that requires grad"
)


class Attended(nn.Module):
    """An attention of torch, whose weights are read."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Reads(nn.Module):
    """Never calls its layers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        return nn.functional.linear(x @ self.layers[0].weight.T, self.layers[1].weight)


def conv1ds():
    from transformers.pytorch_utils import Conv1D

    return nn.Sequential(Conv1D(8, 8), Conv1D(8, 8))


MODELS = {
    "linear": lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).double(),
    "attention": lambda: Attended().double(),
    "reads": lambda: Reads().double(),
    "conv1d": lambda: conv1ds().double(),
}
HOW = pytest.mark.parametrize("mode", ["materialized", "factored", "auto"])


def adapted(model, **kwargs):
    torch.manual_seed(0)
    adapter = tcur.adapt(model, rank=2, **kwargs)
    randomise(adapter)
    return adapter


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(3, 4, 8, dtype=torch.float64)


@HOW
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("training", [True, False])
def test_all_layers_refuse_it(kind, mode, training, x):
    model = MODELS[kind]()
    adapter = adapted(model, mode=mode)
    model.train(training)
    with REFUSED:
        checkpoint(model, x, use_reentrant=True)
    model(x).sum().backward()
    wanted = [core.grad.clone() for core in adapter.parameters()]
    for inputs, use_reentrant in ((x, False), (x.clone().requires_grad_(), True)):
        adapter.model.zero_grad()
        checkpoint(model, inputs, use_reentrant=use_reentrant).sum().backward()
        for core, grad in zip(adapter.parameters(), wanted, strict=True):
            assert_equal_in_float64(core.grad, grad)


def test_a_model_of_checkpointed_blocks():
    adapter = adapted(Tiny(), train_also=("head",))
    x = torch.randn(4, 7, 6)
    with REFUSED:
        Checkpointed(adapter.model)(x)
    Checkpointed(adapter.model)(x.requires_grad_()).sum().backward()
    assert all(core.grad.abs().max() > 0 for core in adapter.parameters())


def test_checkpoint_sequential(x):
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)]).double()
    adapter = adapted(model)
    with REFUSED:
        checkpoint_sequential(model, 3, x, use_reentrant=True)
    checkpoint_sequential(model, 3, x.requires_grad_(), use_reentrant=True).sum().backward()
    assert all(core.grad.abs().max() > 0 for core in adapter.parameters())


def test_inputs_within_others_do_not_count(x):
    """As for torch: it connects tensors among the arguments alone."""
    model = MODELS["linear"]()
    adapted(model)
    x.requires_grad_()
    with REFUSED:
        checkpoint(lambda inputs: model(inputs["x"]), {"x": x}, use_reentrant=True)
    assert checkpoint(lambda _, x: model(x), {"x": x}, x, use_reentrant=True).requires_grad


def without_grad(call):
    with torch.no_grad():
        return call()


def with_grad_switched_off(call):
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    try:
        return call()
    finally:
        torch.set_grad_enabled(before)


EVALUATIONS = {
    "no_grad": without_grad,
    "decorated": lambda call: torch.no_grad()(call)(),
    "switched off": with_grad_switched_off,
    "inference": lambda call: torch.inference_mode()(call)(),
}


@pytest.mark.parametrize("way", EVALUATIONS)
@pytest.mark.parametrize("kind", MODELS)
def test_an_evaluation_through_checkpoints_goes_on(way, kind, x):
    """Gradients were off before the checkpoint: nobody asked for any."""
    model = MODELS[kind]()
    adapted(model)
    plain = EVALUATIONS[way](lambda: model(x))
    through = EVALUATIONS[way](lambda: checkpoint(model, x, use_reentrant=True))
    assert torch.equal(through, plain)
    with REFUSED:  # the evaluation left nothing behind
        checkpoint(model, x, use_reentrant=True)
    assert torch.equal(EVALUATIONS[way](lambda: checkpoint(model, x, use_reentrant=True)), plain)


def test_an_evaluation_beside_a_checkpoint_goes_on(x):
    """In the code around a checkpoint, before it and after it, and within one that is right."""
    model = MODELS["linear"]()
    adapted(model)
    wanted = without_grad(lambda: model(x))

    def block(h):
        assert torch.equal(without_grad(lambda: model(x)), wanted)
        return model(h)

    def enclosing(h):
        assert torch.equal(without_grad(lambda: model(x)), wanted)
        h = checkpoint(block, h, use_reentrant=True)
        assert torch.equal(without_grad(lambda: model(x)), wanted)
        return h

    y = checkpoint(enclosing, x.clone().requires_grad_(), use_reentrant=True)
    y.sum().backward()
    frozen = checkpoint(lambda h: h + 1, x, use_reentrant=True)  # no adapted layer in it
    assert torch.equal(without_grad(lambda: model(x)), wanted)
    assert model(frozen).requires_grad


def test_nested_checkpoints(x):
    """The inner one is looked at when gradients are on: at once, or in the outer's backward."""
    model = MODELS["linear"]()
    adapted(model)

    def nested(first):
        inner = x if first is None else first
        return lambda h: h + checkpoint(model, inner, use_reentrant=True)

    loses = checkpoint(nested(None), x.clone().requires_grad_(), use_reentrant=True)
    with REFUSED:
        loses.sum().backward()
    with REFUSED:
        checkpoint(lambda h: checkpoint(model, h, use_reentrant=True), x, use_reentrant=True)
    x = x.clone().requires_grad_()
    checkpoint(
        lambda h: checkpoint(model, h, use_reentrant=True), x, use_reentrant=True
    ).sum().backward()
    assert x.grad.abs().max() > 0


def test_gradients_that_a_block_takes_itself(x):
    """Within its own enable_grad a core gets what the block asks for."""
    model = MODELS["linear"]()
    adapter = adapted(model)

    def block(h):
        with torch.enable_grad():
            (grad,) = torch.autograd.grad(model(h).sum(), adapter.stacks["8x8"].core)
        return h * grad.sum()

    assert checkpoint(block, x, use_reentrant=True).shape == x.shape


def test_what_needs_no_gradient_is_not_refused(x):
    model = MODELS["linear"]()
    adapter = adapted(model)
    core = adapter.stacks["8x8"].core

    def through():
        return checkpoint(model, x, use_reentrant=True)

    with adapter.disable():
        through()
    core.requires_grad_(False)
    through()
    core.requires_grad_(True)
    adapter.merge()
    through()
    adapter.unmerge()
    cores = adapter.stack_cores(["default"])
    with adapter.batch(cores, torch.zeros(3, dtype=torch.int64)):
        through()
    cores["8x8"].requires_grad_(True)
    with adapter.batch(cores, torch.zeros(3, dtype=torch.int64)), REFUSED:
        through()
    with REFUSED:
        through()
    checkpoint(adapter.merge(inplace=False), x, use_reentrant=True)


def test_an_error_within_a_checkpoint_leaves_nothing_behind(x):
    model = MODELS["linear"]()
    adapted(model)
    with pytest.raises(ValueError, match="x: expected"):
        without_grad(lambda: checkpoint(model, x[..., :3], use_reentrant=True))
    with pytest.raises(ZeroDivisionError):
        checkpoint(lambda h: h / (1 // 0), x, use_reentrant=True)
    without_grad(lambda: model(x))


def test_copies_refuse_it(x):
    model = MODELS["linear"]()
    adapted(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with REFUSED:
            checkpoint(twin, x, use_reentrant=True)


def test_torchs_checkpoint_is_watched_once():
    before = checkpoints.CheckpointFunction.apply
    adapted(MODELS["linear"]())
    assert checkpoints.CheckpointFunction.apply is before
    assert before.__wrapped__.__func__ is torch.autograd.Function.apply.__func__


def test_compiled_blocks_within_right_checkpoints(x):
    model = MODELS["linear"]()
    adapter = adapted(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    checkpoint(compiled, x.requires_grad_(), use_reentrant=True).sum().backward()
    got = [core.grad.clone() for core in adapter.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    for core, grad in zip(adapter.parameters(), got, strict=True):
        assert_equal_in_float64(core.grad, grad)


@pytest.mark.parametrize("needs_grad", [False, True])
def test_compiled_models_get_their_gradients(needs_grad):
    """Compilers make both kinds of checkpoint the same."""
    adapter = adapted(Tiny().double())
    x = torch.randn(4, 7, 6, dtype=torch.float64, requires_grad=needs_grad)
    torch._dynamo.reset()
    torch.compile(Checkpointed(adapter.model), backend="aot_eager")(x).sum().backward()
    got = [core.grad.clone() for core in adapter.parameters()]
    adapter.model.zero_grad()
    adapter.model(x).sum().backward()
    for core, grad in zip(adapter.parameters(), got, strict=True):
        assert_equal_in_float64(core.grad, grad)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_transformers(use_reentrant):
    """A ViT: of models that take pixels, transformers itself makes no input require grad."""
    pytest.importorskip("transformers")
    from hf_models import HF_MODELS

    make, make_inputs, _ = HF_MODELS["vit"]
    model, inputs = make(), make_inputs()
    adapter = adapted(model)
    how = {"use_reentrant": use_reentrant}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    model.train()
    if use_reentrant:
        with REFUSED:
            model(**inputs)
        model.enable_input_require_grads()
    model(**inputs).logits.sum().backward()
    assert all(core.grad.abs().max() > 0 for core in adapter.parameters())
    without_grad(lambda: model(**inputs))


@pytest.mark.parametrize("adapters", [["default"], ["default", "second"]])
@pytest.mark.parametrize("reads", [False, True])
def test_peft(adapters, reads, x):
    pytest.importorskip("peft")
    from peft import get_peft_model

    from tcur_kernels.peft import TCURConfig

    base = MODELS["reads" if reads else "linear"]()
    model = get_peft_model(base, TCURConfig(rank=2, target_modules="all-linear"))
    model.add_adapter("second", TCURConfig(rank=2, target_modules="all-linear"))
    model.base_model.set_adapter(adapters)
    with REFUSED:
        checkpoint(model, x, use_reentrant=True)
    without_grad(lambda: checkpoint(model, x, use_reentrant=True))
    checkpoint(model, x.clone().requires_grad_(), use_reentrant=True).sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == len(adapters)
    assert all(core.grad.abs().max() > 0 for core in trained)
    with model.disable_adapter():
        checkpoint(model, x, use_reentrant=True)


def test_the_update_of_tokens_alone_is_refused_as_well():
    """Experts take it, whose base is a product of their own."""
    linears = [nn.Linear(8, 8).requires_grad_(False) for _ in range(2)]
    stack, x = tcur.TProductStack(linears, rank=2), torch.randn(3, 8)

    def update(x):
        return stack.update_of_tokens(x, stack.places[0], False)

    with REFUSED:
        checkpoint(update, x, use_reentrant=True)
    checkpoint(update, x, use_reentrant=False).sum().backward()
    assert stack.core.grad.any() or not stack.core.any()
    stack.core.requires_grad_(False)
    checkpoint(update, x, use_reentrant=True)
