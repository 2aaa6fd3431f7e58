"""The peft plug-in on stacks of nn.Linear: peft's own interface from beginning to end."""

import copy
import json
import pickle

import peft
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import tcur_kernels as tcur
from hf_models import PEFT_SAYS
from models import Tiny
from oracle import cur_product
from plain import Plain, product, with_updates
from tcur_kernels.peft import TCURConfig, TCURLinear, register
from tolerance import assert_close, assert_composition_close, bound

pytestmark = [pytest.mark.filterwarnings(text) for text in PEFT_SAYS]

OLD_PEFT = tuple(map(int, peft.__version__.split(".")[:2])) < (0, 19)
TARGETS = ("qkv", "out_proj", "mlp.0", "mlp.2")


@pytest.fixture
def x():
    return torch.randn(4, 7, 6)


def config(**kwargs):
    return TCURConfig(**{"rank": 2, "target_modules": list(TARGETS), **kwargs})


def adapted(**kwargs):
    """A tiny model with an adapter, and its untouched, frozen twin."""
    base = Tiny().eval().requires_grad_(False)
    return get_peft_model(copy.deepcopy(base), config(**kwargs)), base


def cores(model):
    return {name: p for name, p in model.named_parameters() if name.endswith(".core")}


def reloaded(base, path):
    """Trainable as the original was: with and without gradients, layers add in another order."""
    return PeftModel.from_pretrained(copy.deepcopy(base), path, is_trainable=True)


@torch.no_grad()
def randomise(model, *adapters):
    for name, core in cores(model).items():
        if not adapters or name.split(".")[-2] in adapters:
            core.normal_(std=0.3)  # from 1 on, softmax amplifies roundings without end


def by_plain_torch(base, model, x):
    """``plain`` and ``exact`` of `assert_composition_close`: the base with all updates added."""
    model = copy.deepcopy(model)  # what becomes of it afterwards is not meant
    exact = with_updates(copy.deepcopy(base).double(), model)(x.double())
    return lambda: with_updates(base, model)(x), exact


def as_native(model, base):
    """The adapter of `tcur.adapt` with the same cores."""
    adapter = tcur.adapt(copy.deepcopy(base), rank=2, targets=list(TARGETS))
    with torch.no_grad():
        for name, stack in adapter.stacks.items():
            stack.core.copy_(cores(model)[f"base_model.tcur_{name}.default.core"])
    return adapter


def test_registering_again_changes_nothing():
    members = list(peft.PeftType)
    register()
    register()
    assert list(peft.PeftType) == members
    assert peft.PeftType("TCUR") is peft.PeftType.TCUR is TCURConfig().peft_type
    assert pickle.loads(pickle.dumps(TCURConfig())) == TCURConfig()


