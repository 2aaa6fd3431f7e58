"""The t-product by its definition, in float64 and without any Fourier transform.

bcirc(A) is the block-circulant matrix of the slices, unfold(B) stacks the slices of B, and
A * B = fold(bcirc(A) unfold(B)) (Kilmer & Martin 2011). On purpose this does not use the package.
"""

import torch


def bcirc(a):
    """Maps [n3, n1, n2] to [n3*n1, n3*n2]; block (i, j) is slice i - j modulo n3."""
    n3, n1, n2 = a.shape
    index = (torch.arange(n3)[:, None] - torch.arange(n3)[None, :]) % n3
    return a[index].permute(0, 2, 1, 3).reshape(n3 * n1, n3 * n2)


def t_product(a, b):
    a, b = a.double(), b.double()
    return (bcirc(a) @ b.reshape(-1, b.shape[2])).reshape(a.shape[0], a.shape[1], b.shape[2])


def t_transpose(a):
    n3 = a.shape[0]
    return torch.stack([a[(-k) % n3].T for k in range(n3)])


def cur_product(lateral, core, horizontal):
    return t_product(t_product(lateral, core), horizontal)


def w_eff(weight, lateral, core, horizontal, scale):
    return weight.double() + scale * cur_product(lateral, core, horizontal)
