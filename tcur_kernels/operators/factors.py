"""The frozen factors C and R of a stack, and the checks that all arguments share."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ..t_product import t_transpose
from . import bf16_products, layout, native, reference, streams
from .basis import Basis, check_basis, orthonormal

#: Precision of products with the factors. "ieee" is as exact as fp32. "tf32" rounds the operands to
#: TF32, which the tensor cores of a GPU multiply; "bf16" rounds them to bf16. Sums are in fp32. A
#: processor without units for bf16 multiplies the rounded operands in fp32.
Precision = Literal["ieee", "tf32", "bf16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

#: Dtypes of weights, tokens and results.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class CURFactors:
    """The frozen factors C and R of one stack, with their packed half spectra.

    Args:
        lateral: the lateral slices, ``[n3, n1, r]``, floating and finite. Frozen.
        horizontal: the horizontal slices, ``[n3, r, n2]``, with the same dtype and device. Frozen.
        basis: "slices": C and R are these slices. "orthonormal": C and R are isometric and span
            the same; see `operators.basis`.

    Attributes:
        slices: the given ``(lateral, horizontal)``.
        basis: as given.
        lateral: C, ``[n3, n1, r]``.
        horizontal: R, ``[n3, r, n2]``.
        lateral_hat: packed half spectrum of C, ``[n1, n3 * r]``, in fp32 (fp64 for fp64 factors).
        horizontal_hat: packed half spectrum of R, ``[n3 * r, n2]``, in the same dtype.
        n1, n2, n3, rank: sizes of the stack.

    Raises:
        TypeError: a factor is not a tensor, its dtype is not floating, or the dtypes differ.
        ValueError: the shapes do not fit together, numbers are not finite, the devices differ, a
            factor requires grad (only the core is trained), or there is no such basis.
    """

    def __init__(self, lateral: Tensor, horizontal: Tensor, basis: Basis = "slices") -> None:
        self.basis = check_basis(basis)
        for name, factor in (("lateral", lateral), ("horizontal", horizontal)):
            check_floating(name, factor)
            if factor.ndim != 3 or 0 in factor.shape:
                shape = "[n3, n1, r]" if name == "lateral" else "[n3, r, n2]"
                raise ValueError(f"{name}: expected {shape}, got {list(factor.shape)}")
            check_frozen(name, factor)
        if lateral.dtype != horizontal.dtype:
            raise TypeError(
                f"horizontal: expected {lateral.dtype} as lateral, got {horizontal.dtype}"
            )
        check_device("horizontal", horizontal, lateral.device)
        n3, n1, rank = lateral.shape
        if horizontal.shape[:2] != (n3, rank):
            raise ValueError(
                f"horizontal: expected [{n3}, {rank}, n2] to go with lateral "
                f"{list(lateral.shape)}, got {list(horizontal.shape)}"
            )
        if rank > min(n1, horizontal.shape[2]):
            raise ValueError(
                f"lateral: expected a rank of at most min(n1, n2) = "
                f"{min(n1, horizontal.shape[2])}, got {rank}"
            )
        for name, factor in (("lateral", lateral), ("horizontal", horizontal)):
            if not factor.is_meta and not torch.isfinite(factor).all():
                raise ValueError(f"{name}: expected finite numbers, got NaN or Inf")
        dtype = torch.promote_types(lateral.dtype, torch.float32)
        self.slices = lateral.detach(), horizontal.detach()
        # Spectra are made once and used in every step, so they are transformed in fp64 and then
        # rounded once.
        self.lateral, self.horizontal = self.slices
        if basis == "orthonormal":
            self.lateral = orthonormal(self.lateral).to(dtype)
            self.horizontal = t_transpose(orthonormal(t_transpose(self.horizontal))).to(dtype)
        planes = reference.pack(reference.half_spectrum(self.lateral.double()), n3)
        self.lateral_hat = planes.movedim(0, 1).reshape(n1, n3 * rank).to(dtype).contiguous()
        planes = reference.pack(reference.half_spectrum(self.horizontal.double()), n3)
        self.horizontal_hat = planes.reshape(n3 * rank, -1).to(dtype).contiguous()
        self.n1, self.n2, self.n3, self.rank = n1, horizontal.shape[2], n3, rank
        self._narrow: tuple[Tensor, Tensor] | None = None
        self._panels: Tensor | None = None
        self._transposed: CURFactors | None = None

    @classmethod
    def from_packed(
        cls,
        slices: tuple[Tensor, Tensor],
        sides: tuple[Tensor, Tensor],
        spectra: tuple[Tensor, Tensor],
        basis: Basis,
    ) -> CURFactors:
        """Returns factors of which all is given, also C and R. Nothing is checked or computed."""
        self = cls.__new__(cls)
        self.slices, self.basis = slices, basis
        self.lateral, self.horizontal = sides
        self.lateral_hat, self.horizontal_hat = spectra
        self.n3, self.n1, self.rank = self.lateral.shape
        self.n2 = self.horizontal.shape[2]
        self._narrow = self._panels = self._transposed = None
        return self

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the packed spectra and of the core: fp32 or fp64."""
        return self.lateral_hat.dtype

    @property
    def device(self) -> torch.device:
        """Device of the factors."""
        return self.lateral_hat.device

    def to(self, device: torch.device | str) -> CURFactors:
        """Returns the same factors on another device."""
        return CURFactors.from_packed(
            (self.slices[0].to(device), self.slices[1].to(device)),
            (self.lateral.to(device), self.horizontal.to(device)),
            (self.lateral_hat.to(device), self.horizontal_hat.to(device)),
            self.basis,
        )

    def packed(self, precision: Precision = "ieee") -> tuple[Tensor, Tensor]:
        """Returns the packed spectra as operands of products: as they are, or rounded to bf16.

        Those that are rounded are in bf16, or in fp32 where `bf16_operands` says so.
        """
        if precision not in PRECISIONS:
            raise ValueError(
                f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}"
            )
        if precision != "ieee" and self.dtype == torch.float64:
            raise ValueError(f"precision: expected ieee for fp64 factors, got '{precision}'")
        if precision != "bf16":
            return self.lateral_hat, self.horizontal_hat
        if self._narrow is not None:
            return self._narrow
        with torch.inference_mode(False):  # a training step must be able to use what is kept
            narrow = (self.lateral_hat.to(torch.bfloat16), self.horizontal_hat.to(torch.bfloat16))
            if self.bf16_operands(precision):
                narrow = (narrow[0].to(self.dtype), narrow[1].to(self.dtype))
        if self._may_keep():
            self._narrow = narrow
        return narrow

    def panels(self) -> Tensor | None:
        """Returns R̂ as the CPU kernels read it, made once; None if they make it themselves.

        They do within a transform of functorch, to which all tensors belong that are made in it.
        """
        if self.device.type != "cpu" or native.cpu_error() is not None:
            return None
        strip = native.strip_columns(self.dtype)
        if self._panels is not None and self._panels.shape[2] == strip:
            return self._panels
        if not self._may_keep():
            return None
        with torch.inference_mode(False):  # a training step must be able to use what is kept
            self._panels = layout.panels(self.horizontal_hat, strip)
        return self._panels

    def bf16_operands(self, precision: Precision) -> bool:
        """Whether `packed` holds bf16 in fp32, so that products must round the other operand."""
        return precision == "bf16" and bf16_products.in_fp32(self.device)

    def transposed(self) -> CURFactors:
        """Returns Rᵀ and Cᵀ, slice by slice: with the transposed core they give W_effᵀ."""
        if self._transposed is not None:
            return self._transposed
        with torch.inference_mode(False):
            slices, sides, spectra = (
                (right.mT.contiguous(), left.mT.contiguous())
                for left, right in (
                    self.slices,
                    (self.lateral, self.horizontal),
                    (self.lateral_hat, self.horizontal_hat),
                )
            )
            turned = CURFactors.from_packed(slices, sides, spectra, self.basis)
        if self._may_keep():
            self._transposed = turned
        return turned

    def _may_keep(self) -> bool:
        """Whether a tensor made now may be kept for later calls.

        A tensor made while a CUDA graph is captured has no values until the graph is replayed. A
        tensor made within a transform of functorch belongs to that transform. One made in an export
        has a shape alone.
        """
        if torch.compiler.is_exporting():
            return False
        if torch.compiler.is_compiling():
            return True
        if torch._C._are_functorch_transforms_active():
            return False
        return not streams.capture_of(self.device)

    def __repr__(self) -> str:
        return (
            f"CURFactors(n3={self.n3}, n1={self.n1}, n2={self.n2}, rank={self.rank}, "
            f"basis={self.basis!r}, dtype={self.dtype}, device='{self.device}')"
        )


def check_floating(name: str, tensor: Tensor) -> None:
    """Refuses anything but a dense tensor, or a nested one, of one of `DTYPES`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided and not tensor.is_nested:
        raise ValueError(f"{name}: expected a dense tensor, got layout {tensor.layout}")
    check_floating_dtype(name, tensor.dtype)


def check_floating_dtype(name: str, dtype: torch.dtype) -> None:
    """Refuses any dtype but `DTYPES`: integers, complex numbers, and numbers of 8 bits."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name}: expected a torch.dtype, got {type(dtype).__name__}")
    if not dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating dtype, got {dtype}")
    if dtype not in DTYPES:
        expected = ", ".join(map(str, DTYPES))
        raise TypeError(f"{name}: expected one of {expected}, got {dtype}")


def check_frozen(name: str, tensor: Tensor) -> None:
    """Refuses a tensor that requires grad."""
    if tensor.requires_grad:
        raise ValueError(
            f"{name}: expected a frozen tensor, got requires_grad=True; only the core is trained"
        )


def check_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Refuses another dtype."""
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {tensor.dtype}")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Refuses another device."""
    if tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {tensor.device}")
