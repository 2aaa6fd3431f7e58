"""Many adapters in one batch: every row as if its adapter were the only one."""

import asyncio
import contextvars
import threading
from contextlib import ExitStack

import pytest
import torch
from torch import nn

import tcur_kernels as tcur
from models import Tiny
from plain import Plain
from tolerance import assert_composition_close, same_mathematics

ADAPTERS = 4


def adapted(base_dtype=torch.float32, **kwargs):
    """Of weights that are numbers of ``base_dtype``: a cast to it does not change them."""
    torch.manual_seed(0)
    return tcur.adapt(Tiny().eval().to(base_dtype).float(), rank=2, **kwargs)


def some_cores(adapter, count=ADAPTERS):
    return [
        {name: torch.randn_like(stack.core) * 0.3 for name, stack in adapter.stacks.items()}
        for _ in range(count)
    ]


def each_alone(adapter, cores, dtype=torch.float32):
    """One plain model for each of ``cores``."""
    models = [Plain(adapter, dtype) for _ in cores]
    for model, own in zip(models, cores, strict=True):
        for name, core in model.cores.items():
            core.data.copy_(own[name])
    return models


def by_rows(adapter, cores, ids, x):
    """``plain`` and ``exact`` of `assert_composition_close`: each row with its adapter alone."""

    def run(models, x):
        rows = zip(x, ids.tolist(), strict=True)
        return torch.cat([models[index](row[None]) for row, index in rows])

    models = each_alone(adapter, cores, x.dtype)
    exact = run(each_alone(adapter, cores, torch.float64), x.double())
    return lambda: run(models, x), exact


@pytest.mark.parametrize("ids", [[3, 0, 3, 1, 0], [2], [1, 1, 1], [0, 1, 2, 3]], ids=str)
@pytest.mark.parametrize("mode", ["auto", "materialized", "factored"])
def test_rows_are_those_of_each_adapter_alone(ids, mode):
    adapter, ids = adapted(mode=mode), torch.tensor(ids)
    cores, x = some_cores(adapter), torch.randn(len(ids), 7, 6)
    plain = adapter.model(x)
    with adapter.batch(adapter.stack_cores(cores), ids):
        y = adapter.model(x)
    assert_composition_close(y, *by_rows(adapter, cores, ids, x))
    assert torch.equal(adapter.model(x), plain)


def test_names_and_files_and_tensors_mix(tmp_path):
    adapter = adapted()
    cores = some_cores(adapter, 3)
    with torch.no_grad():
        for name, stack in adapter.stacks.items():
            stack.core.copy_(cores[0][name])
        adapter.add("b")
        for name, stack in adapter.stacks.items():
            stack.core_of("b").copy_(cores[1][name])
    adapter.save(tmp_path / "a", "b")
    stacked = adapter.stack_cores(["default", "b", cores[2], tmp_path / "a"])
    assert stacked.adapters == 4
    assert len(stacked) == 3
    for name in adapter.stacks:
        wanted = torch.stack([c[name] for c in (*cores, cores[1])])
        assert torch.equal(stacked[name], wanted)
    assert stacked.nbytes == sum(4 * stacked[name].numel() for name in stacked)


def test_gradients_reach_each_core_by_its_own_rows():
    adapter, ids = adapted(), torch.tensor([2, 0, 2])
    cores, x = some_cores(adapter, 3), torch.randn(3, 7, 6)
    stacked = adapter.stack_cores(cores)
    for name in stacked:
        stacked[name].requires_grad_()
    with adapter.batch(stacked, ids):
        adapter.model(x).square().sum().backward()

    def gradients(models, x):
        """Of all cores by stack, [A, n3, r, r]; those of an adapter without rows are zeros."""
        loss = lambda y: y.square().sum()  # noqa: E731
        each = [
            model.with_gradients(loss, x[ids == index])[1:] for index, model in enumerate(models)
        ]
        return tuple(map(torch.stack, zip(*each, strict=True)))

    plain = each_alone(adapter, cores)
    assert_composition_close(
        tuple(stacked[name].grad for name in stacked),
        lambda: gradients(plain, x),
        gradients(each_alone(adapter, cores, torch.float64), x.double()),
    )
    assert not any(stacked[name].grad[1].any() for name in stacked)
    assert all(stack.core.grad is None for stack in adapter.stacks.values())