@pytest.mark.parametrize("mode", ["auto", "materialized", "factored"])
def test_a_fresh_adapter_changes_no_bit_and_only_cores_train(mode, x):
    model, base = adapted(mode=mode)
    assert torch.equal(model(x), base(x))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == list(cores(model))
    optimizer = torch.optim.Adam(cores(model).values(), lr=1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        losses.append(loss.item())
        for core in cores(model).values():
            assert (core.grad != 0).all(dim=(1, 2)).all()
        optimizer.step()
    assert losses == sorted(losses, reverse=True)
    for name, weight in base.state_dict().items():
        stem, _, leaf = name.rpartition(".")
        twin = model.base_model.model.get_submodule(stem)
        twin = twin.get_base_layer() if isinstance(twin, TCURLinear) else twin
        assert torch.equal(getattr(twin, leaf), weight), name


def test_the_same_numbers_as_the_native_adapter(x):
    model, base = adapted()
    randomise(model)
    adapter = as_native(model, base)
    native = adapter.model
    assert [s.members for s in model.plans["default"].stacks] == [
        s.members for s in adapter.plan.stacks
    ]
    model(x).square().sum().backward()
    native(x).square().sum().backward()
    assert torch.equal(model(x), native(x))
    for name, stack in adapter.stacks.items():
        assert torch.equal(
            cores(model)[f"base_model.tcur_{name}.default.core"].grad, stack.core.grad
        )


def test_a_core_has_one_name(x, capsys):
    model, base = adapted()
    names = [name for name in model.state_dict() if "tcur_" in name]
    assert sorted(names) == [
        "base_model.tcur_32x8.default.core",
        "base_model.tcur_8x32.default.core",
        "base_model.tcur_8x8.default.core",
    ]
    count = (12 + 3 + 3) * 2 * 2
    every = count + sum(p.numel() for p in base.parameters())
    assert model.get_nb_trainable_parameters() == (count, every)
    model.print_trainable_parameters()
    assert f"trainable params: {count} || all params: {every:,}" in capsys.readouterr().out
    status = model.get_model_status()
    assert status.num_adapter_layers == 12
    assert status.requires_grad == {"default": True}
    assert set(status.peft_types.values()) == {"TCUR"}
    assert "tcur.TCURLinear" in repr(model)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load(x, tmp_path, low_cpu_mem_usage):
    model, base = adapted(modules_to_save=["head"], alpha=0.5)
    randomise(model)
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].weight.normal_()
        y = model(x)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sorted(saved) == [
        "base_model.model.head.bias",
        "base_model.model.head.weight",
        "base_model.tcur_32x8.core",
        "base_model.tcur_8x32.core",
        "base_model.tcur_8x8.core",
    ]
    assert isinstance(PeftConfig.from_pretrained(tmp_path), TCURConfig)
    loaded = PeftModel.from_pretrained(
        copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert torch.equal(loaded(x), y)
    assert not any(p.requires_grad for p in loaded.parameters())
    trainable = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    trainable(x).sum().backward()
    assert all(core.grad.abs().max() > 0 for core in cores(trainable).values())


def test_drawn_indices_come_back(x, tmp_path):
    """Random rules draw anew each time; the indices are in the file."""
    model, base = adapted(selection="uniform")
    randomise(model)
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)
    assert torch.equal(reloaded(base, tmp_path)(x), model(x))


def test_a_config_is_the_callers_and_serves_several_models(x, tmp_path):
    """Each model has its own plan, whichever was made last, and what is saved is its own too."""
    settings = config()
    bases, models = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        bases.append(Tiny().eval().requires_grad_(False))
        models.append(get_peft_model(copy.deepcopy(bases[-1]), settings))
        assert torch.equal(models[-1](x), bases[-1](x))
        assert models[-1].peft_config["default"] is settings
    plans = [model.peft_config["default"].plan for model in models]
    assert plans[0] != plans[1]
    for index, (model, base) in enumerate(zip(models, bases, strict=True)):
        randomise(model)
        model.save_pretrained(tmp_path / str(index))
        loaded = reloaded(base, tmp_path / str(index))
        assert torch.equal(loaded(x), model(x))
        assert loaded.peft_config["default"].plan == plans[index]
        assert str(loaded.plans["default"]).splitlines()[1] == (
            "stack 32x8: 3 matrices of 32 x 8 share one core of 3 x 2 x 2 numbers: blocks.0-2.mlp.0"
        )


def test_all_linear_layers_are_found_anew_by_a_used_config():
    settings = TCURConfig(rank=2)
    for blocks in (3, 2, 4):  # from 20 names on, peft makes fewer of them
        model = get_peft_model(Tiny(blocks=blocks), settings)
        assert sum(len(s.members) for s in model.plans["default"].stacks) == 4 * blocks
        assert {item.module for item in model.plans["default"].left_out} == {"embed", "head"}


