"""A language model that is adapted from one author to another."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from .base import Part, Sources, Task, example, is_linear, pretrained, wrong


class Letters(Task):
    """The language model of examples/language_model.py: from Sherlock Holmes to Romeo and Juliet.

    It predicts the next character, or a user's model the next token. A seed draws the windows of
    the training, all of them from the first ``size`` per cent of the new text's training part.
    What is kept is the prediction of the old text.
    """

    sizes: ClassVar = (100,)
    searched: ClassVar = 100
    measure: ClassVar = "accuracy of the next character"
    kept_measure: ClassVar = "the same in the old text"
    own: ClassVar = ("language_model", "old_text", "new_text")
    rate_scale: ClassVar = 3.0
    steps = 100

    def __init__(self, sources: Sources, size: int, seed: int) -> None:
        module, texts = example("language_model"), example("language_model_texts")
        settings = module.parse_args(["--smoke"] if sources.quick else [])
        settings.old_text = sources.old_text or settings.old_text
        settings.new_text = sources.new_text or settings.new_text
        self.steps = 3 if sources.quick else type(self).steps
        self._context, self._draw, self._windows = settings.context, texts.batches, texts.windows
        if sources.language_model is None:
            encode, _ = texts.characters(settings.old_text, settings.new_text)
            self.layers = ["transformer.h.*"]
        else:
            if not (sources.language_model / "config.json").is_file():
                raise wrong("language-model", "a folder with config.json", sources.language_model)
            settings.model = sources.language_model
            own, encode, _ = module.load_base(settings)
        self._old, self._text = (
            texts.read_text(path, encode, self._context)
            for path in (settings.old_text, settings.new_text)
        )
        self._training = self._text.training[: len(self._text.training) * size // 100]

        def pretrain() -> nn.Module:
            model, _, _ = module.new_base(settings)
            steps, rate = settings.pretrain_steps, settings.pretrain_rate
            module.optimise(settings, model, self._old.training, rate, steps, "pretraining")
            return model

        key = ("letters", sources)
        self.base = pretrained(key, pretrain if sources.language_model is None else lambda: own)
        if sources.language_model is not None:
            head = self.base.get_output_embeddings()
            self.layers = [
                name
                for name, layer in self.base.named_modules()
                if is_linear(layer) and layer is not head
            ]

    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        """The loss of 16 windows."""
        ids = self._draw(self._training, self._context, 16, generator)
        return model(input_ids=ids, labels=ids).loss

    def score(self, model: nn.Module, part: Part) -> float:
        """The fraction of characters that are predicted."""
        return self._accuracy(model, getattr(self._text, part))

    def kept(self, model: nn.Module) -> float:
        """The same in the held-out part of the old text."""
        return self._accuracy(model, self._old.test)

    @torch.no_grad()
    def _accuracy(self, model: nn.Module, numbers: Tensor) -> float:
        every = self._windows(numbers, self._context)
        right = 0
        for ids in every.split(64):
            right += int((model(input_ids=ids).logits[:, :-1].argmax(-1) == ids[:, 1:]).sum())
        return right / every[:, 1:].numel()
