"""Adapters of whole models: plan, adapt, save and load."""

from .adapt import adapt
from .adapter import Adapter
from .batch import StackedCores
from .file import read_metadata
from .load import load_adapter
from .plan import Plan

__all__ = ["Adapter", "Plan", "StackedCores", "adapt", "load_adapter", "read_metadata"]
