"""`TCURConfig`: what peft saves beside the weights of an adapter."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any

from peft.config import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, PeftType

from ..adapters.plan import STACKS_BY, StacksBy
from ..files.parsing import Source
from ..operators.basis import DEFAULT_BASIS, Basis, check_basis
from ..operators.cost import MODES, Mode
from ..operators.factors import PRECISIONS, Precision
from .digests import (
    SETTINGS,
    TENSORS,
    check_settings,
    digest_of_file,
    digest_of_settings,
    read_config,
)
from .patterns import PATTERNS, check_alpha, check_rank, checked_pattern
from .words import refuse_other_words

#: The name of the method among peft's types.
NAME = "TCUR"

#: Version of the recorded plan; a file with another version is refused.
FORMAT_VERSION = 2


def peft_type() -> PeftType:
    """The member `PeftType.TCUR`, which the first call adds.

    `register_peft_method` only accepts members, and an enumeration with members cannot be
    subclassed. A plain string would not do either, because peft reads ``peft_type.value``.
    """
    if NAME not in PeftType.__members__:
        member = str.__new__(PeftType, NAME)
        member._name_ = member._value_ = NAME
        member.__objclass__ = PeftType
        member._sort_order_ = len(PeftType.__members__)
        PeftType._member_names_.append(NAME)
        PeftType._member_map_[NAME] = PeftType._value2member_map_[NAME] = member
        type.__setattr__(PeftType, NAME, member)
    return PeftType[NAME]


class Recorded(list[dict[str, Any]]):
    """A plan that a tuner made and put into the config of its adapter; JSON stores it as a list.

    The caller may use the same config for another model. If this plan does not fit that model, a
    new one is made. A plan that was read from a file, in contrast, must fit.

    Args:
        entries: see `planning.records_of`.
        made_by: the values of the config from which the plan was made; None: treat the plan as one
            that was read from a file.
    """

    def __init__(self, entries: Iterable[dict[str, Any]] = (), made_by: Any = None) -> None:
        super().__init__(entries)
        self.made_by = made_by


#: Fields that are lists of names, and never one name.
_NAMES_ALONE = ("target_parameters", "modules_to_save")


class AllLinear(set[str]):
    """The names that "all-linear" gave in one model; another model searches for its own."""


class _Rank(int):
    """The rank as read from ``config.r``; a copy of the config may still set another rank."""


@dataclass
class TCURConfig(PeftConfig):  # type: ignore[misc]
    """Configuration of a tCURLoRA adapter: W + s * C * U * R, with only the core U trained.

    Targeted layers of one shape form a stack and share one core ``[n3, rank, rank]``. C and R are
    made of slices of the base weights; the scale s is alpha, times that of the basis.

    Args:
        rank: tubal rank r, by default 8. The update of one layer has rank up to n3 * r, where n3
            is the number of slices in its stack.
        r: another name for ``rank``, as in LoRA.
        rank_pattern: ranks of layers that shall not have ``rank``, as ``{name: rank}``. A name is
            the end of a layer's name, or a regular expression for it, as for LoRA; of several that
            match, the first one counts. Layers of one shape and different ranks form stacks apart.
        target_modules: names of the layers to adapt, matched as for LoRA (a list: whole names or
            their ends; a string: a regular expression), or "all-linear". None is "all-linear".
        target_parameters: names of parameters with a matrix for each expert, ``[experts, n1, n2]``,
            or the ends of such names, as for LoRA. If ``target_modules`` is None, only these are
            adapted.
        exclude_modules, modules_to_save, layers_to_transform, layers_pattern: as for LoRA.
            ``layers_to_transform`` may also be used if ``target_modules`` is None.
        init_weights: if True, the adapter changes nothing at first. If False, the cores are drawn
            so that updates have about half the norm of the weights, which is useful for tests.
        alpha: scale of the update, on top of that of the basis. Unlike LoRA's, it is not divided
            by the rank.
        alpha_pattern: alphas of layers that shall not have ``alpha``, like ``rank_pattern``.
        basis: "orthonormal" (default) or "slices", see `tcur_kernels.adapt`.
        selection: rule that chooses C and R, see `tcur_kernels.tensor_cur`.
        stacks: "shape": one stack for all targeted layers of one shape. "layer": one stack per
            layer, which is matrix CURLoRA (whose own rule is selection "inverse").
        mode: how layers run, see `tcur_kernels.adapt`.
        precision: of the products of tokens with C and R, see `tcur_kernels.adapt`.
        check_base: whether to refuse to load the adapter onto a base with other C and R.
        plan: filled in when the method is applied: ordered stacks, their layers, the chosen rows
            and columns, fingerprints of C and R. A saved adapter is rebuilt from it.
        format_version: of ``plan``.

    Raises:
        TypeError, ValueError: an argument is wrong; the message says what was expected.
    """

    rank: int = None  # type: ignore[assignment]
    target_modules: list[str] | set[str] | str | None = None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    alpha: float = 1.0
    selection: str = "norm"
    stacks: StacksBy = "shape"
    mode: Mode = "auto"
    precision: Precision = "ieee"
    basis: Basis = None  # type: ignore[assignment]
    check_base: bool = True
    init_weights: bool = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    plan: list[dict[str, Any]] | None = field(default=None, repr=False)
    format_version: int = FORMAT_VERSION
    r: InitVar[int | None] = None

    def __post_init__(self, r: int | None) -> None:
        """Checks every value, and turns lists of targets into sets, as peft expects."""
        super().__post_init__()
        if r is not None and not isinstance(r, _Rank):
            if self.rank is not None and self.rank != r:
                raise ValueError(f"r: expected the same as rank, {self.rank}, or no rank, got {r}")
            self.rank = r
        if self.rank is None:
            self.rank = 8
        if self.basis is None:  # a plan without a basis is from before there was another one
            self.basis = DEFAULT_BASIS if self.plan is None else "slices"
        check_basis(self.basis)
        self.peft_type = peft_type()
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"format_version: expected {FORMAT_VERSION}, got {self.format_version!r}; the "
                "adapter was saved by another version of tcur_kernels"
            )
        check_rank("rank", self.rank)
        check_alpha("alpha", self.alpha)
        for pattern in PATTERNS:
            setattr(self, pattern, checked_pattern(self, pattern))
        for name, allowed in (
            ("stacks", STACKS_BY),
            ("mode", MODES),
            ("precision", PRECISIONS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        if not isinstance(self.selection, str):  # which rules there are is asked where they choose
            raise TypeError(f"selection: expected a str, got {type(self.selection).__name__}")
        if not isinstance(self.init_weights, bool):
            raise TypeError(
                f"init_weights: expected a bool, got {type(self.init_weights).__name__}"
            )
        self._check_names()
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                "When `layers_pattern` is specified, `layers_to_transform` must also be specified."
            )
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError("`layers_to_transform` cannot be used when `target_modules` is a str.")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))

    def _check_names(self) -> None:
        """Checks what says which modules and layers are meant."""
        for name in ("target_modules", "exclude_modules", "layers_pattern", *_NAMES_ALONE):
            value = getattr(self, name)
            is_list = isinstance(value, (list, tuple, set)) and all(
                isinstance(entry, str) for entry in value
            )
            if not (
                value is None or is_list or (isinstance(value, str) and name not in _NAMES_ALONE)
            ):
                wanted = "a list of names" if name in _NAMES_ALONE else "a name, a list of names"
                raise TypeError(f"{name}: expected {wanted} or None, got {_shown(value)}")
        value = self.layers_to_transform
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if value is not None and any(type(number) is not int for number in numbers):
            raise TypeError(
                f"layers_to_transform: expected an index, a list of indices or None, got "
                f"{_shown(value)}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The config as a dict; while it is saved, with the digests of what is saved."""
        return {**super().to_dict(), **getattr(self, "_digests", {})}

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Writes ``adapter_config.json``, with digests by which loading verifies the files.

        Args:
            save_directory, kwargs: as peft has them.
        """
        self._digests = {SETTINGS: digest_of_settings(super().to_dict())}
        tensors = Path(save_directory) / SAFETENSORS_WEIGHTS_NAME
        # Only `PeftModel.save_pretrained` gives this argument. It has just written the tensors; in
        # another call they may be those of another adapter, which the caller has yet to replace.
        if "auto_mapping_dict" in kwargs and tensors.is_file():
            self._digests[TENSORS] = digest_of_file(tensors)
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            del self._digests

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Reads ``adapter_config.json``, and verifies it and the tensors that lie beside it.

        Raises:
            FileNotFoundError, ValueError: something is damaged; the message says what and where.
        """
        found = read_config(Path(path_json_file))
        found.pop("runtime_config", None)  # peft ignores it, too
        return found


def _shown(value: Any) -> str:
    """What a value is, or what is in it, in the words of an error."""
    if not isinstance(value, (list, tuple, set)):
        return f"a {type(value).__name__}"
    kinds = sorted({type(entry).__name__ for entry in value})
    return f"a {type(value).__name__} of {' and '.join(kinds)}"


def _rank(config: TCURConfig) -> int:
    return _Rank(config.rank)


def _set_rank(config: TCURConfig, rank: int) -> None:
    config.rank = rank


# Set from outside, because in the class body ``r`` is the default of the argument.
TCURConfig.r = property(_rank, _set_rank, doc="The rank.")


_take_fields = TCURConfig.__init__


@functools.wraps(_take_fields)
def _init(config: TCURConfig, *args: Any, **kwargs: Any) -> None:
    refuse_other_words(kwargs)
    if SETTINGS in kwargs or TENSORS in kwargs:  # of a file that peft itself has read
        check_settings(kwargs, Source("path", Path(CONFIG_NAME)))
        kwargs = {name: own for name, own in kwargs.items() if name not in (SETTINGS, TENSORS)}
    _take_fields(config, *args, **kwargs)


TCURConfig.__init__ = _init  # type: ignore[method-assign, assignment]
