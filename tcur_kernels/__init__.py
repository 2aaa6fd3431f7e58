"""Fused t-products and tensor-CUR low-rank adaptation for PyTorch."""

from .adapters import Adapter as Adapter
from .adapters import Plan as Plan
from .adapters import StackedCores as StackedCores
from .adapters import adapt as adapt
from .adapters import load_adapter as load_adapter
from .decompose import TensorCUR as TensorCUR
from .decompose import matrix_cur as matrix_cur
from .decompose import modewise_cur as modewise_cur
from .decompose import tensor_cur as tensor_cur
from .layers.linear import TProductLinear as TProductLinear
from .layers.stack import TProductStack as TProductStack
from .operators.dispatch import build_info as build_info
from .operators.factors import CURFactors as CURFactors
from .operators.functional import cur_linear as cur_linear
from .operators.functional import cur_product as cur_product
from .operators.functional import materialize as materialize
from .t_product import multirank as multirank
from .t_product import t_identity as t_identity
from .t_product import t_pinv as t_pinv
from .t_product import t_product as t_product
from .t_product import t_svd as t_svd
from .t_product import t_transpose as t_transpose
from .t_product import tubal_rank as tubal_rank

__version__ = "0.1.0"
