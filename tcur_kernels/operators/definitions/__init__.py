"""The operators, each in the module of its name: one `contract.add` for all that is told of it."""

from . import core_grad_dense as core_grad_dense
from . import core_grad_tokens as core_grad_tokens
from . import core_of_packed as core_of_packed
from . import cur_linear as cur_linear
from . import materialize as materialize
from . import materialize_out as materialize_out
from . import w_eff_linear as w_eff_linear
