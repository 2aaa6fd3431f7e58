"""Reads NIfTI files: the grid that their voxels lie on, and the voxels."""

from __future__ import annotations

import os
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.data.utils import correct_nifti_header_if_necessary
from numpy.typing import NDArray

FAR_APART = 0.1  # voxels by which corners may differ in grids that are the same but for rounding

#: Codes of xyzt_units -> the unit, and mm. The transforms take every number for mm.
_UNITS = {1: ("meters", 1000.0), 3: ("microns", 0.001)}
_LFS = b"version https://git-lfs"
_ENDINGS = (".nii", ".nii.gz")
_NO_NUMBERS = {"V": "colours", "c": "complex numbers"}


class BadVolumeError(Exception):
    """A file that cannot be used; the message says what was expected and what came."""


@dataclass(frozen=True)
class Grid:
    """Where the voxels of a file lie in the patient.

    Attributes:
        shape: voxels along the three axes, and channels.
        affine: voxel -> mm, 4 x 4.
        oriented: whether the header says how the axes lie in the patient.
    """

    shape: tuple[int, ...]
    affine: NDArray[Any]
    oriented: bool

    def canonical(self) -> tuple[NDArray[Any], tuple[int, ...]]:
        """Affine and shape with the axes turned to R, A and S, as the preparation turns them."""
        turns, shape = nib.io_orientation(self.affine), self.shape[:3]
        affine = self.affine @ nib.orientations.inv_ornt_aff(turns, shape)
        return affine, tuple(shape[axis] for axis in np.argsort(turns[:, 0]))

    def spacing(self) -> NDArray[Any]:
        """mm per voxel along R, A and S."""
        return nib.affines.voxel_sizes(self.canonical()[0])

    def corners(self) -> NDArray[Any]:
        """The eight corners of the grid in mm, ``[8, 3]``."""
        affine, shape = self.canonical()
        ends = np.meshgrid(*[(0, side - 1) for side in shape], indexing="ij")
        return nib.affines.apply_affine(affine, np.stack(ends, -1).reshape(-1, 3))

    def axes(self) -> str:
        """Where the axes point to, such as RAS."""
        return "".join(nib.aff2axcodes(self.affine))

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape[:3]))
        sizes = "x".join(f"{size:.3g}" for size in nib.affines.voxel_sizes(self.affine))
        return f"{shape} voxels of {sizes} mm, axes {self.axes()}"


@dataclass(frozen=True)
class Volume(Grid):
    """A grid with its voxels ``[x, y, z, channels]``."""

    voxels: NDArray[Any]


def read_grid(file: Path) -> Grid:
    """Reads the header of a file."""
    return _open(file)[1]


def read_volume(file: Path) -> Volume:
    """Reads a whole file."""
    opened, grid = _open(file)
    try:
        voxels = np.asanyarray(opened.dataobj).reshape(grid.shape)
    except Exception as error:  # whatever nibabel raises on broken bytes
        raise _unreadable(file, error) from error
    return Volume(grid.shape, grid.affine, grid.oriented, voxels)


def _open(file: Path) -> tuple[Any, Grid]:
    """Opens a file and checks its header; voxels are not read."""
    _check_path(file)
    try:
        opened = nib.load(file)
        kind, shape = opened.get_data_dtype().kind, opened.shape
        unit = int(opened.header["xyzt_units"]) & 7
        affine = np.array(opened.affine)
    except Exception as error:  # whatever nibabel raises on broken bytes
        raise _unreadable(file, error) from error
    if kind in _NO_NUMBERS:
        raise BadVolumeError(f"expected one number per voxel in {file}, got {_NO_NUMBERS[kind]}")
    sides = "x".join(map(str, shape))
    if not 3 <= len(shape) <= 4 or 0 in shape:
        came = f"{len(shape)}D, {sides}"
        raise BadVolumeError(f"expected a 3D volume, or 4D with channels, in {file}, got {came}")
    if not _spans(affine):
        raise BadVolumeError(
            f"expected a header of {file} that gives every axis a direction and a length, got the "
            f"affine {affine[:3].tolist()}"
        )
    if unit in _UNITS:
        name, factor = _UNITS[unit]
        hint = f"multiply its affine by {factor:g} and set the unit"
        raise BadVolumeError(f"expected voxel sizes of {file} in mm, got {name}; {hint}")
    codes = [int(opened.header[name]) for name in ("sform_code", "qform_code")]
    grid = Grid((*shape[:3], *(shape[3:] or (1,))), affine, any(codes))
    _check_contradiction(file, opened, grid)
    return opened, grid


def _spans(affine: NDArray[Any]) -> bool:
    """Whether three axes have lengths and lie in no plane."""
    sizes = nib.affines.voxel_sizes(affine)
    if not np.isfinite(affine).all() or not (sizes > 0).all():
        return False
    return bool(abs(np.linalg.det(affine[:3, :3] / sizes)) > 1e-3)


def _check_contradiction(file: Path, opened: Any, grid: Grid) -> None:
    """Refuses a header for which MONAI's reader would take another grid than its sform."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Modifying image pixdim", UserWarning)
        taken = correct_nifti_header_if_necessary(opened).affine
    ends = np.array(np.meshgrid(*[(0, side) for side in grid.shape[:3]])).reshape(3, 8).T
    corners = [nib.affines.apply_affine(affine, ends) for affine in (grid.affine, taken)]
    if np.abs(corners[0] - corners[1]).max() > FAR_APART * grid.spacing().min():
        other = Grid(grid.shape, taken, True)
        raise BadVolumeError(
            f"expected a header of {file} that tells one grid, got {grid} in its sform, and {other}"
            " in its pixdim and qform; nib.save(nib.Nifti1Image(nifti.dataobj, nifti.affine), file)"
            " keeps the sform"
        )


def _check_path(file: Path) -> None:
    """Refuses what is no file, and files of other formats."""
    try:
        mode = os.stat(file).st_mode
    except (OSError, ValueError) as error:
        came = f"none ({getattr(error, 'strerror', None) or error}{_where_it_is(file)})"
        raise BadVolumeError(f"expected a NIfTI file at {file}, got {came}") from error
    if stat.S_ISDIR(mode):
        hint = "dcm2niix makes a file of a folder of DICOM"
        raise BadVolumeError(f"expected a NIfTI file at {file}, got a folder; {hint}")
    if not file.name.lower().endswith(_ENDINGS):
        wanted = f"expected a NIfTI file ({' or '.join(_ENDINGS)})"
        raise BadVolumeError(f"{wanted}, got {file}; SimpleITK and nibabel convert other formats")


def _where_it_is(file: Path) -> str:
    """A hint on a missing file."""
    if os.path.islink(file):
        return "; it is a link to a file that is not here, which `datalad get` may bring"
    stem, dot, ending = file.name.partition(".nii")
    first = f"{stem}_0000{dot}{ending}"
    there = os.path.isfile(os.path.join(file.parent, first))
    return f"; {first} is there, which nnU-Net's datalists do not name" if there else ""


def _unreadable(file: Path, error: Exception) -> BadVolumeError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if not isinstance(error, PermissionError):
        with file.open("rb") as opened:
            if opened.read(len(_LFS)) == _LFS:
                reason = "it is a pointer of Git LFS; `git lfs pull` brings the file"
    return BadVolumeError(f"expected a NIfTI file at {file}, got an error ({reason})")