def test_a_used_config_goes_on_from_the_same_indices_on_the_same_base(x, tmp_path):
    """As it has to where weights are loaded by it; and otherwise plans anew."""
    settings = config(selection="uniform")
    base = Tiny().eval().requires_grad_(False)
    model = get_peft_model(copy.deepcopy(base), settings)
    randomise(model)
    model.save_pretrained(tmp_path)
    plan = model.peft_config["default"].plan
    for own in (settings, copy.deepcopy(settings), pickle.loads(pickle.dumps(settings))):
        loaded = PeftModel.from_pretrained(
            copy.deepcopy(base), tmp_path, config=own, is_trainable=True
        )
        assert loaded.peft_config["default"] is own
        assert torch.equal(loaded(x), model(x))
    for change in ({"rank": 3}, {"target_modules": {"qkv"}}, {"selection": "norm"}):
        own = copy.deepcopy(settings)
        for name, value in change.items():
            setattr(own, name, value)
        other = get_peft_model(copy.deepcopy(base), own).peft_config["default"]
        assert other.plan != plan


def test_many_adapters_live_together(x, tmp_path):
    model, base = adapted()
    model.add_adapter("second", config(rank=3, alpha=0.5, target_modules=["qkv", "mlp.0"]))
    model.add_adapter("third", config(target_modules=["mlp.2"]))
    randomise(model)
    outputs = {}
    with torch.no_grad():
        for name in ("second", "default", "third"):
            model.set_adapter(name)
            outputs[name] = model(x)
            trained = {n for n, p in model.named_parameters() if p.requires_grad}
            assert trained == {n for n in cores(model) if n.split(".")[-2] == name}
    distinct = {tuple(y.flatten().tolist()) for y in [*outputs.values(), base(x)]}
    assert len(distinct) == 4
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    again.load_adapter(tmp_path / "second", "renamed")
    with torch.no_grad():
        for name, original in (("default", "default"), ("renamed", "second")):
            again.set_adapter(name)
            assert torch.equal(again(x), outputs[original])

        model.set_adapter("second")
        model.delete_adapter("default")
        assert torch.equal(model(x), outputs["second"])
        assert not [name for name in model.state_dict() if ".default." in name]
        assert list(model.plans) == ["second", "third"]
        with model.disable_adapter():
            assert torch.equal(model(x), base(x))
        assert torch.equal(model(x), outputs["second"])
        assert torch.equal(model.unload()(x), base(x))


def test_a_saved_adapter_holds_no_other(x, tmp_path):
    model, _ = adapted()
    model.add_adapter("second", config(rank=3))
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "second" / "adapter_model.safetensors"))
    own = {f"base_model.tcur_{shape}.core" for shape in ("8x8", "32x8", "8x32")}
    # peft 0.18 writes the others beside it, for every method but LoRA; loading ignores them.
    assert own <= names if OLD_PEFT else own == names


def test_active_together(x):
    """Updates of adapters that are active at once add up."""
    model, base = adapted()
    model.add_adapter("second", config(rank=3, alpha=0.5, target_modules=["qkv", "mlp.0"]))
    randomise(model)
    model.base_model.set_adapter(["default", "second"])
    with torch.no_grad():
        y = model(x)
    model(x).sum().backward()
    assert all(core.grad.abs().max() > 0 for core in cores(model).values())
    with torch.no_grad():
        expected = by_plain_torch(base, model, x)
        assert_composition_close(y, *expected)
        model.merge_adapter()
        assert_composition_close(model(x), *expected)
        model.unmerge_adapter()
        assert torch.equal(model(x), y)


