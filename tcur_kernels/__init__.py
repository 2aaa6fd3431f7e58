"""Fused t-products and tensor-CUR low-rank adaptation for PyTorch."""

from .adapters import (
    Adapter,
    AdapterStore,
    Budget,
    GroupedCores,
    LoraExport,
    Plan,
    StackedCores,
    Tenants,
    adapt,
    collect_gradients,
    load_adapter,
    read_metadata,
)
from .decompose import TensorCUR, matrix_cur, modewise_cur, tensor_cur
from .layers.linear import TProductLinear
from .layers.stack import TProductStack
from .operators.dispatch import build_info
from .operators.factors import CURFactors
from .operators.functional import cur_linear, cur_product, materialize
from .t_product import multirank, t_identity, t_pinv, t_product, t_svd, t_transpose, tubal_rank

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AdapterStore",
    "Budget",
    "CURFactors",
    "GroupedCores",
    "LoraExport",
    "Plan",
    "StackedCores",
    "TProductLinear",
    "TProductStack",
    "Tenants",
    "TensorCUR",
    "adapt",
    "build_info",
    "collect_gradients",
    "cur_linear",
    "cur_product",
    "load_adapter",
    "materialize",
    "matrix_cur",
    "modewise_cur",
    "multirank",
    "read_metadata",
    "t_identity",
    "t_pinv",
    "t_product",
    "t_svd",
    "t_transpose",
    "tensor_cur",
    "tubal_rank",
]
