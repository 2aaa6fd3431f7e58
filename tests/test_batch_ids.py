"""Ids as servers have them: rows without an adapter, ids of tokens, and packed sequences."""

import copy
import pickle

import pytest
import torch
from torch import nn

import tcur_kernels as tcur
from test_batch import adapted, by_rows, each_alone, some_cores
from tolerance import assert_composition_close, same_mathematics


class Words(nn.Module):
    """A network that treats every token by itself: what a token gets shows which adapter it had."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)
        self.more = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x):
        for layer in self.more:
            x = x + layer(x).relu()
        return self.down(self.up(x).relu())


@pytest.fixture
def words():
    torch.manual_seed(0)
    return tcur.adapt(Words(), ["more.*"], rank=2)


def by_tokens(adapter, cores, ids, x):
    """``plain`` and ``exact`` of `assert_composition_close`: each token with its adapter alone."""
    tokens = x.reshape(-1, x.shape[-1])
    plain, exact = by_rows(adapter, cores, ids.flatten(), tokens)
    return lambda: plain().view(x.shape), exact.view(x.shape)


def zeros_of(adapter):
    return {name: torch.zeros_like(stack.core) for name, stack in adapter.stacks.items()}


@pytest.mark.parametrize("mode", ["auto", "materialized", "factored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_without_an_adapter_are_those_of_the_base(mode, dtype):
    adapter, ids = adapted(torch.bfloat16, mode=mode), torch.tensor([-1, 2, -1, 0])
    cores, x = some_cores(adapter), torch.randn(4, 7, 6)
    stacked = adapter.stack_cores(cores)
    adapter.model.to(dtype)
    x = x.to(dtype)
    with adapter.disable():
        base = adapter.model(x)
    with adapter.batch(stacked, ids):
        y = adapter.model(x)
    assert torch.equal(y[[0, 2]], base[[0, 2]])
    with adapter.batch(stacked, torch.full((4,), -1)):
        assert torch.equal(adapter.model(x), base)
    every = [*cores, zeros_of(adapter)]
    assert_composition_close(y, *by_rows(adapter, every, ids % 5, x))


def test_the_core_of_zeros_counts_nowhere():
    adapter = adapted()
    stacked = adapter.stack_cores(some_cores(adapter, 2))
    assert stacked.adapters == 2
    assert stacked["8x8"].shape == (2, 12, 2, 2)
    assert stacked.nbytes == sum(2 * 4 * stack.core.numel() for stack in adapter.stacks.values())
    assert repr(stacked) == "StackedCores(2 adapters of stacks 8x8, 32x8, 8x32)"


@pytest.mark.parametrize("make", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c)), None])
def test_copies_and_given_cores_have_rows_without_an_adapter_too(make):
    adapter, ids = adapted(), torch.tensor([1, -1])
    x = torch.randn(2, 7, 6)
    stacked = adapter.stack_cores(some_cores(adapter, 2))
    again = tcur.StackedCores(dict(stacked)) if make is None else make(stacked)
    for name, core in again.items():
        core.mul_(2)
        stacked[name].copy_(core)
        core.requires_grad_()
    outputs = []
    for cores in (stacked, again):
        with adapter.batch(cores, ids):
            outputs.append(adapter.model(x))
    assert torch.equal(*outputs)
    outputs[1].sum().backward()
    assert all(core.grad[1].any() and not core.grad[0].any() for core in again.values())


def test_gradients_pass_by_rows_without_an_adapter():
    adapter, ids = adapted(), torch.tensor([-1, 1, -1])
    cores, x = some_cores(adapter, 2), torch.randn(3, 7, 6)
    stacked = adapter.stack_cores(cores)
    for core in stacked.values():
        core.requires_grad_()
    with adapter.batch(stacked, ids):
        adapter.model(x).square().sum().backward()

    def gradients(models, x):
        return models[1].with_gradients(lambda y: y.square().sum(), x[1:2])[1:]

    wanted = gradients(each_alone(adapter, cores, torch.float64), x.double())
    plain = each_alone(adapter, cores)
    own = tuple(core.grad[1] for core in stacked.values())
    assert_composition_close(own, lambda: gradients(plain, x), wanted)
    assert not any(core.grad[0].any() for core in stacked.values())


def test_cores_that_begin_to_be_trained_within_a_batch_are_refused():
    adapter = adapted()
    stacked = adapter.stack_cores(some_cores(adapter))
    with (
        pytest.raises(ValueError, match="cores: expected requires_grad=False in stack 8x8 until"),
        adapter.batch(stacked, torch.tensor([0])),
    ):
        stacked["8x8"].requires_grad_()


IDS = torch.tensor([[0, 3, 3, -1], [2, 2, 0, 1]])


def test_every_token_has_its_own_adapter(words):
    cores, x = some_cores(words), torch.randn(2, 4, 6)
    every = [*cores, zeros_of(words)]
    stacked = words.stack_cores(cores)
    for core in stacked.values():
        core.requires_grad_()
    with words.batch(stacked, IDS, per="token"):
        y = words.model(x)
    y.square().sum().backward()
    assert_composition_close(y, *by_tokens(words, every, IDS % 5, x))
    with words.disable():
        assert torch.equal(y[0, 3], words.model(x)[0, 3])

    def gradients(models, x):
        loss = lambda y: y.square().sum()  # noqa: E731
        return tuple(models[index].with_gradients(loss, x[index == IDS])[1] for index in range(4))

    plain = each_alone(words, cores)
    exact = gradients(each_alone(words, cores, torch.float64), x.double())
    assert_composition_close(tuple(stacked["6x6"].grad), lambda: gradients(plain, x), exact)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("leading", [(), (1,)], ids=["flat", "one row"])
def test_packed_sequences(words, leading, dtype):
    cores, x = some_cores(words), torch.randn(*leading, 9, 6)
    ids, bounds = torch.tensor([2, 0, -1, 3]), torch.tensor([0, 4, 5, 5, 9], dtype=dtype)
    stacked, tokens = words.stack_cores(cores), torch.tensor([2, 2, 2, 2, 0, 3, 3, 3, 3])
    with words.batch(stacked, ids, cu_seqlens=bounds):
        y = words.model(x)
    with words.batch(stacked, tokens, per="token"):
        assert torch.equal(words.model(x), y)
    assert_composition_close(y, *by_tokens(words, cores, tokens, x))


def test_ids_of_tokens_compile_whole_and_once(words):
    cores, x = some_cores(words), torch.randn(2, 4, 6)
    stacked, every = words.stack_cores(cores), [*cores, zeros_of(words)]
    torch._dynamo.reset()
    compiled = torch.compile(words.model, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for ids in (IDS, IDS.flip(1)):
            with words.batch(stacked, ids, per="token"):
                assert_composition_close(compiled(x), *by_tokens(words, every, ids % 5, x))


def test_an_attention_may_have_packed_tokens():
    """Of both layouts: a batch of sequences, and one sequence without a batch axis."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    adapter = tcur.adapt(nn.ModuleDict({"attention": attention}), rank=2)
    stacked = adapter.stack_cores(some_cores(adapter, 2))
    x, ids = torch.randn(5, 8), torch.tensor([0, 1, 1, -1, 0])
    with adapter.batch(stacked, ids, per="token"):
        flat, row = attention(x, x, x)[0], attention(x[None], x[None], x[None])[0]
    assert same_mathematics(flat, row[0])
    with adapter.batch(stacked, torch.tensor([0])):
        assert not same_mathematics(flat, attention(x, x, x)[0])