@pytest.mark.parametrize("shared", [True, False], ids=["shared factors", "own factors"])
def test_an_adapter_for_each_row(shared, x):
    """peft's mixed batches: equal to each adapter alone on its rows."""
    model, base = adapted(modules_to_save=["head"])
    other = config(modules_to_save=["head"]) if shared else config(rank=3, target_modules=["qkv"])
    model.add_adapter("second", other)
    randomise(model)
    with torch.no_grad():
        for head in model.base_model.model.head.modules_to_save.values():
            head.weight.normal_()
        names = ["second", "__base__", "default", "second"]

        def alone(name, base=base):
            """The base with the update of one adapter, and the head it trained."""
            if name == "__base__":
                return base
            twin = with_updates(base, model, [name])
            heads = model.base_model.model.head.modules_to_save
            if name in heads:
                twin.head.load_state_dict(heads[name].state_dict())
            return twin

        def apart(x, base=base):
            return torch.stack([alone(name, base)(x)[i] for i, name in enumerate(names)])

        double = copy.deepcopy(base).double()
        expected = lambda: apart(x), apart(x.double(), double)
        assert_composition_close(model.eval()(x, adapter_names=names), *expected)
        beams = model(x.repeat_interleave(2, 0), adapter_names=[n for n in names for _ in "ab"])
        assert_composition_close(beams[::2], *expected)
        for name in ("default", "second"):
            model.set_adapter(name)
            exact = alone(name, double)(x.double())
            assert_composition_close(model(x), lambda name=name: alone(name)(x), exact)
        with pytest.raises(ValueError, match=r"non-existing adapter\(s\): third"):
            model(x, adapter_names=["third"] * 4)
        with pytest.raises(ValueError, match="when the model is in training mode"):
            model.train()(x, adapter_names=names)
        model.eval().merge_adapter()
        with pytest.raises(ValueError, match="when there are merged adapters"):
            model(x, adapter_names=names)


def exact_update(layer, name):
    """The update of one layer in float64, by the block-circulant definition."""
    stack, place = layer.tcur_stacks[name], layer.tcur_places[name]
    update = stack.scale * cur_product(stack.lateral, stack.core.detach(), stack.horizontal)
    return update[place.slice_index : place.slice_index + place.slices].flatten(0, 1)


def test_delta_weight_is_the_update():
    model, _ = adapted(alpha=0.5)
    randomise(model)
    for layer in (m for m in model.modules() if isinstance(m, TCURLinear)):
        exact = exact_update(layer, "default")
        stack, place = layer.tcur_stacks["default"], layer.tcur_places["default"]
        whole = stack.scale * product(stack.lateral, stack.core.detach(), stack.horizontal)
        same = whole[place.slice_index : place.slice_index + place.slices].flatten(0, 1)
        assert_close(layer.get_delta_weight("default"), same, exact)


def test_merge_and_unmerge(x):
    model, base = adapted()
    randomise(model)
    with torch.no_grad():
        y, expected = model(x), by_plain_torch(base, model, x)
        assert_composition_close(y, *expected)
        before = copy.deepcopy(model.state_dict())
        for safe in (False, True):
            model.merge_adapter(safe_merge=safe)
            assert_composition_close(model(x), *expected)
            model.unmerge_adapter()
            assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
        model.merge_adapter()
        with pytest.warns(UserWarning, match="All adapters are already merged"):
            model.merge_adapter()
        with model.disable_adapter():  # unmerges, as every layer of peft does
            assert torch.equal(model(x), base(x))
        assert torch.equal(model(x), y)
        with pytest.warns(UserWarning, match="Already unmerged"):
            model.unmerge_adapter()
        merged = model.merge_and_unload(safe_merge=True)
    assert set(merged.state_dict()) == set(base.state_dict())
    assert_composition_close(merged(x), *expected)


def test_fifty_merges_in_bf16_do_not_drift():
    base = Tiny().eval().to(torch.bfloat16)
    model = get_peft_model(copy.deepcopy(base), config())
    randomise(model)
    before = copy.deepcopy(model.state_dict())
    for _ in range(50):
        model.merge_adapter()
        model.unmerge_adapter()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    # Merged in fp32 and rounded once: a sum of fp32 may lie on the other side of a rounding edge.
    layer = model.base_model.model.blocks[0].mlp[0]
    base_weight = base.blocks[0].mlp[0].weight
    exact = base_weight.double() + exact_update(layer, "default")
    same = with_updates(copy.deepcopy(base).float(), model).blocks[0].mlp[0].weight
    error = bound(same, exact) * exact.norm()
    model.merge_adapter()
    assert (layer.base_layer.weight >= (exact - error).bfloat16()).all()
    assert (layer.base_layer.weight <= (exact + error).bfloat16()).all()


