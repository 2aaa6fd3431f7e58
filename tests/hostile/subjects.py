"""What is damaged, how much of each kind, and which file is of which kind."""

import shutil
from pathlib import Path

from adapter_subjects import AdapterFile, Gradients, LoraFolder, Metadata, Waits
from directory_subjects import Changing, Config, Directory, Index, Peft

SUBJECTS = {
    kind.name: kind
    for kind in (
        AdapterFile,
        Metadata,
        Gradients,
        Directory,
        Index,
        Config,
        Peft,
        Changing,
        Waits,
        LoraFolder,
    )
}

#: How many of a hundred files are of each kind.
SHARES = {
    "adapter": 40,
    "changing": 3,
    "store": 1,
    "lora": 1,
    "metadata": 12,
    "gradients": 9,
    "shards": 13,
    "index": 8,
    "config": 2,
    "peft": 11,
}


def kind_of(index):
    """The kind of the file with that number: the same for every seed."""
    place = index * 37 % 100
    for name, share in SHARES.items():
        if place < share:
            return name
        place -= share
    raise AssertionError("the shares are of a hundred")


def copied(folder, to):
    shutil.copytree(folder, to, symlinks=True)
    return Path(to)
