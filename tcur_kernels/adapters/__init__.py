"""Adapters of whole models: plan, adapt, save and load."""

from .adapt import adapt
from .adapter import Adapter
from .batch import StackedCores
from .budget import Budget
from .file import read_metadata
from .gradients import collect_gradients
from .groups import GroupedCores
from .load import load_adapter
from .lora_file import LoraExport
from .plan import Plan

__all__ = [
    "Adapter",
    "Budget",
    "GroupedCores",
    "LoraExport",
    "Plan",
    "StackedCores",
    "adapt",
    "collect_gradients",
    "load_adapter",
    "read_metadata",
]
