"""tCURLoRA as a method of Hugging Face peft: importing this module registers it.

``get_peft_model(model, TCURConfig(...))`` and everything that follows is peft's own interface; see
docs/peft.md. A process that loads a saved adapter must have imported this module before, because
peft does not look for plug-ins.

Raises:
    ImportError: peft is absent, or of a version that this module does not know.
"""

from .requirement import check_peft

check_peft()

from .config import TCURConfig  # noqa: E402
from .layer import TCURLinear  # noqa: E402
from .model import TCURModel  # noqa: E402
from .register import register  # noqa: E402

__all__ = ["TCURConfig", "TCURLinear", "TCURModel", "register"]

register()
