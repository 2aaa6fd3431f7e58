"""Which versions of peft the plug-in works with, checked before peft itself is imported."""

from __future__ import annotations

from importlib import metadata

#: First version that works, and the first one that was not tried.
OLDEST, BEYOND = (0, 18), (0, 22)


def check_peft() -> None:
    """Refuses an absent peft, or one out of the supported range.

    Raises:
        ImportError: saying what was expected, what was found, and how to install it.
    """
    wanted = f"peft >={_dotted(OLDEST)},<{_dotted(BEYOND)}"
    advice = "pip install 'tcur_kernels[peft]'"
    try:
        found = metadata.version("peft")
    except metadata.PackageNotFoundError:
        raise ImportError(f"tcur_kernels.peft: expected {wanted}, got none; {advice}") from None
    release = tuple(int(part) for part in found.split(".")[:2])
    if not OLDEST <= release < BEYOND:
        raise ImportError(f"tcur_kernels.peft: expected {wanted}, got peft {found}; {advice}")


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
