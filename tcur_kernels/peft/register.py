"""Registers the method with peft, which has no entry points for external methods."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from .config import TCURConfig, peft_type
from .model import TCURModel


def register() -> None:
    """Registers the method with peft. Further calls change nothing."""
    name = peft_type()
    if name not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(
            name=name.value.lower(),
            config_cls=TCURConfig,
            model_cls=TCURModel,
            prefix=TCURModel.prefix,
        )
