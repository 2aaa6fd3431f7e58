"""Gradients of a base model, and ranks that share out a number of trained numbers by them."""

import copy
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import hf_models
import oracle
import tcur_kernels as tcur
from models import Tiny
from tcur_kernels import cli
from tcur_kernels.adapters.budget import within_budget
from tcur_kernels.adapters.plan import make_plan
from tcur_kernels.decompose import HeldSlices
from tcur_kernels.decompose.caught import caught_energy
from tolerance import assert_equal_in_float64, relative_error


def squares(model, batch):
    return model(batch).square().mean()


def batches(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 7, 6, generator=generator) for _ in range(count)]


@pytest.fixture
def base():
    torch.manual_seed(0)
    return Tiny().eval()


@pytest.fixture
def gradients(base):
    return tcur.collect_gradients(base, batches(), squares)


# -- gradients


def test_gradients_are_those_of_autograd(base):
    found = tcur.collect_gradients(base.double(), [b.double() for b in batches()], squares)
    sum(squares(base, b.double()) for b in batches()).backward()
    linear = {n: m for n, m in base.named_modules() if isinstance(m, nn.Linear)}
    assert found.keys() == linear.keys()
    for name, module in linear.items():
        assert_equal_in_float64(found[name], module.weight.grad / 3)


def test_the_model_stays_as_it_is(base):
    base.head.requires_grad_(False)
    base.embed.weight.grad = torch.ones(8, 6)
    flags = [p.requires_grad for p in base.parameters()]
    state = copy.deepcopy(base.state_dict())
    kept = base.embed.weight.grad
    with torch.no_grad():  # gradients are asked for, wherever that is
        tcur.collect_gradients(base, batches(), squares)
    assert base.embed.weight.grad is kept
    assert torch.equal(kept, torch.ones(8, 6))
    assert [p.requires_grad for p in base.parameters()] == flags
    assert all(p.grad is None for n, p in base.named_parameters() if n != "embed.weight")
    assert all(torch.equal(state[name], value) for name, value in base.state_dict().items())
    assert not any(p._post_accumulate_grad_hooks for p in base.parameters())

    def fails(model, batch):
        squares(model, batch).backward()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tcur.collect_gradients(base, batches(), fails)
    assert [p.requires_grad for p in base.parameters()] == flags
    assert base.embed.weight.grad is kept
    assert not any(p._post_accumulate_grad_hooks for p in base.parameters())


