"""Says whether the CUDA sources are those that have passed all of their checks.

Compiling them for every architecture takes long, and so does leaving out each barrier. So
`cuda_checks.py` records what it has passed, in ``cuda_checked.txt``, and `.ci/run` repeats it for
other sources alone. The exit status is 0 if the sources have passed.
"""

import hashlib
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RECORD = ROOT / ".ci" / "cuda_checked.txt"
FOLDERS = ("csrc/cuda", "csrc/common")
FILES = ("setup.py", "tests/cuda_host.py", ".ci/cuda_checks.py")


def digest():
    """A digest of what the checks depend on: sources, flags, the checks, and torch's version."""
    return digest_of(FOLDERS, FILES, ("torch==",))


def digest_of(folders, files, packages):
    """A digest of all files of folders, of files, and of the versions of pinned packages."""
    found = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    found = [path for path in found if path.is_file() and path.suffix not in (".pyc", ".so")]
    found += [ROOT / name for name in files]
    whole = hashlib.sha256()
    for path in sorted(found):
        whole.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.startswith(packages):
            whole.update(line.encode())
    return whole.hexdigest()


def record():
    """Records that the sources, as they are now, have passed."""
    RECORD.write_text(f"{digest()}\n")


if __name__ == "__main__":
    has_passed = RECORD.is_file() and RECORD.read_text().strip() == digest()
    sys.exit(0 if has_passed else 1)
