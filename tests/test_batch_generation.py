"""Batches of transformers' models: generation by rows, and a packed prompt."""

import pytest
import torch

import tcur_kernels as tcur
from hf_models import llama
from test_batch import some_cores
from tolerance import same_mathematics


@pytest.fixture(scope="module")
def served():
    torch.manual_seed(0)
    adapter = tcur.adapt(llama().eval(), rank=2)
    return adapter, adapter.stack_cores(some_cores(adapter, 2))


def test_a_generation_goes_by_ids_of_rows(served):
    adapter, cores = served
    ids, prompts = torch.tensor([1, -1, 0]), torch.randint(1, 50, (3, 5))
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}

    def generated(prompts, ids):
        with adapter.batch(cores, ids):
            return adapter.model.generate(prompts, attention_mask=torch.ones_like(prompts), **how)

    together = generated(prompts, ids)
    for row in range(3):
        assert torch.equal(together[row], generated(prompts[row : row + 1], ids[row : row + 1])[0])
    with adapter.disable():
        base = adapter.model.generate(prompts, attention_mask=torch.ones_like(prompts), **how)
    assert torch.equal(together[1], base[1])
    assert not torch.equal(together[0], base[0])
    with (
        adapter.batch(cores, ids[:, None].expand(3, 5), per="token"),
        pytest.raises(ValueError, match=r"x: expected \[3, 5, features\], an id for each token, g"),
    ):
        adapter.model.generate(prompts, attention_mask=torch.ones_like(prompts), **how)


def test_a_packed_prompt_is_each_sequence_alone(served):
    adapter, cores = served
    lengths, ids = (3, 4, 2), torch.tensor([1, -1, 0])
    prompts = [torch.randint(1, 50, (1, length)) for length in lengths]
    bounds = torch.tensor([0, 3, 7, 9], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    sequence = torch.arange(3).repeat_interleave(torch.tensor(lengths))
    sees = (sequence[:, None] == sequence) & torch.ones(9, 9).tril().bool()
    mask = torch.zeros(1, 1, 9, 9).masked_fill(~sees, -torch.inf)
    with torch.no_grad():
        with adapter.batch(cores, ids, cu_seqlens=bounds):
            packed = adapter.model(
                torch.cat(prompts, 1), attention_mask=mask, position_ids=positions
            ).logits[0]
        for own, prompt, id_ in zip(packed.split(lengths), prompts, ids, strict=True):
            with adapter.batch(cores, id_[None]):
                assert same_mathematics(own, adapter.model(prompt).logits[0])