def test_layers_with_one_input_share_z_in_a_batch(monkeypatch):
    from tcur_kernels.layers import w_eff

    calls, project = [], w_eff.project
    monkeypatch.setattr(w_eff, "project", lambda *args: calls.append(0) or project(*args))
    model = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(3))
    adapter = tcur.adapt(model, rank=2)
    stacked, x = adapter.stack_cores(some_cores(adapter)), torch.randn(2, 5, 6)
    with torch.no_grad(), adapter.batch(stacked, torch.tensor([0, 3])):
        for layer in model:
            layer(x)
        assert len(calls) == 1
    with torch.inference_mode(), adapter.batch(stacked, torch.tensor([0, 3])):
        x = torch.randn(2, 5, 6)
        before = model[0](x)
        x.mul_(2)  # leaves no trace in inference mode: z must not be shared there
        after = model[0](x)
    assert torch.equal(after, 2 * before)  # a factor of two rounds nothing
    assert adapter.stacks["6x6"]._projected.held is None


def test_autocast_and_half_precision():
    adapter, ids = adapted(torch.bfloat16), torch.tensor([0, 1, 1])
    cores, x = some_cores(adapter), torch.randn(3, 7, 6)
    plain, exact = by_rows(adapter, cores, ids, x)
    stacked, autocast = adapter.stack_cores(cores), torch.autocast("cpu", torch.bfloat16)
    with adapter.batch(stacked, ids), autocast:
        y = adapter.model(x)
    assert_composition_close(y, autocast(plain), exact)
    adapter.model.bfloat16()
    with adapter.batch(stacked, ids):
        low = adapter.model(x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert_composition_close(low, *by_rows(adapter, cores, ids, x.bfloat16()))


def test_batches_compile_whole_and_once():
    adapter = adapted()
    cores = some_cores(adapter)
    stacked = adapter.stack_cores(cores)
    torch._dynamo.reset()
    compiled = torch.compile(adapter.model, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 7, 6)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for ids in ([0, 1, 2], [3, 3, 0]):
            ids = torch.tensor(ids)
            with adapter.batch(stacked, ids):
                outputs = compiled(x), adapter.model(x)
            for y in outputs:
                assert_composition_close(y, *by_rows(adapter, cores, ids, x))


def test_disable_within_a_batch():
    adapter = adapted()
    x = torch.randn(3, 7, 6)
    base = adapter.model(x)
    stacked = adapter.stack_cores(some_cores(adapter))
    with adapter.batch(stacked, torch.tensor([0, 1, 2])):
        with adapter.disable():
            assert torch.equal(adapter.model(x), base)
        assert not torch.equal(adapter.model(x), base)


class Windows(nn.Module):
    """Cuts each row to windows before its layers, as Swin does: still rows one after the other."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.second(self.first(x.view(-1, 2, 6)).view(*x.shape)).mean(1)


def test_rows_may_be_cut_to_windows():
    torch.manual_seed(0)
    adapter = tcur.adapt(Windows(), rank=2)
    cores, x, ids = some_cores(adapter), torch.randn(3, 8, 6), torch.tensor([1, 0, 3])
    with adapter.batch(adapter.stack_cores(cores), ids, repeat="each"):
        y = adapter.model(x)
    assert_composition_close(y, *by_rows(adapter, cores, ids, x))


class Guided(nn.Module):
    """Runs two halves of a batch at once, as classifier-free guidance does."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        one, two = self.second(self.first(torch.cat([x, x + 1])).relu()).chunk(2)
        return one + two


class Beams(nn.Module):
    """Encodes once, and decodes three beams of each row."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        beams = self.encoder(x).repeat_interleave(3, 0) + torch.arange(3).repeat(len(x))[:, None]
        return self.decoder(beams.relu()).unflatten(0, (-1, 3)).sum(1)


@pytest.mark.parametrize("model", [Guided, Beams])
def test_rows_that_repeat_are_refused_unless_somebody_says_how(model):
    torch.manual_seed(0)
    adapter = tcur.adapt(model(), rank=2)
    cores, x, ids = some_cores(adapter), torch.randn(3, 6), torch.tensor([1, 0, 3])
    stacked = adapter.stack_cores(cores)
    with (
        adapter.batch(stacked, ids),
        pytest.raises(ValueError, match=r"x: expected 3 rows, .* if rows repeat, say how"),
    ):
        adapter.model(x)
    repeat = "all" if model is Guided else "each"
    with adapter.batch(stacked, ids, repeat=repeat):
        y = adapter.model(x)
    assert_composition_close(y, *by_rows(adapter, cores, ids, x))
    with (
        adapter.batch(stacked, ids, repeat=repeat),
        pytest.raises(ValueError, match=r"x: expected 3 rows, one for each of adapter_ids, as fir"),
    ):
        adapter.model(x[:2])
    with adapter.batch(stacked, ids[:1]):  # one adapter: no row could go wrong
        y = adapter.model(x)
    assert_composition_close(y, *by_rows(adapter, cores, ids[:1].repeat(3), x))
    with (
        pytest.raises(ValueError, match="repeat: expected one of None, 'each', 'all', got 'some'"),
        adapter.batch(stacked, ids, repeat="some"),
    ):
        pass


def test_batches_belong_to_their_thread_and_task():
    adapter = adapted()
    x = torch.randn(2, 7, 6)
    cores = adapter.stack_cores(some_cores(adapter))
    wanted = {}
    for key in range(4):
        with torch.no_grad(), adapter.batch(cores, torch.tensor([key, 3 - key])):
            wanted[key] = adapter.model(x)
    with torch.no_grad():
        wanted["none"] = adapter.model(x)
    met = threading.Barrier(5)

    def run(key, found):
        with torch.no_grad(), ExitStack() as stack:
            if key != "none":
                stack.enter_context(adapter.batch(cores, torch.tensor([key, 3 - key])))
            met.wait()
            found[key] = [adapter.model(x) for _ in range(5)]
            met.wait()

    found = {}
    threads = [threading.Thread(target=run, args=(key, found)) for key in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found.keys() == wanted.keys()
    for key, outputs in found.items():
        assert all(same_mathematics(y, wanted[key]) for y in outputs)

    async def task(key, found):
        with adapter.batch(cores, torch.tensor([key, 3 - key])):
            await asyncio.sleep(0)
            found[key] = [adapter.model(x)]

    async def both(found):
        await asyncio.gather(*(task(key, found) for key in range(4)))

    found = {}
    with torch.no_grad():  # not in the tasks: it is one of the thread, and they would tangle it up
        asyncio.run(both(found))
    assert all(same_mathematics(found[key][0], wanted[key]) for key in range(4))


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_models_in_batches_of_tasks_that_overlap(fullgraph):
    """Traced code cannot tell tasks apart: the batch of one must never be that of another."""
    torch._dynamo.reset()
    adapter = adapted()
    x = torch.randn(2, 7, 6)
    cores = adapter.stack_cores(some_cores(adapter))
    ids = {key: torch.tensor([key, 3 - key]) for key in range(2)}
    model = torch.compile(adapter.model, backend="eager", fullgraph=fullgraph)
    found = {}

    async def task(key):
        with adapter.batch(cores, ids[key]):
            await asyncio.sleep(0)
            if key == 0 and fullgraph:  # the other task's batch is open too
                with pytest.raises(Exception, match="expected one task with open batches"):
                    model(x)
            elif key == 0:  # the graph breaks, and eager code knows the task
                found[key] = model(x)
            await asyncio.sleep(0)
            if key == 1:  # it is alone now
                await asyncio.sleep(0)
                found[key] = model(x)

    async def both():
        await asyncio.gather(*map(task, ids))

    with torch.no_grad():
        asyncio.run(both())
        found["none"], wanted = model(x), {"none": adapter.model(x)}
        for key in found.keys() - wanted.keys():
            with adapter.batch(cores, ids[key]):
                wanted[key] = adapter.model(x)
    assert len(found) == 3 - fullgraph
    assert all(same_mathematics(y, wanted[key]) for key, y in found.items())
    torch._dynamo.reset()


def test_a_batch_that_another_thread_closes_is_closed_for_compiled_models():
    torch._dynamo.reset()
    adapter = adapted()
    x = torch.randn(2, 7, 6)
    model = torch.compile(adapter.model, backend="eager")
    batch = adapter.batch(adapter.stack_cores(some_cores(adapter)), torch.tensor([0, 1]))
    told = []

    def close():
        with pytest.raises(ValueError, match="different Context") as error:
            batch.__exit__(None, None, None)
        told.append(error)

    def inside():
        batch.__enter__()
        thread = threading.Thread(target=close)
        thread.start()
        thread.join()
        return model(x)

    with torch.no_grad():
        y = contextvars.copy_context().run(inside)
        assert same_mathematics(y, adapter.model(x))
    assert told
    torch._dynamo.reset()


def test_weights_are_not_read_where_every_row_has_its_own():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            assert self.first.weight.dtype == torch.float32  # to ask is no use of it
            return self.second(x @ self.first.weight.T)

    adapter = tcur.adapt(Reads(), rank=2)
    cores = adapter.stack_cores(some_cores(adapter))
    with (
        adapter.batch(cores, torch.tensor([0, 1])),
        pytest.raises(RuntimeError, match="weight: expected a layer that is called, got one whose"),
    ):
        adapter.model(torch.randn(2, 6))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_torchs_encoder_in_evaluation():
    """Without gradients torch would run it past the forward of its layers."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    adapter = tcur.adapt(nn.TransformerEncoder(layer, 2).eval(), rank=2)
    cores, x, ids = some_cores(adapter), torch.randn(3, 4, 8), torch.tensor([2, 0, 2])
    with torch.no_grad(), adapter.batch(adapter.stack_cores(cores), ids):
        y = adapter.model(x)
    assert_composition_close(y, *by_rows(adapter, cores, ids, x))


def test_models_with_time_first_are_refused():
    class Config:
        model_type = "xlnet"

    adapter = adapted()
    adapter.model.config = Config()
    cores = adapter.stack_cores(some_cores(adapter))
    with (
        pytest.raises(ValueError, match="batch as first axis, got xlnet"),
        adapter.batch(cores, torch.tensor([0])),
    ):
        pass


def test_a_thousand_vit_b_adapters_take_less_than_20_mb():
    """72 slices of rank 8: 18 KB per adapter, whatever the base."""
    layers = {
        "attention": [nn.Linear(768, 768, device="meta") for _ in range(48)],
        "up": [nn.Linear(768, 3072, device="meta") for _ in range(12)],
        "down": [nn.Linear(3072, 768, device="meta") for _ in range(12)],
    }
    floats = sum(len(stack) * 8 * 8 for stack in layers.values())
    assert 1000 * floats * torch.float32.itemsize < 20e6


@pytest.mark.parametrize(
    ("entries", "error", "message"),
    [
        ([], ValueError, "adapters: expected at least one, got none"),
        (["nobody"], ValueError, "adapters: expected one of default, got 'nobody'"),
        ([{}], TypeError, r"adapters\[0\]: expected a core for stack 8x8, got none"),
        ([{"8x8": 3}], TypeError, r"adapters\[0\]: expected a core for stack 8x8, got int"),
        (
            ["default", {"8x8": torch.ones(2, 2)}],
            ValueError,
            r"adapters\[1\]: expected a core \[12, 2, 2\] for stack 8x8, got \[2, 2\]",
        ),
        (
            [{"8x8": torch.full((12, 2, 2), torch.nan)}],
            ValueError,
            r"adapters\[0\]: expected finite numbers in stack 8x8",
        ),
    ],
)
def test_bad_entries(entries, error, message):
    with pytest.raises(error, match=message):
        adapted().stack_cores(entries)


def enter(adapter, cores, ids):
    adapter.batch(cores, ids).__enter__()


def test_bad_batches():
    adapter = adapted()
    cores = adapter.stack_cores(some_cores(adapter))
    with pytest.raises(TypeError, match=r"adapter_ids: expected a torch.Tensor, got list"):
        enter(adapter, cores, [0])
    message = r"adapter_ids: expected -1 \(no adapter\) to 3 for 4 cores, got 0 to 4"
    with pytest.raises(ValueError, match=message):
        enter(adapter, cores, torch.tensor([0, 4]))
    other = tcur.adapt(Tiny(), "mlp.0", rank=2)
    with pytest.raises(ValueError, match="cores: expected those of stacks 32x8, got 8x8, 32x8, 8"):
        enter(other, cores, torch.tensor([0]))
    away = tcur.StackedCores({name: core.to("meta") for name, core in cores.items()})
    with pytest.raises(ValueError, match=r"on cpu in stack 8x8, got \[4, 12, 2, 2\] on meta"):
        enter(adapter, away, torch.tensor([0]))
    with (
        adapter.batch(cores, torch.tensor([0, 1])),
        pytest.raises(ValueError, match=r"x: expected 2 rows, one for each .*, got \[3, 7, 8\]"),
    ):
        adapter.model(torch.randn(3, 7, 6))
    adapter.merge()
    with pytest.raises(ValueError, match="batch: expected an unmerged adapter, got one that is"):
        enter(adapter, cores, torch.tensor([0]))
    more = adapted(train_also="head")
    with pytest.raises(ValueError, match="stack_cores: expected adapters of cores alone"):
        more.stack_cores(["default"])


def test_attentions_with_the_batch_second_are_refused():
    for batch_first in (False, True):
        model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
        adapter = tcur.adapt(model, ["self_attn", "linear1"], rank=2)
        cores = some_cores(adapter)
        stacked = adapter.stack_cores(cores)
        ids, x = torch.tensor([0, 1]), torch.randn(2, 5, 8)
        if batch_first:
            with adapter.batch(stacked, ids):
                y = adapter.model.eval()(x)
            assert_composition_close(y, *by_rows(adapter, cores, ids, x))
        else:
            message = "batch as first axis, got batch_first=False in self_attn"
            with pytest.raises(ValueError, match=message):
                enter(adapter, stacked, ids)
