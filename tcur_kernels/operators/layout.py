"""R̂ in the layout in which the CPU kernels read it, csrc/cpu/kernels.h."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def panels(horizontal_hat: Tensor, strip: int) -> Tensor:
    """Lays out R̂ in panels of ``strip`` columns, zeros past the last column.

    A kernel then reads one run of memory instead of a short piece of each of the q rows.

    Args:
        horizontal_hat: packed half spectrum of R, ``[q, n2]``.
        strip: columns of a panel, `native.strip_columns`.

    Returns:
        ``[n2 / strip, q, strip]``, with n2 / strip rounded up.
    """
    padded = functional.pad(horizontal_hat, (0, -horizontal_hat.shape[1] % strip))
    return padded.unflatten(1, (-1, strip)).movedim(1, 0).contiguous()
