"""Adapters of whole models: plan, adapt, save and load."""

from .adapt import Adapter as Adapter
from .adapt import adapt as adapt
from .load import load_adapter as load_adapter
from .plan import Plan as Plan
