"""Batches whose rows go by different adapters: which row is whose is known, or refused."""

import copy
import threading

import peft
import pytest
import torch
import transformers
from peft import get_peft_model

from hf_models import PEFT_SAYS, gpt2
from models import Tiny
from tcur_kernels.peft import TCURConfig, TCURLinear
from tolerance import same_mathematics

pytestmark = [pytest.mark.filterwarnings(text) for text in PEFT_SAYS]

OLD_PEFT = tuple(map(int, peft.__version__.split(".")[:2])) < (0, 19)
SAME_LENGTH = r"Length of `adapter_names` should be the same as the number of inputs, but got"


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def two_adapters(base, shared=True, **kwargs):
    settings = {"rank": 2, "init_weights": False, **kwargs}
    model = get_peft_model(base, TCURConfig(**settings))
    model.add_adapter("second", TCURConfig(**{**settings, "rank": 2 if shared else 3}))
    return model.eval()


def t5():
    settings = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
        decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(settings).eval()


@pytest.mark.parametrize("shared", [True, False], ids=["shared factors", "own factors"])
@torch.no_grad()
def test_other_numbers_of_rows_are_refused(shared):
    model, x = two_adapters(Tiny(), shared), torch.randn(4, 7, 6)
    names = ["default", "second"]
    alone = model(x[:2], adapter_names=names)
    for wrong in (torch.cat([x[:2], x[:2]]), x[:2].repeat_interleave(2, 0), x[:3], x[:1]):
        with pytest.raises(ValueError, match=f"{SAME_LENGTH} 2 and {len(wrong)} respectively"):
            model(wrong, adapter_names=names)
    with pytest.raises(ValueError, match="alora_offsets: expected None, since they are for LoRA"):
        model(x[:2], alora_offsets=[1, 2])
    assert torch.equal(model(x[:2], adapter_names=names), alone)
    model.set_adapter("second")
    assert same_mathematics(alone[1], model(x[:2])[1])


@pytest.mark.parametrize("shared", [True, False], ids=["shared factors", "own factors"])
@pytest.mark.parametrize("make", [gpt2, t5], ids=["decoder", "encoder and decoder"])
@torch.no_grad()
def test_beams_stand_one_after_another_past_the_encoder(make, shared):
    """Row by row what each adapter generates alone."""
    if make is t5 and OLD_PEFT:
        pytest.skip("peft 0.18 generates with encoders of transformers 4 alone")
    model = two_adapters(make(), shared, task_type="CAUSAL_LM" if make is gpt2 else "SEQ_2_SEQ_LM")
    inputs = torch.randint(1, 40, (3, 5))
    how = {
        "attention_mask": torch.ones_like(inputs), "num_beams": 3, "max_new_tokens": 6,
        "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0,
    }  # fmt: skip
    names = ["second", "__base__", "default"]
    together = model.generate(input_ids=inputs, adapter_names=names, **how)
    apart = []
    for name in ("second", "default"):
        model.set_adapter(name)
        apart.append(model.generate(input_ids=inputs, **how))
    with model.disable_adapter():
        base = model.generate(input_ids=inputs, **how)
    assert torch.equal(together, torch.stack([apart[0][0], base[1], apart[1][2]]))
    assert not torch.equal(apart[0], apart[1])
    with pytest.raises(ValueError, match=SAME_LENGTH):
        model.generate(input_ids=inputs, adapter_names=names[:2], **how)


@pytest.mark.parametrize("shared", [True, False], ids=["shared factors", "own factors"])
def test_threads_have_their_own_batches(shared):
    model, x = two_adapters(Tiny(), shared, modules_to_save=["head"]), torch.randn(2, 7, 6)
    for head in model.base_model.model.head.modules_to_save.values():
        torch.nn.init.normal_(head.weight)
    wanted = {"one": ["default", "second"], "two": ["second", "__base__"], "none": None}
    meet = threading.Barrier(len(wanted))
    layer = model.base_model.model.blocks[1].mlp[0]
    got, errors = {}, []

    def wait(*_):
        meet.wait(30)

    handle = layer.register_forward_pre_hook(wait)

    def work(key):
        try:
            with torch.no_grad():
                names = {} if wanted[key] is None else {"adapter_names": wanted[key]}
                got[key] = model(x, **names)
        except Exception as error:  # shown below: a thread has nobody to tell
            errors.append(error)

    threads = [threading.Thread(target=work, args=(key,)) for key in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    handle.remove()
    with torch.no_grad():
        for key, names in wanted.items():
            named = {} if names is None else {"adapter_names": names}
            assert same_mathematics(got[key], model(x, **named)), key


@torch.no_grad()
def test_another_model_within_a_batch_has_no_part_in_it():
    """A teacher that a layer asks, say."""
    x = torch.randn(2, 7, 6)
    model, teacher = two_adapters(Tiny()), two_adapters(Tiny())
    alone, said = teacher(x), []
    model.base_model.model.embed.register_forward_hook(lambda *_: said.append(teacher(x)) or None)
    model(x, adapter_names=["second", "__base__"])
    assert torch.equal(said[0], alone)


@torch.no_grad()
def test_disabled_adapters_are_none_for_any_row():
    base, x = Tiny().eval(), torch.randn(2, 7, 6)
    model = two_adapters(copy.deepcopy(base))
    base.requires_grad_(False)  # as peft does, or torch computes otherwise
    with model.disable_adapter():
        assert torch.equal(model(x, adapter_names=["default", "second"]), base(x))


@torch.no_grad()
def test_a_weight_that_is_read_is_no_weight_of_all_rows():
    base = torch.nn.ModuleDict({"first": torch.nn.Linear(8, 8), "second": torch.nn.Linear(8, 8)})
    base.forward = None
    model = two_adapters(base, target_modules=["first", "second"])
    model.base_model.model.forward = lambda x: x @ model.base_model.model["first"].weight.T
    with pytest.raises(RuntimeError, match=r"weight: expected a layer that is called, got one who"):
        model(torch.randn(2, 8), adapter_names=["default", "second"])
    layer = model.base_model.model["first"]
    assert isinstance(layer, TCURLinear)
    model.base_model.model.forward = lambda x: layer(x) if layer.weight.dtype == x.dtype else None
    assert model(torch.randn(2, 8), adapter_names=["default", "second"]).shape == (2, 8)
