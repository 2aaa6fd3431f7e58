"""How the job refuses bad input, and writes files whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

from tcur_kernels.files.whole import replacing


def fail(argument: str, expected: str, came: object) -> NoReturn:
    """Ends the program with a message about what an argument should be and what it was."""
    raise SystemExit(f"{argument}: expected {expected}, got {came}")


def refuse_all(argument: str, where: object, problems: Sequence[str]) -> None:
    """Ends the program with a list of problems, if there are any."""
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise SystemExit(f"{argument}: {len(problems)} problem(s) in {where}:{listed}")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path of the same ending, which takes the name ``path`` once the block is done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as fresh:
        yield fresh


@contextmanager
def plain_ends(interrupted: str) -> Iterator[None]:
    """Ends a command with a message, and no traceback, if it is interrupted or a file fails."""
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(interrupted) from None
    except OSError as error:
        raise SystemExit(f"files: expected to be read and written, got {error}") from error


def save_state(state: Mapping[str, Any], file: Path) -> None:
    """As ``torch.save``, but a file that cannot be written is an OSError."""
    with open(file, "wb") as opened:
        try:
            torch.save(state, opened)
        except RuntimeError as error:  # of the end of the archive, which hides why it is short
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def write_json(path: Path, facts: Mapping[str, Any]) -> None:
    """Writes JSON. Numbers that JSON does not have, such as nan, become null."""
    finite = json.loads(json.dumps(facts), parse_constant=lambda _: None)
    with whole_file(path) as fresh:
        fresh.write_text(json.dumps(finite, indent=1))
