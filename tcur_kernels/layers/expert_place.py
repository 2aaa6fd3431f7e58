"""The place of one expert within a parameter that holds all of them."""

from __future__ import annotations

from torch import Tensor

from .weights import Place


class ExpertPlace(Place):
    """One expert of a place that holds all of them.

    Args:
        root: the place of the whole parameter.
        expert: its index.
    """

    def __init__(self, root: Place, expert: int) -> None:
        self._root, self.expert = root, expert
        self.module, self.projection, self.own = root.module, None, root.own
        self.layout = "matrix"
        self.stack, self.was_trained, self.name = root.stack, root.was_trained, root.name
        experts = root.stored.shape[0]
        self.slices = root.slices // experts
        self.slice_index = root.slice_index + expert * self.slices
        self.out_features, self.in_features = root.out_features // experts, root.in_features

    @property
    def root(self) -> Place:
        """The place of the whole parameter."""
        return self._root

    @property
    def stored(self) -> Tensor:
        """As the module stores it now, ``[n1, n2]``."""
        return self._root.stored[self.expert]

    @property
    def base(self) -> Tensor:
        """The base weight of the expert, ``[n1, n2]``."""
        return self._root.base[self.expert]

    @property
    def bias(self) -> None:
        """None: the forward of the experts adds their biases."""

    @property
    def backup(self) -> Tensor | None:  # type: ignore[override]
        """The base weight of the expert, while the module holds W_eff."""
        kept = self._root.backup
        return None if kept is None else kept[self.expert]

    @property
    def ran(self) -> bool:
        """Whether an expert of the parameter was used; one without tokens is no surprise."""
        return self._root.ran

    @ran.setter
    def ran(self, value: bool) -> None:
        self._root.ran = value

    def freeze(self) -> None:
        """Freezes the whole parameter; see `Place.freeze`."""
        self._root.freeze()
