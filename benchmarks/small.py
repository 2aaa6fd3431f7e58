"""Times whole training steps of a small encoder, MiniLM's size: forward, backward and Adam.

The linear layers of such a model are small, so what is not a product counts as much as products do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import peft
import torch
import transformers
from torch import nn

import tcur_kernels as tcur

from .timing import Timing, interleave

#: name -> (texts, tokens of each)
CASES = {"minilm_16x22": (16, 22)}
YARDSTICK = "lora_8"
LABELS, WORDS = 26, 1000
SIZE = {
    "num_hidden_layers": 6,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_attention_heads": 12,
}


def build() -> nn.Module:
    """A BERT with random weights, the same at every call; its head alone requires grad."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=WORDS,
        num_labels=LABELS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **SIZE,
    )
    model = transformers.BertForSequenceClassification(config).requires_grad_(False)
    model.classifier.requires_grad_(True)
    return model


def _targets(model: nn.Module) -> list[str]:
    """The linear layers of the encoder, by their names in the model."""
    return [
        name
        for name, module in model.named_modules()
        if ".encoder." in name and isinstance(module, nn.Linear)
    ]


def lora(model: nn.Module, rank: int) -> nn.Module:
    """peft's LoRA on the linear layers of the encoder; the head trains."""
    config = peft.LoraConfig(r=rank, target_modules=_targets(model))
    adapted: nn.Module = peft.inject_adapter_in_model(config, model)
    model.classifier.requires_grad_(True)
    return adapted


def cores(model: nn.Module, rank: int) -> nn.Module:
    """tCURLoRA on the same layers; the head trains."""
    tcur.adapt(model, rank=rank, targets=_targets(model), train_also="classifier")
    return model


METHODS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "tcur_8": lambda model: cores(model, 8),
    "tcur_16": lambda model: cores(model, 16),
    "tcur_32": lambda model: cores(model, 32),
    "lora_1": lambda model: lora(model, 1),
    "lora_8": lambda model: lora(model, 8),
    "head": lambda model: model,
    "full": lambda model: model.requires_grad_(True),
}


def step_of(model: nn.Module, texts: int, length: int) -> Callable[[], float]:
    """A training step, which returns its loss; the same texts at every step."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(WORDS, (texts, length), generator=generator)
    labels = torch.randint(LABELS, (texts,), generator=generator)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> float:
        optimizer.zero_grad()
        loss = model(input_ids=words, labels=labels).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def measure(case: str, rounds: int) -> dict[str, Timing]:
    """Compares the losses of the first steps, then times further ones.

    Raises:
        RuntimeError: a method starts from another model than the others, or its step does not
            reduce the loss; nothing is timed then.
    """
    base = build()
    steps = {}
    first: float | None = None
    for name, prepare in METHODS.items():
        steps[name] = step_of(prepare(copy.deepcopy(base)).train(), *CASES[case])
        losses = [steps[name]() for _ in range(3)]
        first = losses[0] if first is None else first
        if not (abs(losses[0] - first) < 1e-5 * first and losses[2] < losses[0]):
            raise RuntimeError(f"{name}: losses {losses}, where they begin with {first}")
    return interleave(steps, YARDSTICK, rounds)
