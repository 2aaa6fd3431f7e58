"""Defines the operators: each has a module of its own name, which registers it by `contract.add`.

C*U*R is a t-product, a product of tensors that consist of n3 matrices, the slices. A discrete
Fourier transform along the slices turns it into one complex matrix product Ĉ_k Û_k R̂_k for each
bin k. The inverse transform of the results is C*U*R.
"""

from . import core_grad_dense as core_grad_dense
from . import core_grad_tokens as core_grad_tokens
from . import core_of_packed as core_of_packed
from . import cur_linear as cur_linear
from . import materialize as materialize
from . import materialize_out as materialize_out
from . import w_eff_linear as w_eff_linear
