"""Files and directories that are there whole or not at all: what is refused, removed and kept."""

import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tcur_kernels as tcur
from benchmarks import appending
from tcur_kernels.files import whole
from tcur_kernels.files.whole import (
    exchanging,
    is_temporary,
    new_directory,
    replacing,
    without_name,
)
from test_cli import tiny, write_directory

ROOT = Path(__file__).parent.parent


@pytest.fixture(params=[0o000, 0o022, 0o027, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def write(path, text="new"):
    with replacing(path) as fresh:
        fresh.write_text(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def loaded(file):
    """Code that loads one file of the project without torch, which takes seconds."""
    return f"""
import importlib.util, os, signal
from pathlib import Path
spec = importlib.util.spec_from_file_location("module", {file.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
"""


def dead(path):
    """What a writer of a path leaves when it is killed, and then the names of it."""
    code = f"""{loaded(whole)}
with module.replacing(Path({str(path)!r})) as fresh:
    fresh.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    return [name for name in names(path.parent) if is_temporary(name)]


def test_modes_follow_the_umask(umask, tmp_path):
    adapter = tcur.adapt(tiny(), rank=2)
    adapter.save(tmp_path / "a")
    assert mode(tmp_path / "a") == 0o666 & ~umask
    adapter.to_lora(tmp_path / "deep" / "lora")
    (tmp_path / "deep" / "lora" / "adapter_config.json").write_text("{}")
    adapter.to_lora(tmp_path / "deep" / "lora")  # both files at once
    base = write_directory(tmp_path / "base", tiny())
    from tcur_kernels.adapters.file import read_contents
    from tcur_kernels.merge.directory import ModelDirectory, merge_directory

    merge_directory(ModelDirectory(base), read_contents(tmp_path / "a"), tmp_path / "m" / "out")
    made = [*(tmp_path / "deep").rglob("*"), *(tmp_path / "m").rglob("*")]
    for path in (tmp_path / "deep", tmp_path / "m", *made):
        assert mode(path) == (0o777 if path.is_dir() else 0o666) & ~umask, path
    appending.append(tmp_path / "rows.csv", ("a",), [{"a": 1}])
    assert mode(tmp_path / "rows.csv") == 0o666 & ~umask


def test_a_replaced_file_keeps_its_mode(tmp_path, umask):
    path = tmp_path / "a"
    path.write_text("old")
    path.chmod(0o640)
    write(path)
    assert mode(path) == 0o640
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a"]


def test_links_are_followed(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("made")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "lost").symlink_to("nowhere/file")
    write(tmp_path / "link")
    write(tmp_path / "dangling")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "dangling").is_symlink()
    assert (tmp_path / "real").read_text() == (tmp_path / "made").read_text() == "new"
    with pytest.raises(OSError, match="loop"):
        write(tmp_path / "loop")
    with pytest.raises(FileNotFoundError, match="nowhere/file"):
        write(tmp_path / "lost")
    assert names(tmp_path) == ["dangling", "link", "loop", "lost", "made", "real"]


def test_what_is_no_file_is_refused_before_anything_is_written(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, kind, message in (
        ("pipe", OSError, "path: expected a file or a free name, got a device, a pipe or a socket"),
        ("folder", IsADirectoryError, "path: expected a file or a free name, got a directory"),
        ("none/file", FileNotFoundError, "none/file"),
        ("pipe/file", NotADirectoryError, "pipe/file"),
        ("x" * 256, OSError, "File name too long"),
    ):
        with pytest.raises(kind, match=message), replacing(tmp_path / name):
            pytest.fail("the block ran")
    with pytest.raises(OSError, match="a device"):
        write(Path(os.devnull))
    assert names(tmp_path) == ["folder", "pipe"]


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "a\nb", ".hidden", "a.tar.gz"])
def test_any_name_that_a_file_may_have(name, tmp_path):
    with replacing(tmp_path / name) as fresh:
        assert fresh.name == name
        fresh.write_text("one")
        assert all(is_temporary(each) for each in names(tmp_path))
    assert names(tmp_path) == [name]
    assert len(dead(tmp_path / name)) == 2
    write(tmp_path / name)
    assert names(tmp_path) == [name]


def test_no_permission(tmp_path):
    """As a user whom permissions bind: root writes everywhere."""
    (tmp_path / "open").mkdir(mode=0o777)
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "shut").mkdir()
    for folder in ("open", "shut"):
        (tmp_path / folder / "a").write_text("old")
    (tmp_path / "open" / "a").chmod(0o444)
    (tmp_path / "shut" / "a").chmod(0o666)
    (tmp_path / "shut").chmod(0o555)
    for folder in (tmp_path, *list(tmp_path.parents)[:-2]):
        if os.geteuid() == 0:
            folder.chmod(folder.stat().st_mode | 0o055)
    code = f"""{loaded(whole)}
if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
for path in ({str(tmp_path / "open" / "a")!r}, {str(tmp_path / "shut" / "a")!r}):
    try:
        with module.replacing(Path(path)) as fresh:
            fresh.write_text("new")
    except PermissionError as error:
        print(error.filename == path)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (tmp_path / "shut").chmod(0o755)
    assert done.stdout == "True\nTrue\n"
    for folder in ("open", "shut"):
        assert names(tmp_path / folder) == ["a"]
        assert (tmp_path / folder / "a").read_text() == "old"


@pytest.mark.parametrize("number", ["EEXIST", "EPERM", "EXDEV", "EBUSY", "EINVAL"])
def test_a_file_system_without_renaming_over(number, tmp_path, monkeypatch):
    def fail(old, new):
        raise OSError(getattr(errno, number), "no", str(old), None, str(new))

    path = tmp_path / "a"
    write(path, "old")
    monkeypatch.setattr(os, "rename", fail)
    message = "expected a file system that renames over what is there, which is as it was: choose a"
    with pytest.raises(OSError, match=message) as raised:
        write(path)
    assert (raised.value.filename, raised.value.errno) == (str(path), getattr(errno, number))
    assert raised.value.__cause__.errno == getattr(errno, number)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_lora_where_two_files_cannot_be_replaced_at_once(tmp_path, monkeypatch):
    path = tmp_path / "lora"
    adapter = tcur.adapt(tiny(), rank=1)
    adapter.to_lora(path, rank=1)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with monkeypatch.context() as patched:
        patched.setattr(whole, "_RENAME_EXCHANGE", 1 << 20)  # as on NFS: EINVAL
        with pytest.raises(OSError, match="expected a file system where several files can be"):
            adapter.to_lora(path)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert names(tmp_path) == ["lora"]
    adapter.to_lora(path)
    assert names(tmp_path) == ["lora"]
    assert {file.name: file.read_bytes() for file in path.iterdir()} != before


def test_exchanging_keeps_the_rest(tmp_path):
    path = tmp_path / "d"
    (path / "sub").mkdir(parents=True)
    (path / "sub" / "a").write_text("sub's")
    (path / "a").write_text("old")
    (path / "b").write_text("mine")
    (path / "link").symlink_to("nowhere")
    inode = (path / "b").stat().st_ino
    with exchanging(path, ("a", "c")) as place:
        assert names(place) == ["b", "link", "sub"]
        (place / "a").write_text("new")
        (place / "c").write_text("new")
        (path / "late").write_text("of another")
    assert names(path) == ["a", "b", "c", "late", "link", "sub"]
    assert (path / "a").read_text() == "new"
    assert (path / "sub" / "a").read_text() == "sub's"
    assert (path / "b").stat().st_ino == inode
    assert names(tmp_path) == ["d"]


def test_what_the_dead_left_goes_and_what_the_living_write_stays(tmp_path):
    path = tmp_path / "a"
    left = dead(path)
    assert len(left) == 2
    others = dead(tmp_path / "other")
    assert set(left) < set(others)
    (tmp_path / ".a.0a1b2c3d.tcur-lockx").write_text("mine")
    with replacing(path) as living:
        living.write_text("first")
        assert not set(left) & set(names(tmp_path))
        write(path, "second")  # does not remove the folder of the first
        assert living.exists()
    assert path.read_text() == "first"
    rest = [name for name in others if name not in left]
    assert names(tmp_path) == sorted([".a.0a1b2c3d.tcur-lockx", "a", *rest])
    assert not any(is_temporary(name) for name in ("a", ".a.tcur-tmp", ".a.0a1b2c3d.tcur-lockx"))


def test_a_lock_that_another_took_for_a_dead_ones(tmp_path, monkeypatch):
    """Between the making of a lock file and its locking, another writer may remove it."""
    flock, taken = fcntl.flock, []

    def late(file, how):
        if how == fcntl.LOCK_EX and not taken:
            taken.extend(name for name in names(tmp_path) if is_temporary(name))
            os.unlink(tmp_path / taken[0])
        flock(file, how)

    monkeypatch.setattr(whole.fcntl, "flock", late)
    write(tmp_path / "a")
    assert taken
    assert names(tmp_path) == ["a"]


def test_without_locks_the_folders_of_others_stay(tmp_path, monkeypatch):
    left = dead(tmp_path / "a")

    def fail(file, how):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(whole.fcntl, "flock", fail)
    write(tmp_path / "a")
    assert names(tmp_path) == sorted(["a", *left])
    monkeypatch.undo()
    write(tmp_path / "a")
    assert names(tmp_path) == ["a"]


def test_many_writers_at_once(tmp_path):
    """Threads and processes write one file, and all of them end well."""
    code = f"""{loaded(whole)}
for number in range(40):
    with module.replacing(Path({str(tmp_path / "a")!r})) as fresh:
        fresh.write_text("abc" * 1000)
"""
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    errors = []

    def many():
        try:
            for _ in range(40):
                write(tmp_path / "a", "abc" * 1000)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=many) for _ in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert [process.wait() for process in processes] == [0, 0]
    assert not errors
    assert (tmp_path / "a").read_text() == "abc" * 1000
    assert names(tmp_path) == ["a"]


def test_errors_about_other_files_stay_theirs(tmp_path):
    with pytest.raises(FileNotFoundError) as raised, replacing(tmp_path / "a"):
        (tmp_path / "elsewhere").read_text()
    assert raised.value.filename == str(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"^mine$"), replacing(tmp_path / "a"):
        raise OSError("mine")
    with pytest.raises(KeyError), new_directory(tmp_path / "b" / "c"):
        raise KeyError
    assert names(tmp_path) == []


def test_a_disk_that_is_full(tmp_path):
    """A limit on the size of files stands for it: the error comes from Rust, without a path."""
    code = f"""
import resource, signal, torch, tcur_kernels as tcur
from torch import nn
adapter = tcur.adapt(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), rank=16)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    adapter.save({str(tmp_path / "a")!r})
except OSError as error:
    print(error.errno, error.filename, type(error.__cause__).__name__)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
adapter.save({str(tmp_path / "b")!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{errno.EFBIG} {tmp_path / 'a'} SafetensorError\n"
    assert names(tmp_path) == ["b"]


def test_a_file_without_a_name(tmp_path, monkeypatch):
    file = without_name(tmp_path)
    os.close(file)
    monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)  # as a file system without: EISDIR
    file = without_name(tmp_path)
    assert os.pwrite(file, b"some", 0) == 4
    assert os.pread(file, 9, 0) == b"some"
    os.close(file)
    assert names(tmp_path) == []


def test_temporary_files_in_a_model_directory_are_not_copied(tmp_path):
    base = write_directory(tmp_path / "base", tiny())
    dead(base / "config.json")
    adapter = tcur.adapt(tiny(), rank=2)
    adapter.save(tmp_path / "a")
    from tcur_kernels.adapters.file import read_contents
    from tcur_kernels.merge.directory import ModelDirectory, merge_directory

    merge_directory(ModelDirectory(base), read_contents(tmp_path / "a"), base / "merged")
    assert not any(is_temporary(name) for name in names(base / "merged"))
    assert names(base / "merged") == [n for n in names(base) if n != "merged" and n[0] != "."]


# -- rows


COLUMNS = ("a", "b")


def test_rows_are_appended_to_a_new_file_and_to_an_old_one(tmp_path):
    path = tmp_path / "deep" / "rows.csv"
    appending.append(path, COLUMNS, [], end="\r\n")
    assert appending.read(path) == []
    appending.append(path, COLUMNS, [{"a": 1, "b": 'x, "y"'}, {"a": 2}], end="\r\n")
    assert path.read_bytes() == b'a,b\r\n1,"x, ""y"""\r\n2,\r\n'
    assert appending.read(path) == [{"a": "1", "b": 'x, "y"'}, {"a": "2", "b": ""}]


@pytest.mark.parametrize("cut", range(1, 13))
def test_a_line_that_was_cut_is_refused_and_removed_by_name(cut, tmp_path, capsys):
    path = tmp_path / "rows.csv"
    appending.append(path, COLUMNS, [{"a": 10, "b": 20}])
    whole_text = path.read_text()
    assert len(whole_text) == 10
    path.write_text(whole_text + "30,40\n"[: cut % 6] if cut > 5 else whole_text[:cut])
    is_cut = not path.read_text().endswith("\n")
    if is_cut:
        with pytest.raises(ValueError, match=r"rows.csv: expected whole lines, got a last one"):
            appending.read(path)
    kept = path.read_text().count("\n")
    appending.append(path, COLUMNS, [{"a": 5, "b": 6}])
    said = capsys.readouterr().err
    assert is_cut == (f"{path}: removed a last line that a killed run had cut short" in said)
    assert path.read_text().splitlines()[:kept] == whole_text.splitlines()[:kept]
    assert path.read_text().endswith("\n5,6\n")
    assert appending.read(path)[-1] == {"a": "5", "b": "6"}


def test_other_files_are_refused_and_left_as_they_are(tmp_path):
    path = tmp_path / "rows.csv"
    for text in ("other,columns\n1,2\n", "no table, no end", "a,c\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"rows.csv: expected the columns a,b in its first"):
            appending.append(path, COLUMNS, [{"a": 1}])
        assert path.read_text() == text
    path.write_text("a,b\n1\n")
    with pytest.raises(ValueError, match=r"expected as many values as columns in line 2"):
        appending.read(path)
    with pytest.raises(ValueError, match=r"a: expected a value of one line, got 'x\\ny'"):
        appending.append(path, COLUMNS, [{"a": "x\ny"}])
    with pytest.raises(IsADirectoryError):
        appending.append(tmp_path, COLUMNS, [])


def test_two_processes_append_whole_rows(tmp_path):
    path = tmp_path / "rows.csv"
    code = f"""{loaded(appending)}
for number in range(50):
    module.append(Path({str(path)!r}), ("a", "b"), [dict(a=number, b="x" * 3000)] * 3)
"""
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    rows = appending.read(path)
    assert len(rows) == 300
    assert [row["a"] for row in rows[::3]] == [row["a"] for row in rows[1::3]]
    assert {row["b"] for row in rows} == {"x" * 3000}


def test_safetensors_files_are_not_left_as_rust_makes_them(tmp_path):
    """Its library writes a file of mode 0600 and gives it the name; the mode is set after."""
    save_file({"a": torch.ones(2)}, tmp_path / "rust")
    with replacing(tmp_path / "a") as fresh:
        save_file({"a": torch.ones(2)}, fresh)
    (tmp_path / "plain").write_text("")
    assert mode(tmp_path / "a") == mode(tmp_path / "plain")
    assert torch.equal(load_file(tmp_path / "a")["a"], torch.ones(2))
