"""Digests that an adapter file carries over itself: one over its header, one over its tensors.

The digest of the header covers that of the tensors. So who needs the header alone can verify it
without reading a tensor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..files.parsing import Source

#: What the metadata of a file call the digests.
HEADER, TENSORS = "header_sha256", "tensors_sha256"

_ADVICE = "the file is damaged, or was written by hand"


def digest_of_json(value: Any) -> str:
    """SHA-256 of a value of JSON, whatever the order of its keys; sets are sorted."""
    text = json.dumps(value, sort_keys=True, default=sorted)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of contiguous tensors, sorted by name."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        about = json.dumps([name, str(tensor.dtype), list(tensor.shape)])
        state.update(f"{about}\n".encode())  # JSON has no line break of its own
        if tensor.numel():
            state.update(tensor.flatten().view(torch.uint8).numpy().data)
    return state.hexdigest()


def sealed(metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a file with the digest over all of them."""
    own = {name: text for name, text in metadata.items() if name != HEADER}
    return {**own, HEADER: digest_of_json(own)}


def check_header(metadata: Mapping[str, str], source: Source, is_sealed: bool) -> None:
    """Refuses metadata that are not what their digest says.

    Args:
        metadata: those of a file.
        source: the file.
        is_sealed: whether there has to be a digest; if there is one, it has to be right.

    Raises:
        ValueError: they are not, or a digest is missing.
    """
    if not is_sealed and HEADER not in metadata and TENSORS not in metadata:
        return
    for name in (HEADER, TENSORS):
        if name not in metadata:
            raise source.error(f"a file with {name}", f"none; {_ADVICE}")
    if sealed(metadata)[HEADER] != metadata[HEADER]:
        raise source.error(f"a header with the {HEADER} in it", f"another; {_ADVICE},")


def check_tensors(
    metadata: Mapping[str, str], tensors: Mapping[str, Tensor], source: Source
) -> None:
    """Refuses tensors that are not those whose digest the metadata have, if they have one.

    Raises:
        ValueError: they are not.
    """
    if TENSORS in metadata and digest_of(tensors) != metadata[TENSORS]:
        raise source.error(f"tensors with the {TENSORS} in the header", f"others; {_ADVICE},")
