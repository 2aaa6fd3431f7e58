"""Writes adapter files anew with something changed, as others could write them."""

import json

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tcur_kernels.adapters.sealing import HEADER, TENSORS, digest_of, sealed


def rewritten(path, header=None, metadata=None, tensors=None, version=None):
    """Writes an adapter file again, with digests that are right.

    Args:
        path: the file.
        header: changes the header, a dict.
        metadata: changes the metadata around it, before the digest over them is made.
        tensors: name -> value, in place of the tensors of these names or beside them.
        version: 2 for a file as they were before there were digests.
    """
    with safe_open(path, "pt") as file:
        held = file.metadata()
    found = {**load_file(path), **(tensors or {})}
    if header is not None:
        content = json.loads(held["adapter"])
        header(content)
        held["adapter"] = json.dumps(content)
    if metadata is not None:
        metadata(held)
    if version == 2:
        held["format_version"] = "2"
        held = {name: text for name, text in held.items() if name not in (HEADER, TENSORS)}
    else:
        held = sealed({**held, TENSORS: digest_of(found)})
    save_file(found, path, metadata=held)