def test_a_broken_core_is_refused_before_anything_is_written(x):
    model, _ = adapted()
    randomise(model)
    with torch.no_grad():
        cores(model)["base_model.tcur_8x32.default.core"][0, 0, 0] = float("nan")
    before = copy.deepcopy(model.base_model.model.state_dict())
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"safe_merge: .* got NaN or Inf in .*mlp\.2"):
            merge(safe_merge=True)
    layer = model.base_model.model.blocks[0].mlp[2]
    with pytest.raises(ValueError, match=r"safe_merge: .* by default"):
        layer.merge(safe_merge=True)
    after = model.base_model.model.state_dict()
    assert all(torch.equal(t, before[name]) for name, t in after.items())
    assert not any(m.merged for m in model.modules() if isinstance(m, TCURLinear))


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"target_modules": None}, "8x8 32x8 8x32"),
        ({"target_modules": "all-linear"}, "8x8 32x8 8x32"),
        ({"target_modules": r"blocks\.[01]\..*qkv"}, "8x8"),
        ({"exclude_modules": ["mlp.2"]}, "8x8 32x8"),
        ({"exclude_modules": r".*mlp\.\d"}, "8x8"),
    ],
)
def test_targets(choice, expected, x, tmp_path):
    model, base = adapted(**choice)
    randomise(model)
    stacks = {s.name: s for s in model.plans["default"].stacks}
    assert list(stacks) == expected.split()
    if choice.get("target_modules", "") in (None, "all-linear"):
        left_out = {item.module: item.reason for item in model.plans["default"].left_out}
        assert left_out == dict.fromkeys(("embed", "head"), "the only slice of its shape")
    model.save_pretrained(tmp_path)
    assert torch.equal(reloaded(base, tmp_path)(x), model(x))


def test_a_stack_for_each_layer_is_matrix_cur(x, tmp_path):
    model, base = adapted(stacks="layer", basis="slices")
    stacks = model.plans["default"].stacks
    assert len(stacks) == 12
    assert all(s.n3 == 1 for s in stacks)
    randomise(model)
    layer = model.base_model.model.blocks[1].attn.qkv
    stack, weight = layer.tcur_stacks["default"], layer.base_layer.weight
    rows, columns = list(stack.rows), list(stack.columns)
    assert_close(
        layer.get_delta_weight("default"),
        weight[:, columns] @ stack.core[0] @ weight[rows],
        weight[:, columns].double() @ stack.core[0].double() @ weight[rows].double(),
    )
    model.save_pretrained(tmp_path)
    assert torch.equal(reloaded(base, tmp_path)(x), model(x))


def test_copies_share_as_the_original_does(x):
    model, _ = adapted()
    randomise(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
        randomise(twin)
        assert not torch.equal(twin(x), model(x))


def test_cores_stay_fp32_in_a_bf16_model(x):
    base = Tiny().eval().to(torch.bfloat16)
    model = get_peft_model(copy.deepcopy(base), config())
    assert {core.dtype for core in cores(model).values()} == {torch.float32}
    model.to(torch.bfloat16)
    assert {core.dtype for core in cores(model).values()} == {torch.float32}
    y = model(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert_composition_close(y, *by_plain_torch(base, model, x.bfloat16()))


def test_compiles_without_a_graph_break(x):
    model, base = adapted()
    randomise(model)
    adapter = as_native(model, base)
    plain, exact = Plain(adapter), Plain(adapter, torch.float64)
    exact = exact.with_gradients(torch.sum, x.double())
    for function in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        y = function(x)
        y.sum().backward()
        grads = [
            cores(model)[f"base_model.tcur_{name}.default.core"].grad for name in adapter.stacks
        ]
        assert_composition_close((y, *grads), lambda: plain.with_gradients(torch.sum, x), exact)


def test_plans_are_json(tmp_path):
    model, _ = adapted()
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["format_version"] == 2
    assert [(s["name"], len(s["members"])) for s in saved["plan"]] == [
        ("8x8", 6),
        ("32x8", 3),
        ("8x32", 3),
    ]
