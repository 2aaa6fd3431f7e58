"""Runs tests in this process with one module of the package imported from another file.

    python tests/pymutants/fresh.py MODULE FILE PYTEST_ARGUMENTS

For mutants of what runs at import, which `swapping` cannot bring into a module that is loaded.
"""

import importlib.abc
import importlib.util
import sys


class Elsewhere(importlib.abc.MetaPathFinder):
    """Finds one module in a file of another name."""

    def __init__(self, name, file):
        self.name, self.file = name, file

    def find_spec(self, name, path=None, target=None):
        return (
            importlib.util.spec_from_file_location(name, self.file) if name == self.name else None
        )


if __name__ == "__main__":
    module, file, *rest = sys.argv[1:]
    sys.meta_path.insert(0, Elsewhere(module, file))
    import pytest

    sys.exit(pytest.main(rest))
