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
from .store import AdapterStore
from .tenants import Tenants

__all__ = [
    "Adapter",
    "AdapterStore",
    "Budget",
    "GroupedCores",
    "LoraExport",
    "Plan",
    "StackedCores",
    "Tenants",
    "adapt",
    "collect_gradients",
    "load_adapter",
    "read_metadata",
]
