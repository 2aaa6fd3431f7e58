"""The versions of peft that the plug-in supports; checked before peft itself is imported."""

from __future__ import annotations

from importlib import metadata

#: The first version that works, and the first that was not tested.
OLDEST, BEYOND = (0, 18), (0, 22)


def check_peft() -> None:
    """Checks that peft is installed in a supported version.

    Raises:
        ImportError: it is not; the message says how to install it.
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
