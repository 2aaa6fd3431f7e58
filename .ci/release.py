"""The checklist of a release: `make release-check`, or ``release.py [--run]``.

Prints each step as done or missing, with what to do, and exits with 1 as long as one is missing.
What takes minutes (lint, tests, wheel) is done with ``--run`` alone, and else counts as missing.
What takes hours is recognised by the rows that it recorded: they count if they are of this code,
which is what `CODE` has in the commit of the row.
"""

import argparse
import importlib.util
import re
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import nightly  # noqa: E402
import versions  # noqa: E402
from benchmarks import appending  # noqa: E402
from benchmarks.commit import git  # noqa: E402

#: What users get. Rows of an earlier commit count if nothing of this has changed since.
CODE = ("csrc", "tcur_kernels", "setup.py", "pyproject.toml")


class MissingError(Exception):
    """What is missing, in a sentence."""


def run(*command):
    """Whether a command ended well, and the end of what it printed."""
    result = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return result.returncode == 0, result.stdout[-3000:]


def must(what, *command):
    """Raises unless a command ends well."""
    ended_well, output = run(*command)
    if not ended_well:
        raise MissingError(f"{what}\n{output}")


def version():
    """The version of the package, as its source says."""
    text = (ROOT / "tcur_kernels" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)[1]


def check_version():
    """The CHANGELOG has this version, with a date, and nothing above it."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    heads = re.findall(r"^## \[([^\]]+)\](?: - (\d{4}-\d\d-\d\d))?$", text, re.MULTILINE)
    unreleased = text.partition("## [Unreleased]\n")[2].partition("\n## [")[0]
    if unreleased.strip():
        raise MissingError("CHANGELOG.md: move what is below [Unreleased] below the new version")
    released = [head for head in heads if head[0] != "Unreleased"]
    if not released or released[0][0] != version() or not released[0][1]:
        raise MissingError(f"CHANGELOG.md: expected ## [{version()}] - YYYY-MM-DD as the newest")


def check_tag():
    """No version with this number was released."""
    if git("tag", "--list", f"v{version()}"):
        raise MissingError(f"v{version()} is a tag already: raise __version__")


def check_tree():
    """All is committed."""
    changed = git("status", "--short", "--untracked-files=no").splitlines()
    if changed or not git("rev-parse", "HEAD"):
        raise MissingError(f"commit what has changed: {len(changed)} files")


def is_of_this_code(row):
    """Whether the code of a row's commit is that of the tree."""
    name = row["commit"]
    if not re.fullmatch("[0-9a-f]+", name):  # "+dirty", or unknown
        return False
    command = ("git", "diff", "--quiet", name, "--", *CODE)
    return run(*command)[0]


def check_rows(rows, names, is_right, command):
    """There is a newest row for each name; all are right, and of this code."""
    missing = [name for name in names if not rows.get(name)]
    wrong = [name for name, own in rows.items() if not all(map(is_right, own))]
    old = [name for name, own in rows.items() if not all(map(is_of_this_code, own))]
    said = (("no row", missing), ("wrong", wrong), ("of other code", old))
    found = [f"{what}: {'; '.join(which)}" for what, which in said if which]
    if found:
        raise MissingError("\n".join((command, *found)))


def check_nightly():
    """Every nightly program has run for this code, and nothing was wrong."""
    rows = nightly.newest(appending.read(nightly.ROWS))
    names = [program.name for program in nightly.PROGRAMS]
    check_rows(rows, names, nightly.is_right, "make nightly")


def check_versions():
    """Every cell of versions has passed for this code and this version."""

    def is_right(row):
        return not row["wrong"] and row["version"] == version()

    rows = {row["cell"]: [row] for row in versions.newest(appending.read(versions.ROWS))}
    names = [cell.name for cell in versions.CELLS]
    check_rows(rows, names, is_right, "make test-versions")


def check_pages():
    """Generated pages are those of the docstrings and the rows."""
    spec = importlib.util.spec_from_file_location("api", ROOT / "docs" / "api.py")
    api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(api)
    if api.page() != api.PAGE.read_text(encoding="utf-8"):
        raise MissingError("docs/api.md: run python docs/api.py")
    tables = {
        ("nightly", nightly.PAGE): nightly.table(appending.read(nightly.ROWS)),
        ("versions", versions.PAGE): versions.table(appending.read(versions.ROWS)),
    }
    for (name, page), table in tables.items():
        wanted = f"<!-- begin {name} -->\n{table}<!-- end {name} -->\n"
        if wanted not in page.read_text(encoding="utf-8"):
            raise MissingError(f"{page.name}: the table is not that of the rows")


def check_cuda():
    """The CUDA sources have passed their checks as they are."""
    must("run .ci/cuda_checks.py", sys.executable, str(ROOT / ".ci" / "cuda_sources.py"))


#: Steps that take seconds.
QUICK = (check_version, check_tag, check_tree, check_pages, check_cuda)
QUICK += (check_versions, check_nightly)
#: What takes minutes: the sentence, and the target of make.
SLOW = {
    "Style and types are right.": "lint",
    "All tests pass.": "test",
    "The wheel is built.": "wheel",
}


def steps(is_run):
    """Each step as its sentence and a function that raises `MissingError`."""
    for check in QUICK:
        yield check.__doc__, check
    for sentence, target in SLOW.items():

        def check(target=target):
            if not is_run:
                raise MissingError(f"make {target}, or release-check with RUN=1")
            must(f"make {target} failed", "make", target)

        yield sentence, check


def main(arguments=None):
    """Prints the list; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--run", action="store_true", help="lint, tests and wheel, too")
    is_run = parser.parse_args(arguments).run
    print(f"tcur_kernels {version()}")
    missing = 0
    for sentence, check in steps(is_run):
        try:
            check()
        except MissingError as error:
            missing += 1
            print(f"[ ] {sentence}\n{textwrap.indent(str(error).strip(), '    ')}", flush=True)
        else:
            print(f"[x] {sentence}", flush=True)
    print(f"{missing} missing" if missing else f"ready: git tag v{version()}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