def test_other_kinds_of_weights():
    """Blocks of an in_proj_weight, weights stored (in, out), tied, in half precision, unused."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.turned = transformers.pytorch_utils.Conv1D(12, 8)
            self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)
            self.second.weight = self.first.weight
            self.unused = nn.Linear(12, 12)

        def forward(self, x):
            x, _ = self.attention(x, x, x)
            return self.second(self.first(self.turned(x.contiguous())))

    model = Mixed().double()
    inputs = torch.randn(3, 5, 8, dtype=torch.float64)
    found = tcur.collect_gradients(model, [inputs], squares)
    squares(model, inputs).backward()
    q, k, v = model.attention.in_proj_weight.grad.split(8)
    wanted = {
        "attention.q_proj": q,
        "attention.k_proj": k,
        "attention.v_proj": v,
        "attention.out_proj": model.attention.out_proj.weight.grad,
        "turned": model.turned.weight.grad.T,
        "unused": torch.zeros(12, 12, dtype=torch.float64),
    }
    for name, grad in wanted.items():
        assert_equal_in_float64(found[name], grad)
        assert found[name].is_contiguous()
    narrow = tcur.collect_gradients(model.bfloat16(), [inputs.bfloat16()], squares, ["turned"])
    assert narrow.keys() == {"turned"}
    assert narrow["turned"].dtype == torch.float32


def test_a_transformers_model_has_its_own_loss():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(11, (2, 6))
    batch = {"input_ids": ids, "labels": ids}
    found = tcur.collect_gradients(model, [batch], targets=["mlp.c_fc"])
    assert {grad.shape for grad in found.values()} == {(32, 8)}
    with pytest.raises(TypeError, match=r"loss_fn: expected a function, .* got None"):
        tcur.collect_gradients(model, [{"input_ids": ids}])
    with pytest.raises(TypeError, match=r"batches: expected mappings .* got Tensor"):
        tcur.collect_gradients(model, [ids])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batches": []}, ValueError, "batches: expected at least one, got none"),
        ({"batches": None}, TypeError, "batches: expected some that .*, got NoneType"),
        ({"loss_fn": lambda m, b: 1.0}, TypeError, "loss_fn: .* return a tensor, got float"),
        ({"loss_fn": lambda m, b: m(b)}, ValueError, r"loss_fn: expected one number, got \[4, 5\]"),
        ({"loss_fn": lambda m, b: b.sum()}, ValueError, "loss_fn: .* depends on the weights"),
        ({"loss_fn": lambda m, b: m(b).sum() * math.inf}, ValueError, "finite gradients, got NaN"),
        ({"targets": ["nothing"]}, ValueError, "targets: "),
        ({"model": 3}, TypeError, "model: expected an nn.Module, got int"),
    ],
)
def test_bad_arguments_of_collect_gradients(base, change, error, message):
    given = {"model": base, "batches": batches(), "loss_fn": squares, **change}
    with pytest.raises(error, match=message):
        tcur.collect_gradients(**given)


def test_an_adapted_model_is_refused(base):
    tcur.adapt(base, rank=2)
    with pytest.raises(ValueError, match="model: expected a base model, got one that is adapted"):
        tcur.collect_gradients(base, batches(), squares)


# -- what slices catch


@pytest.mark.parametrize("n3", [1, 2, 5, 12])
def test_what_is_caught_is_the_projection_of_the_gradient(n3):
    generator = torch.Generator().manual_seed(n3)
    grad = torch.randn(n3, 9, 11, generator=generator, dtype=torch.float64)
    lateral = torch.randn(n3, 9, 3, generator=generator, dtype=torch.float64)
    horizontal = torch.randn(n3, 3, 11, generator=generator, dtype=torch.float64)
    left = oracle.t_product(lateral, tcur.t_pinv(lateral))
    right = oracle.t_product(tcur.t_pinv(horizontal), horizontal)
    exact = oracle.t_product(oracle.t_product(left, grad), right).square().sum()
    # A workspace of a few rows: the sums are over blocks.
    source = HeldSlices("gradient", list(grad), max_workspace=n3 * 11 * 80 * 2 + 20_000)
    caught, total = caught_energy(source, lateral, horizontal)
    assert abs(caught / float(exact) - 1) < 1e-10
    assert abs(total / float(grad.square().sum()) - 1) < 1e-12


def test_it_is_the_gradient_of_the_core_in_the_orthonormal_basis(base, gradients):
    adapter = tcur.adapt(base, rank=3)
    for batch in batches():
        (squares(base, batch) / 3).backward()
    for entry in adapter.plan.stacks:
        stack = adapter.stacks[entry.name]
        parts = [p for m in entry.members for p in gradients[m.module].split(entry.n1)]
        caught, _ = caught_energy(HeldSlices("gradient", parts), *stack.factors.slices)
        core = stack.core.grad / stack.scale
        assert abs(float(core.square().sum()) / caught - 1) < 1e-4


# -- budgets


def spent(plan):
    return sum(stack.n3 * stack.rank**2 for stack in plan.stacks)


@pytest.mark.parametrize("numbers", [21, 60, 200, 1000, 10**6])
def test_a_budget_is_kept_and_used(base, gradients, numbers):
    adapter = tcur.adapt(base, rank=tcur.Budget(numbers), gradients=gradients)
    assert adapter.count_parameters() == spent(adapter.plan) <= numbers
    for entry in adapter.plan.stacks:
        assert adapter.stacks[entry.name].rank == entry.rank
        # No stack could have been one rank higher.
        more = spent(adapter.plan) + entry.n3 * (2 * entry.rank + 1)
        assert more > numbers or entry.rank == min(entry.n1, entry.n2)


def test_numbers_go_where_the_gradient_is(base, gradients):
    planned = make_plan(base, None, 1).stacks
    for loud in planned:
        members = {member.module for member in loud.members}
        scaled = {n: grad * (100 if n in members else 0.01) for n, grad in gradients.items()}
        plan = tcur.adapt(copy.deepcopy(base), rank=tcur.Budget(300), gradients=scaled).plan
        [rank] = [entry.rank for entry in plan.stacks if entry.name == loud.name]
        alone = 300 - sum(entry.n3 for entry in planned if entry is not loud)
        assert rank == min(8, math.isqrt(alone // loud.n3))


def caught_by(adapter, entry, gradients):
    """The part of the gradient's energy that the slices of an adapted stack catch."""
    parts = [p for m in entry.members for p in gradients[m.module].split(entry.n1)]
    slices = adapter.stacks[entry.name].factors.slices
    caught, total = caught_energy(HeldSlices("gradient", parts), *slices)
    return caught / total


