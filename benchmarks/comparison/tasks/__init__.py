"""The tasks, by their names in rows."""

from __future__ import annotations

from .base import Task
from .images import Digits
from .letters import Letters
from .texts import Glosses
from .volumes import FrozenVolumes, Volumes

TASKS: dict[str, type[Task]] = {
    "minilm": Glosses,
    "letters": Letters,
    "digits": Digits,
    "volumes": Volumes,
    "frozen": FrozenVolumes,
}
