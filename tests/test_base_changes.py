"""C and R are slices of the base weights that are there now, whatever happened to them."""

import copy
import threading

import pytest
import torch
from torch import nn

import tcur_kernels as tcur
from plain import Plain
from tolerance import assert_composition_close, same_mathematics

WIDTH = 12


class Fused(nn.Module):
    """A fused projection, and an attention that reads its weights."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 3, batch_first=True)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.attention(self.out(q), k, v, need_weights=False)[0]


def adapted(seed=0, rank=3, **kwargs):
    model = Fused(seed)
    adapter = tcur.adapt(model, rank=rank, **kwargs)
    torch.manual_seed(seed + 7)
    with torch.no_grad():
        for stack in adapter.stacks.values():
            stack.core.normal_(std=0.5)
    return model, adapter


@pytest.fixture
def x():
    torch.manual_seed(3)
    return torch.randn(2, 5, WIDTH)


def assert_of_its_base(model, adapter, x):
    """By plain torch: W of the model now, and C and R taken from it here."""
    plain, exact = Plain(adapter, torch.float32), Plain(adapter, torch.float64)
    assert_composition_close(model(x), lambda: plain(x), exact(x.double()))


CHANGES = {
    "init": lambda m: m.apply(_init),
    "reset": lambda m: [p.reset_parameters() for p in (m.qkv, m.out)],
    "no_grad": lambda m: _each(m, lambda w: w.mul_(1.5)),
    "assign": lambda m: setattr(m.out, "weight", nn.Parameter(torch.eye(WIDTH))),
    "load": lambda m: m.load_state_dict(Fused(5).state_dict(), strict=False),
    "load assigned": lambda m: m.load_state_dict(Fused(5).state_dict(), strict=False, assign=True),
    "load a part": lambda m: m.attention.load_state_dict(Fused(5).attention.state_dict()),
    "past the counters": lambda m: [p.data.normal_() for p in _weights(m)],
    "to empty": lambda m: (m.to_empty(device="cpu"), _refill(m)),
    "half and back": lambda m: m.half().float(),
}


def _init(module):
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)


def _weights(model):
    return [p for n, p in model.named_parameters() if "weight" in n]


@torch.no_grad()
def _each(model, change):
    for weight in _weights(model):
        change(weight)


def _refill(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)


@pytest.mark.parametrize("basis", ["orthonormal", "slices"])
@pytest.mark.parametrize("mode", ["auto", "materialized", "factored"])
@pytest.mark.parametrize("change", CHANGES)
def test_c_and_r_follow_the_base(change, mode, basis, x, tmp_path):
    model, adapter = adapted(mode=mode, basis=basis)
    assert_of_its_base(model, adapter, x)
    CHANGES[change](model)
    assert_of_its_base(model, adapter, x)
    merged, y = adapter.merge(inplace=False)(x), model(x)
    assert (merged - y).norm() < 1e-5 * y.norm()
    adapter.save(tmp_path / "a")
    fresh = Fused()
    state = {k: v for k, v in model.state_dict().items() if not k.startswith(("tcur_", "tcur."))}
    fresh.load_state_dict(state)
    tcur.load_adapter(fresh, tmp_path / "a")
    assert torch.equal(fresh(x), model(x))


def _in_a_row():
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(3)])


@pytest.mark.parametrize("index", [0, 1])
def test_one_layer_that_changed_past_the_counters_is_noticed_in_turn(index, x):
    """Every pass looks at another layer."""
    model = _in_a_row()[:2]
    adapter = tcur.adapt(model, rank=3)
    for stack in adapter.stacks.values():
        nn.init.normal_(stack.core, std=0.5)
    assert_of_its_base(model, adapter, x)
    model[index].base_weight.data.normal_()
    model(x), model(x)
    assert_of_its_base(model, adapter, x)


def test_who_holds_a_part_of_w_eff_keeps_its_numbers(x):
    model = _in_a_row()
    adapter = tcur.adapt(model, rank=3, mode="materialized")
    (stack,) = adapter.stacks.values()
    with torch.no_grad():
        model(x)
        part = stack.effective_value(stack.places[1])[2:5]
        before = part.clone()
        stack.core.normal_(std=0.5)
        model(x)
        assert torch.equal(part, before)
        assert not torch.equal(stack.effective_value(stack.places[1])[2:5], before)


def test_a_write_into_w_eff_itself_is_refused_until_it_is_built_again(x):
    model = _in_a_row()
    adapter = tcur.adapt(model, rank=3, mode="materialized")
    (stack,) = adapter.stacks.values()
    nn.init.normal_(stack.core, std=0.5)
    with torch.no_grad():
        stack.effective_value(stack.places[0]).mul_(2)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"weight: expected W_eff as it was built, got one"):
            model(x)
    adapter.invalidate()
    model(x)  # all layers have run
    assert_of_its_base(model, adapter, x)


@pytest.mark.parametrize("mode", ["materialized", "factored"])
def test_a_base_that_is_noticed_in_inference_mode_is_trained_with(mode, x):
    model, adapter = adapted(mode=mode)
    model(x)
    CHANGES["no_grad"](model)
    with torch.inference_mode():
        model(x)
    model(x).square().sum().backward()
    assert all(core.grad.any() for core in adapter.parameters())
    for stack in adapter.stacks.values():  # nor has autograd anything against C and R themselves
        assert not stack.lateral.is_inference()
        assert not stack.horizontal.is_inference()
    assert_of_its_base(model, adapter, x)


@torch.inference_mode()
def test_a_checkpoint_reaches_weights_without_version_counters(x):
    """Inference tensors have none, and a pass looks at one number of one layer alone."""
    model = _in_a_row()
    adapter = tcur.adapt(model, rank=3)
    for stack in adapter.stacks.values():
        stack.core.normal_(std=0.5)
    assert_of_its_base(model, adapter, x)
    for index in range(3):
        model.load_state_dict({f"{index}.weight": torch.randn(WIDTH, WIDTH)}, strict=False)
        assert_of_its_base(model, adapter, x)


@pytest.mark.parametrize("make", [Fused, _in_a_row])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cores_keep_their_numbers_where_a_model_is_emptied(make, dtype):
    """Models come off the meta device by `to_empty`, where an adapter is there already."""
    model = make().to(dtype)
    adapter = tcur.adapt(model, rank=3)
    for stack in adapter.stacks.values():
        nn.init.normal_(stack.core)
    state = copy.deepcopy(model.state_dict())
    before = {name: core.detach().clone() for name, core in adapter.named_parameters()}
    torch.use_deterministic_algorithms(True)  # what was never written is NaN
    try:
        model.to_empty(device="cpu")
        after = dict(adapter.named_parameters())
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert all(core.dtype == torch.float32 for core in after.values())
        model.to("meta").to_empty(device="cpu")  # where numbers are lost
        assert all(not core.any() for _, core in adapter.named_parameters())
    finally:
        torch.use_deterministic_algorithms(False)
    model.load_state_dict(state)
    fresh = make().to(dtype)
    tcur.adapt(fresh, rank=3)
    fresh.load_state_dict(state)
    x = torch.randn(2, 5, WIDTH).to(dtype)
    assert torch.equal(model(x), fresh(x))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("basis", ["orthonormal", "slices"])
def test_a_state_dict_is_all_there_is_to_know(assign, ran, basis, x):
    model, _ = adapted(0, selection="uniform", basis=basis)
    other, other_adapter = adapted(1, selection="uniform", basis=basis)
    if ran:
        other(x)
    result = other.load_state_dict(copy.deepcopy(model.state_dict()), assign=assign)
    assert not result.missing_keys
    assert torch.equal(other(x), model(x))
    assert_of_its_base(other, other_adapter, x)


def test_a_model_on_meta_is_filled_by_a_checkpoint(x):
    model, _ = adapted(0)
    other, adapter = adapted(1)
    other.to("meta")
    other.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(other(x), model(x))
    assert_of_its_base(other, adapter, x)


def test_compiled_models_take_what_a_checkpoint_brings(x):
    model, _ = adapted(0)
    other, _ = adapted(1)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    compiled(x)
    other.load_state_dict(model.state_dict())
    assert same_mathematics(compiled(x), model(x))


def test_merged_checkpoints_do_not_count_twice(x):
    model, adapter = adapted(0)
    y = model(x)
    adapter.merge()
    assert same_mathematics(model(x), y)
    with pytest.warns(UserWarning, match="the model is merged in place"):
        saved = copy.deepcopy(model.state_dict())
    for merged in (False, True):
        other, other_adapter = adapted(1)
        if merged:
            other(x)
            other_adapter.merge()
        other.load_state_dict(saved)
        assert same_mathematics(other(x), y)
        if merged:
            other_adapter.unmerge()
        assert same_mathematics(other(x), y)
        base = Fused(0)
        assert torch.equal(other.qkv.base_weight, base.qkv.weight)
        assert torch.equal(other.attention.base_in_proj_weight, base.attention.in_proj_weight)
    plain = Fused()
    with pytest.raises(RuntimeError, match="Unexpected key"):
        plain.load_state_dict(saved)


def test_weights_loaded_while_merged_survive_unmerge(x):
    model, adapter = adapted(0)
    model(x)
    adapter.merge()
    model.load_state_dict(Fused(5).state_dict(), strict=False)
    merged = model(x)
    adapter.unmerge()
    assert same_mathematics(model(x), merged)
    assert torch.equal(model.out.base_weight, Fused(5).out.weight)
    assert_of_its_base(model, adapter, x)


def test_copies_of_merged_weights_move_along(x):
    model, adapter = adapted(0)
    model(x)
    adapter.merge()
    model.double()
    adapter.unmerge()
    assert model.out.base_weight.dtype == torch.float64
    assert torch.equal(model.out.base_weight, Fused(0).out.weight.double())


def test_a_save_does_not_certify_what_was_not_computed_with(x, tmp_path):
    """Written past the counters after the last forward: what that computed with is gone."""
    model, adapter = adapted()
    model(x)
    model.out.base_weight.data[0, 0] += 1.0
    adapter.stacks["12x12"].base._turn = 0
    rows = adapter.stacks["12x12"].rows
    model.out.base_weight.data[rows[0]] += 1.0
    with pytest.raises(ValueError, match=r"base: expected the weights that C and R of stack 12x12"):
        adapter.save(tmp_path / "a")
    adapter.invalidate()
    adapter.save(tmp_path / "a")
    assert_of_its_base(model, adapter, x)


def test_training_and_evaluation_look_at_all_weights(x):
    model, adapter = adapted()
    model(x)
    stack = adapter.stacks["12x12"]
    (place,) = (place for place in stack.places if place.name == "out")
    # One number of C, which is none of those that every call looks at.
    seen = {row for of, row, _, _ in stack.base._samples if of is place}
    row = next(row for row in range(12) if row not in seen)
    model.out.base_weight.data[row, stack.columns[0]] += 3.0
    model.eval()
    assert_of_its_base(model, adapter, x)


def test_a_base_that_is_not_finite_is_refused(x):
    model, _ = adapted()
    model(x)
    with torch.no_grad():
        model.out.base_weight.fill_(float("nan"))
    for _ in range(2):  # refused once, it is not taken for known
        with pytest.raises(ValueError, match="expected finite numbers"):
            model(x)


def test_c_and_r_of_a_file_are_kept_whatever_the_base(x, tmp_path):
    _, adapter = adapted(0)
    adapter.save(tmp_path / "a", factors=True)
    other = Fused(1)
    loaded = tcur.load_adapter(other, tmp_path / "a", strict=False)
    for name, stack in loaded.stacks.items():
        assert torch.equal(stack.lateral, adapter.stacks[name].lateral)
    y = other(x)
    twin = Fused(2)
    again = tcur.load_adapter(twin, tmp_path / "a", strict=False)
    twin.load_state_dict(other.state_dict())
    assert torch.equal(twin(x), y)
    twin.double()
    assert same_mathematics(twin(x.double()).float(), y)
    for name, stack in again.stacks.items():
        assert torch.equal(stack.lateral.float(), adapter.stacks[name].lateral)


def test_threads_may_build_w_eff_at_once():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)])
    adapter = tcur.adapt(model, rank=4, mode="materialized")
    x, outputs = torch.randn(8, 64), {}
    for _ in range(10):
        with torch.no_grad():
            adapter.stacks["64x64"].core.normal_(std=0.3)

        def run(key):
            with torch.no_grad():
                outputs[key] = [model(x) for _ in range(3)]

        threads = [threading.Thread(target=run, args=(key,)) for key in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with torch.no_grad():
            expected = adapter.merge(inplace=False)(x)
        assert all(same_mathematics(y, expected) for ys in outputs.values() for y in ys)


def test_functional_calls_go_by_the_state_that_they_get(x):
    model, _ = adapted(0, selection="uniform")
    other, _ = adapted(1, selection="uniform")
    before, wanted = model(x), other(x)
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    assert same_mathematics(torch.func.functional_call(model, state, (x,)), wanted)
    assert torch.equal(model(x), before)


def test_stacked_models_are_refused(x):
    models = [adapted(seed)[0] for seed in range(2)]
    parameters, buffers = torch.func.stack_module_state(models)

    def run(parameters, buffers):
        return torch.func.functional_call(models[0], (parameters, buffers), (x,))

    with pytest.raises(ValueError, match="weight: expected one base weight for all, got a batch"):
        torch.vmap(run)(parameters, buffers)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traces_compute_the_same(x):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    adapter = tcur.adapt(model, rank=3)
    with torch.no_grad():
        adapter.stacks["12x12"].core.normal_()
    traced = torch.jit.trace(model, x, check_trace=False)
    assert same_mathematics(traced(x[:1]), model(x[:1]))


def test_parametrised_after_it_was_adapted(x):
    model, _ = adapted()
    nn.utils.parametrizations.weight_norm(model.out)
    with pytest.raises(RuntimeError, match="weight: expected a parameter of out, got none"):
        model(x)
