"""Shapes and random data that several test files share."""

from dataclasses import dataclass

import torch

import tcur_kernels as tcur
from tcur_kernels.operators import reference

#: n3 of the specification: 1 and 2 have no pair of bins, odd ones no Nyquist bin, 7, 47 are prime.
N3 = (1, 2, 3, 4, 7, 12, 47, 48, 64)


@dataclass
class Case:
    """One random stack and its factors, at one dtype."""

    weight: torch.Tensor
    lateral: torch.Tensor
    horizontal: torch.Tensor
    core: torch.Tensor

    @property
    def factors(self):
        return tcur.CURFactors(self.lateral, self.horizontal)

    @property
    def spectra(self):
        """Half spectra of C and R as the reference takes them."""
        return reference.half_spectrum(self.lateral), reference.half_spectrum(self.horizontal)

    @property
    def packed(self):
        factors = self.factors
        return factors.lateral_hat, factors.horizontal_hat

    def double(self):
        """The same numbers in float64."""
        tensors = (self.weight, self.lateral, self.horizontal, self.core)
        return Case(*(t.detach().double() for t in tensors))


def make_case(n3, n1, n2, rank, dtype=torch.float32, weight_dtype=None):
    """Standard normal data; ``dtype`` is that of factors and core."""
    weight = torch.randn(n3, n1, n2, dtype=torch.float64).to(weight_dtype or dtype)
    lateral = torch.randn(n3, n1, rank, dtype=dtype)
    horizontal = torch.randn(n3, rank, n2, dtype=dtype)
    core = torch.randn(n3, rank, rank, dtype=dtype)
    return Case(weight, lateral, horizontal, core)


def counts_of(n3):
    """How many slices lie side by side in matrices that have n3 together, some of them alone."""
    counts = []
    while sum(counts) < n3:
        counts.append(min((3, 1, 2, 1)[len(counts) % 4], n3 - sum(counts)))
    return counts


def side_by_side(slices, counts):
    """Matrices [n1, count * n2] of consecutive slices [n3, n1, n2]."""
    return [torch.cat([*part], 1) for part in slices.split(counts)]


def flat(matrices):
    """One after the other, as `materialize_out` writes them."""
    return torch.cat([matrix.flatten() for matrix in matrices])


def slices_of(flat, counts, n1, n2):
    """The slices [n3, n1, n2] of matrices that lie one after the other."""
    parts = flat.split([count * n1 * n2 for count in counts])
    each = [part.view(n1, -1, n2).transpose(0, 1) for part in parts]
    return torch.cat(each)