@pytest.mark.parametrize(
    "shape",
    [(2, 3, 6), (2, 6), (8, 6), (2, 1, 6), (4, 2, 6), (1, 8, 6), (1, 2, 4, 6), (6,)],
    ids=str,
)
def test_tokens_in_another_arrangement_are_refused(words, shape):
    """The last token alone, pooled rows, steps of a generation, tokens that were flattened."""
    stacked = words.stack_cores(some_cores(words))
    with (
        words.batch(stacked, IDS, per="token"),
        pytest.raises(
            ValueError, match=r"x: expected \[2, 4, features\], an id for each token, got"
        ),
    ):
        words.model(torch.randn(shape))


def test_packed_tokens_that_do_not_add_up_are_refused(words):
    stacked, bounds = words.stack_cores(some_cores(words)), torch.tensor([0, 4, 9])
    with words.batch(stacked, torch.tensor([0, 1]), cu_seqlens=bounds):
        for shape in ((8, 6), (1, 10, 6), (2, 9, 6), (9, 1, 6)):
            with pytest.raises(ValueError, match=r"x: expected \[9, features\] or \[1, 9, feat"):
                words.model(torch.randn(shape))


ROWS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("ids", "how", "error", "message"),
    [
        (torch.tensor([0, -2]), {}, ValueError, r"expected -1 \(no adapter\) to 3 .* got -2 to 0"),
        (IDS, {}, ValueError, r"adapter_ids: expected \[B\] with per='row', got \[2, 4\]; ids of"),
        (IDS.float(), {"per": "token"}, TypeError, "adapter_ids: expected dtype torch.int64"),
        (IDS + 3, {"per": "token"}, ValueError, r"adapter_ids: expected -1 .* got 2 to 6"),
        (IDS[None], {"per": "token"}, ValueError, r"expected \[T\] or \[B, T\], got \[1, 2, 4\]"),
        (ROWS, {"per": "word"}, ValueError, "per: expected one of 'row', 'token', got 'word'"),
        (ROWS, {"per": "token", "repeat": "all"}, ValueError, "repeat: expected None where ids"),
        (
            ROWS,
            {"cu_seqlens": torch.tensor([0, 1, 2]), "repeat": "each"},
            ValueError,
            "repeat: expected None where ids belong to tokens, got 'each'",
        ),
        (
            ROWS,
            {"per": "token", "cu_seqlens": torch.tensor([0, 1, 2])},
            ValueError,
            "cu_seqlens: expected None with per='token'",
        ),
        (ROWS, {"cu_seqlens": [0, 1, 2]}, TypeError, "cu_seqlens: expected a torch.Tensor, got l"),
        (
            ROWS,
            {"cu_seqlens": torch.tensor([0.0, 1, 2])},
            TypeError,
            "cu_seqlens: expected dtype int32 or int64, got torch.float32",
        ),
        (
            ROWS,
            {"cu_seqlens": torch.tensor([0, 2])},
            ValueError,
            r"cu_seqlens: expected \[3\] for 2 ids of sequences, got \[2\]",
        ),
        (ROWS, {"cu_seqlens": torch.tensor([1, 2, 3])}, ValueError, "expected 0 as the first entr"),
        (ROWS, {"cu_seqlens": torch.tensor([0, 3, 2])}, ValueError, "ascending order, got 2 after"),
    ],
)
def test_bad_ids(words, ids, how, error, message):
    x = torch.randn(2, 4, 6)
    before, stacked = words.model(x), words.stack_cores(some_cores(words))
    with pytest.raises(error, match=message), words.batch(stacked, ids, **how):
        pass
    assert torch.equal(words.model(x), before)


def test_cores_of_a_former_basis_are_refused(words):
    stacked = words.stack_cores(some_cores(words))
    words.change_basis("slices")
    with (
        pytest.raises(ValueError, match="cores: expected them in basis slices in stack 6x6, got o"),
        words.batch(stacked, ROWS),
    ):
        pass


def test_a_batch_is_recomputed_within_itself_only(words):
    """Activation checkpointing must not compute rows again in a batch with other ids."""
    from torch.utils.checkpoint import checkpoint

    stacked, x = words.stack_cores(some_cores(words)), torch.randn(2, 4, 6, requires_grad=True)
    stacked["6x6"].requires_grad_()
    with words.batch(stacked, ROWS):
        y = checkpoint(words.model, x, use_reentrant=False)
    with (
        words.batch(stacked, ROWS.flip(0)),
        pytest.raises(RuntimeError, match="within the batch of many"),
    ):
        y.sum().backward()
