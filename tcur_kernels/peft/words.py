"""What LoRA calls otherwise, or has and tCURLoRA has not: an error says the word to use."""

from __future__ import annotations

from collections.abc import Iterable

_CONV1D = "nothing, since the layout of transformers' Conv1D is known by its type"
#: Arguments of `LoraConfig` that `TCURConfig` does not take -> what to give in their place.
WORDS = {
    "lora_alpha": "alpha, which is not divided by the rank: LoRA's scale lora_alpha / r is alpha",
    "use_rslora": "nothing, since one learning rate serves all ranks in the orthonormal basis",
    "init_lora_weights": "init_weights",
    "fan_in_fan_out": _CONV1D,
    "lora_dropout": "nothing, since the update and the product with the weight are one "
    "computation, in which the input of the update cannot be dropped by itself",
    "bias": "nothing, since no bias is trained; modules_to_save trains whole modules",
    "use_dora": "nothing, since there is no magnitude to train",
}


def refuse_other_words(given: Iterable[str]) -> None:
    """Refuses arguments that only LoRA has.

    peft drops unknown entries of a config file if the message is that of Python.

    Raises:
        TypeError: the message says what to give in place of the argument.
    """
    for word in given:
        if word in WORDS:
            raise TypeError(
                f"{word}: expected {WORDS[word]}; TCURConfig got an unexpected keyword argument "
                f"{word!r}"
            )
