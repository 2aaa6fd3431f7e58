"""Adapters of whole models: plan, adapt, save and load."""

from .adapt import adapt as adapt
from .adapter import Adapter as Adapter
from .batch import StackedCores as StackedCores
from .load import load_adapter as load_adapter
from .plan import Plan as Plan
