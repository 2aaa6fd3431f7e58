"""All cases whose values are compared with float64, each once."""

import itertools

from .precision_cases import precision_cases
from .slice_cases import dense_gradient_cases, w_eff_cases, w_eff_in_place_cases
from .token_cases import linear_cases, many_cores_cases, packed_cases, token_gradient_cases

CASES = list(
    dict.fromkeys(
        itertools.chain(
            w_eff_cases(),
            w_eff_in_place_cases(),
            dense_gradient_cases(),
            token_gradient_cases(),
            packed_cases(),
            linear_cases(),
            many_cores_cases(),
            precision_cases(),
        )
    )
)