def test_the_plan_tells_what_is_caught(base, gradients, tmp_path):
    adapter = tcur.adapt(base, rank=tcur.Budget(300), gradients=gradients)
    for entry in adapter.plan.stacks:
        assert entry.caught == pytest.approx(caught_by(adapter, entry, gradients), rel=1e-6)
        words = f"which catches {entry.caught:.2%} of the gradient"
        assert words in str(adapter.plan)
        assert f"rank {entry.rank}, {words}" in adapter.plan.describe()
    adapter.save(tmp_path / "a.safetensors")
    torch.manual_seed(0)
    loaded = tcur.load_adapter(Tiny().eval(), tmp_path / "a.safetensors")
    assert [s.rank for s in loaded.plan.stacks] == [s.rank for s in adapter.plan.stacks]
    assert "catches" not in str(tcur.adapt(Tiny(), rank=2).plan)


def test_a_rule_for_each_stack(base, gradients):
    rules = {"8x8": "deim", "*": "norm2"}
    adapter = tcur.adapt(base, rank=tcur.Budget(300), gradients=gradients, selection=rules)
    assert adapter.count_parameters() <= 300


@pytest.mark.parametrize("seed", [None, 1])
def test_slices_that_were_drawn_are_those_of_the_plan(base, gradients, seed):
    """Another draw would catch something else than what the plan says."""
    made = []
    for _ in range(2):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        adapter = tcur.adapt(
            copy.deepcopy(base),
            rank=tcur.Budget(300),
            gradients=gradients,
            selection="uniform",
            generator=generator,
        )
        assert adapter.count_parameters() <= 300
        for entry in adapter.plan.stacks:
            assert entry.caught == pytest.approx(caught_by(adapter, entry, gradients), rel=1e-6)
        made.append([stack.factors.slices[0] for stack in adapter.stacks.values()])
    if seed is not None:
        assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


def test_a_budget_moves_the_generator_on(base, gradients):
    """Two calls with one generator draw different slices, as without a budget."""
    generator, drawn = torch.Generator().manual_seed(0), []
    for _ in range(2):
        settings = {"rank": tcur.Budget(300), "selection": "uniform", "generator": generator}
        adapter = tcur.adapt(copy.deepcopy(base), gradients=gradients, **settings)
        drawn.append(torch.cat([s.factors.slices[0].flatten() for s in adapter.stacks.values()]))
    assert drawn[0].shape != drawn[1].shape or not torch.equal(*drawn)


