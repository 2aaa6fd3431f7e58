"""The parameters that are trained beside the cores, found by whole names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from torch import Tensor, nn

from .holding import PREFIXES


def trained_names(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of the parameters that ``train_also`` chooses, in the model's order.

    Raises:
        TypeError: a pattern is not a string, or a chosen parameter cannot have a gradient.
        ValueError: a pattern matches nothing.
    """
    parameters = dict(model.named_parameters())
    names = [name for name in parameters if not name.startswith(PREFIXES)]
    chosen: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"train_also: expected names, got {type(pattern).__name__}")
        found = {name for name in names if _matches_whole(name, pattern)}
        if not found:
            raise ValueError(f"train_also: expected parameters that match {pattern!r}, got none")
        for name in sorted(found):
            if not (parameters[name].is_floating_point() or parameters[name].is_complex()):
                raise TypeError(
                    f"train_also: expected floating parameters, got {parameters[name].dtype} in "
                    f"{name} by {pattern!r}"
                )
        chosen |= found
    return [name for name in names if name in chosen]


def matches_any(model: nn.Module, pattern: str) -> bool:
    """Whether a pattern of ``train_also`` matches any parameter of the model."""
    try:
        return bool(trained_names(model, [pattern]))
    except ValueError:
        return False


def check_learned(
    state: Mapping[str, Tensor],
    trained: Sequence[str],
    learned: Mapping[tuple[str, str], Tensor],
    path: Path,
) -> None:
    """Checks that what a file has beside the cores is what the model trains beside them.

    Args:
        state: the model's parameters that are trained beside the cores, and its buffers.
        trained: the names of those parameters.
        learned: what the file has, see `file.Contents`.
        path: of the file.

    Raises:
        ValueError: names or shapes differ.
    """
    came = {name for kind, name in learned if kind == "trained"}
    if came != set(trained):
        raise ValueError(
            f"path: expected {', '.join(sorted(trained)) or 'nothing'} beside the cores, got "
            f"{', '.join(sorted(came)) or 'nothing'} at {path}"
        )
    for (_, name), tensor in learned.items():
        if name not in state or state[name].shape != tensor.shape:
            got = list(tensor.shape)
            own = list(state[name].shape) if name in state else "none"
            raise ValueError(f"path: expected {name} of shape {own}, got {got} at {path}")


def _matches_whole(parameter: str, pattern: str) -> bool:
    """Whether the pattern matches the whole name of the parameter or of a module that holds it."""
    parts = parameter.split(".")
    return any(fnmatchcase(".".join(parts[:i]), pattern) for i in range(1, len(parts) + 1))
