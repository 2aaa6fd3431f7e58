"""tCURLoRA as a method of Hugging Face peft: importing this module registers it.

Use ``get_peft_model(model, TCURConfig(...))`` and then peft's own interface; see docs/peft.md. A
process must import this module before it loads a saved adapter, because peft does not look for
plug-ins.

Raises:
    ImportError: peft is missing, or its version is not supported.
"""

from .requirement import check_peft

check_peft()

from .config import TCURConfig  # noqa: E402
from .layer import TCURLinear  # noqa: E402
from .lora import save_as_lora  # noqa: E402
from .model import TCURModel  # noqa: E402
from .register import register  # noqa: E402

__all__ = ["TCURConfig", "TCURLinear", "TCURModel", "register", "save_as_lora"]

register()