def test_a_file_of_gradients_and_a_model_on_meta(base, gradients, tmp_path):
    save_file(gradients, tmp_path / "gradients.safetensors")
    save_file(base.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        skeleton = Tiny().eval()
    settings = {"rank": tcur.Budget(300), "gradients": tmp_path / "gradients.safetensors"}
    streamed = tcur.adapt(skeleton, weights=tmp_path / "model.safetensors", **settings)
    here = tcur.adapt(base, **settings)
    assert [s.rank for s in streamed.plan.stacks] == [s.rank for s in here.plan.stacks]
    assert [s.caught for s in streamed.plan.stacks] == [s.caught for s in here.plan.stacks]


def changed(gradients, **layers):
    found = {**gradients, **{name.replace("__", "."): value for name, value in layers.items()}}
    return {name: value for name, value in found.items() if value is not None}


FIRST = "blocks__0__attn__out_proj"
ZEROS = {f"blocks__{i}__attn__{p}": n for i in range(3) for p, n in (("out_proj", 8), ("qkv", 24))}


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"gradients": None}, ValueError, "gradients: expected those of collect_gradients for a"),
        ({"rank": 2}, ValueError, "gradients: expected None without a rank that is a Budget, got"),
        ({"rank": tcur.Budget(17)}, ValueError, "rank: expected a budget of at least 18 numbers"),
        ({"gradients": [1]}, TypeError, "gradients: expected those of collect_gradients, .*list"),
        (
            {"gradients": {FIRST: None}},
            ValueError,
            "expected one for blocks.0.attn.out_proj .* none",
        ),
        (
            {"gradients": {FIRST: 3}},
            TypeError,
            "floating tensor for blocks.0.attn.out_proj, got int",
        ),
        (
            {"gradients": {FIRST: torch.ones(8, 8, dtype=torch.int64)}},
            TypeError,
            "floating tensor for blocks.0.attn.out_proj, got torch.int64",
        ),
        (
            {"gradients": {FIRST: torch.ones(8, 9)}},
            ValueError,
            r"expected \[8, 8\] \(out, in\) for blocks.0.attn.out_proj, got \[8, 9\]",
        ),
        (
            {"gradients": {FIRST: torch.full((8, 8), math.nan)}},
            ValueError,
            "finite numbers for blocks.0.attn.out_proj, got NaN",
        ),
        (
            {"gradients": {name: torch.zeros(rows, 8) for name, rows in ZEROS.items()}},
            ValueError,
            "expected some that are not zero in stack 8x8, got zeros",
        ),
    ],
)
def test_bad_input_leaves_the_model_alone(base, gradients, settings, error, message):
    given = {"rank": tcur.Budget(300), "gradients": gradients, **settings}
    if isinstance(given["gradients"], dict) and "gradients" in settings:
        given["gradients"] = changed(gradients, **settings["gradients"])
    state = copy.deepcopy(base.state_dict())
    with pytest.raises(error, match=message):
        tcur.adapt(base, **given)
    assert state.keys() == base.state_dict().keys()
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_bad_files_and_budgets(base, gradients, tmp_path):
    path = tmp_path / "g.safetensors"
    with pytest.raises(FileNotFoundError, match="gradients: expected a file, got none at"):
        tcur.adapt(base, rank=tcur.Budget(300), gradients=path)
    save_file(gradients, path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"gradients: expected a whole safetensors file, .* at"):
        tcur.adapt(base, rank=tcur.Budget(300), gradients=str(path))
    for bad, error in ((0, ValueError), (-3, ValueError), (2.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="parameters: expected"):
            tcur.Budget(bad)


def test_ranks_are_raised_where_a_number_gains_most():
    """Two stacks of one slice each: the gradient of one lives on its first columns and rows."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(20, 20, bias=False), "b": nn.Linear(20, 20, bias=False)})
    plan = make_plan(model, None, 1, stacks="layer")
    gradients = {"a": torch.zeros(20, 20), "b": torch.full((20, 20), 1e-3)}
    weights = {name: torch.eye(20) for name in "ab"}
    gradients["a"][:6, :6] = 1.0
    order = torch.arange(20)

    def first(stack, rank, generator):
        return order[:rank], order[:rank]

    def slices_of(stack):
        return HeldSlices(stack.name, [weights[stack.name]])

    made, _ = within_budget(plan, tcur.Budget(50), gradients, slices_of, first, None)
    ranks = {stack.name: stack.rank for stack in made.stacks}
    assert ranks == {"a": 6, "b": 3}  # 36 + 9 of 50: all that a has, and what is left to b
    caught = {stack.name: stack.caught for stack in made.stacks}
    assert relative_error(torch.tensor(caught["a"]), torch.tensor(1.0, dtype=torch.float64)) < 1e-12
    assert abs(caught["b"] - 9 / 400) < 1e-12


# -- the command line


def test_the_command_line_plans_a_budget(tmp_path, capsys):
    torch.manual_seed(0)
    model = hf_models.llama().eval()
    model.save_pretrained(tmp_path / "model")
    ids = torch.randint(50, (2, 6))
    grads = tcur.collect_gradients(model, [{"input_ids": ids, "labels": ids}])
    save_file(grads, tmp_path / "g.safetensors")

    command = ["plan", str(tmp_path / "model")]
    given = ["--budget", "500", "--gradients", str(tmp_path / "g.safetensors")]
    assert cli.main([*command, *given, "--selection", "deim"]) == 0
    printed = capsys.readouterr().out
    adapter = tcur.adapt(model, rank=tcur.Budget(500), gradients=grads, selection="deim")
    assert adapter.plan.stacks[0].caught is not None
    for stack in adapter.plan.stacks:
        words = (
            f"of {stack.n3} x {stack.rank} x {stack.rank} numbers, which catches {stack.caught:.2%}"
        )
        assert words in printed
    count = f"budget 500: {adapter.count_parameters()} trained numbers"
    assert count in printed
    for options, message in (
        (given[:2], "--gradients: expected with --budget"),
        (given[2:], "--gradients: expected with --budget"),
        ([*given, "--rank", "4"], "--rank: expected none beside --budget, got 4"),
        (["--budget", "3", *given[2:]], "rank: expected a budget of at least 14 numbers"),
    ):
        assert cli.main([*command, *options]) == 2
        assert message in capsys.readouterr().err
