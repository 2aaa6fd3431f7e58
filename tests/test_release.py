"""The checklist of a release: each step is missing where something is missing, and says what."""

import importlib.util
import subprocess
from pathlib import Path

import pytest

import nightly
import versions

ROOT = Path(__file__).parent.parent


@pytest.fixture
def release():
    spec = importlib.util.spec_from_file_location("release", ROOT / ".ci" / "release.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(release, tmp_path, monkeypatch):
    """A repository with two commits, of which the second changes no code."""

    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        command = ("git", *who, *arguments)
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    (tmp_path / "tcur_kernels").mkdir()
    (tmp_path / "tcur_kernels" / "__init__.py").write_text('"""A."""\n__version__ = "1.2.3"\n')
    (tmp_path / "CHANGELOG.md").write_text("# Log\n\n## [Unreleased]\n\n## [1.2.3] - 2030-01-02\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "code")
    (tmp_path / "rows").write_text("rows")
    git("add", ".")
    git("commit", "-qm", "rows")
    monkeypatch.setattr(release, "ROOT", tmp_path)
    monkeypatch.setattr("benchmarks.commit.ROOT", tmp_path)
    return tmp_path, git


def test_the_changelog_has_the_version_and_a_date(release, tree):
    path, _ = tree
    release.check_version()
    for text, wanted in (
        (
            "## [Unreleased]\n- more\n## [1.2.3] - 2030-01-02\n",
            "move what is below",
        ),
        ("## [Unreleased]\n\n## [1.2.3]\n", r"expected ## \[1.2.3\] - YYYY-MM-DD"),
        ("## [Unreleased]\n\n## [1.2.2] - 2030-01-02\n", r"expected ## \[1.2.3\] - YYYY-MM-DD"),
        ("## [Unreleased]\n", r"expected ## \[1.2.3\] - YYYY-MM-DD"),
    ):
        (path / "CHANGELOG.md").write_text(text)
        with pytest.raises(release.MissingError, match=wanted):
            release.check_version()


def test_the_tree_is_clean_and_the_number_is_new(release, tree):
    path, git = tree
    release.check_tree()
    release.check_tag()
    git("tag", "v1.2.3")
    with pytest.raises(release.MissingError, match=r"v1\.2\.3 is a tag already"):
        release.check_tag()
    (path / "rows").write_text("other")
    with pytest.raises(release.MissingError, match="commit what has changed: 1 files"):
        release.check_tree()


def test_rows_count_as_long_as_the_code_is_theirs(release, tree):
    path, git = tree
    first, second = git("log", "--format=%h").split()
    assert all(release.is_of_this_code({"commit": one}) for one in (first, second))
    for other in (f"{first}+dirty", "unknown", "0123456", ""):
        assert not release.is_of_this_code({"commit": other})
    (path / "tcur_kernels" / "more.py").write_text("")
    git("add", ".")
    git("commit", "-qm", "more code")
    assert not release.is_of_this_code({"commit": first})
    assert release.is_of_this_code({"commit": git("rev-parse", "--short", "HEAD")})


@pytest.fixture
def recorded(release, tree, monkeypatch):
    """Rows of nightly programs and of versions, which are all as they should be."""
    _, git = tree
    commit = git("rev-parse", "--short", "HEAD")
    good = {"time": "t", "commit": commit, "wrong": "", "crashes": "0", "silent": "0"}
    nights = [{**good, "program": one.name} for one in nightly.PROGRAMS]
    cells = [{**good, "cell": one.name, "version": "1.2.3"} for one in versions.CELLS]
    found = {nightly.ROWS: nights, versions.ROWS: cells}
    monkeypatch.setattr(release.appending, "read", found.__getitem__)
    return nights, cells


def test_what_takes_hours_is_known_by_its_rows(release, recorded):
    release.check_nightly()
    release.check_versions()
    nights, cells = recorded
    nights[0]["silent"] = "1"
    nights[1]["commit"] = "0123456"
    gone = nights.pop(2)["program"]
    wrong, old = (row["program"] for row in nights[:2])
    with pytest.raises(release.MissingError) as error:
        release.check_nightly()
    assert str(error.value) == (
        f"make nightly\nno row: {gone}\nwrong: {wrong}\nof other code: {old}"
    )
    cells[0]["version"] = "1.2.2"
    cells[1]["wrong"] = "no Python 3.99 here"
    names = f"{cells[0]['cell']}; {cells[1]['cell']}"
    with pytest.raises(release.MissingError, match=f"make test-versions\nwrong: {names}$"):
        release.check_versions()


def test_the_list_says_what_is_missing(release, monkeypatch, capsys):
    def fine():
        """The first."""

    def missing():
        """The second."""
        raise release.MissingError("do this\nand that")

    asked = []
    monkeypatch.setattr(release, "QUICK", (fine, missing))
    monkeypatch.setattr(release, "SLOW", {"The third.": "third"})
    monkeypatch.setattr(release, "must", lambda *command: asked.append(command))
    assert release.main([]) == 1
    said = capsys.readouterr().out.splitlines()[1:]
    assert said == [
        "[x] The first.",
        "[ ] The second.",
        "    do this",
        "    and that",
        "[ ] The third.",
        "    make third, or release-check with RUN=1",
        "2 missing",
    ]
    monkeypatch.setattr(release, "QUICK", (fine,))
    assert release.main(["--run"]) == 0
    assert asked == [("make third failed", "make", "third")]
    assert capsys.readouterr().out.endswith(f"ready: git tag v{release.version()}\n")


def test_a_step_that_fails_shows_the_end_of_its_output(release):
    release.must("fine", "true")
    with pytest.raises(release.MissingError, match="it failed\nthe end"):
        release.must("it failed", "sh", "-c", "echo the end; exit 3")
