"""Kills every writer of the project at every call that changes files, and makes each call fail.

    python tests/faults/faults.py            all writers, all calls, all faults: some minutes
    python tests/faults/faults.py --quick    what `make test` does
    python tests/faults/faults.py --only save --seed 3

A trial prepares a folder, forks a process that is warm already, and lets it write there. At one of
its calls it is killed, before it, after it or with half of the bytes written; or the call fails, or
writes fewer bytes than it should. Afterwards:

- the target is the old file whole or the new one whole, to the byte and with its mode;
- after a kill, the next run leaves the new one, and nothing that the killed one left;
- after an error, nothing is left at once, the error is an OSError that names the target, and the
  same object can write again;
- what was renamed had been brought to the disk before, and the renaming after it.

The last line is ``RESULT`` and what was tried, as JSON.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import errno
import json
import os
import pickle
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

import shim as shims  # noqa: E402

#: How a call fails; whether from then on all fail that take space.
ERRORS = {"ENOSPC": True, "EDQUOT": True, "EIO": False, "EACCES": False, "EROFS": False}
ERRORS |= {"EINTR": False}
#: Of renaming over a file, on file systems and mounts that do not have it.
NOT_OVER = ("EEXIST", "EPERM", "EXDEV", "EBUSY", "ENOTSUP", "EINVAL", "ENOSYS")
KILLS = {"before": shims.KILL_BEFORE, "half": shims.KILL_HALF, "after": shims.KILL_AFTER}
WRITING = ("write", "pwrite", "writev", "sendfile", "copy_file_range", "splice")
#: Calls that remove what is temporary: if these fail, it stays for the next run.
REMOVING = ("unlink", "rmdir")

#: Path below the folder -> mode, and the bytes of a file (None for a folder).
Tree = dict[str, tuple[int, "bytes | None"]]


class Fault(NamedTuple):
    """What happens at which call."""

    kind: str  # "kill before", "ENOSPC", "short"
    how: int
    at: int
    error: int = 0
    onwards: bool = False


class Outcome(NamedTuple):
    """How a write ended: with an error, or None; what lay there then; and after a second write."""

    error: tuple[str, int | None, str] | None
    tree: Tree
    again: Tree | None


def tree_of(folder: Path) -> Tree:
    """Everything below a folder. Empty folders count only if they are the target's own."""
    found: Tree = {}
    for path in sorted(folder.rglob("*")):
        mode = stat.S_IMODE(path.lstat().st_mode)
        content = None if path.is_dir() else canonical(path.read_bytes())
        found[str(path.relative_to(folder))] = mode, content
    return found


def canonical(content: bytes) -> bytes:
    """Safetensors with a sorted header, which its library writes in any order; others as is."""
    length = int.from_bytes(content[:8], "little")
    if content[8:9] != b"{" or length > len(content) - 8:
        return content
    try:
        header = json.loads(content[8 : 8 + length])
    except ValueError:
        return content
    text = json.dumps(header, sort_keys=True).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def plant(tree: Tree, folder: Path) -> None:
    """Makes what a tree has."""
    folder.mkdir()
    for name, (_, content) in tree.items():
        if content is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(content)
    for name, (mode, _) in tree.items():
        (folder / name).chmod(mode)


def split(tree: Tree) -> tuple[Tree, Tree]:
    """What is there for good, and what is temporary."""
    from tcur_kernels.files.whole import is_temporary

    rest = {n: v for n, v in tree.items() if any(map(is_temporary, Path(n).parts))}
    return {name: value for name, value in tree.items() if name not in rest}, rest


class Trials:
    """Trials of one writer.

    Args:
        writer: see `writers.Writer`.
        shim: of this process.
        root: for folders.
    """

    def __init__(self, writer: Any, shim: shims.Shim, root: Path) -> None:
        self.writer, self._shim, self._root, self._number = writer, shim, root, 0
        with self._folder({}) as folder:
            writer.before(folder)
            self.old = tree_of(folder)
            writer.look(folder)
        with self._folder(self.old) as folder:
            writer.write(folder)  # what it imports is here for all forks
        with self._folder(self.old) as folder:
            shim.prepare(folder, shims.NOTHING, -1)
            outcome = self._forked(folder, True)
            assert outcome is not None
            assert outcome.error is None, (writer.name, outcome.error)
            self.new, self.folder, self.calls = outcome.tree, folder, shim.calls()
            writer.look(folder)
        assert split(self.new)[1] == {}, (writer.name, list(split(self.new)[1]))
        with self._folder(self.new) as folder:
            shim.prepare(folder, shims.NOTHING, -1)
            outcome = self._forked(folder, False)
            assert outcome is not None
            assert outcome.error is None, (writer.name, outcome.error)
            self.newer = outcome.tree
        assert writer.appends or self.newer == self.new, writer.name

    @contextlib.contextmanager
    def _folder(self, tree: Tree) -> Iterator[Path]:
        self._number += 1
        folder = self._root / str(self._number)
        plant(tree, folder)
        try:
            yield folder
        finally:
            shutil.rmtree(folder)

    def _forked(self, folder: Path, armed: bool, again: bool = False) -> Outcome | None:
        """Writes in a process of its own; None if it is killed."""
        read, write = os.pipe()
        process = os.fork()
        if process == 0:
            status = 1
            try:
                os.close(read)
                devnull = os.open(os.devnull, os.O_WRONLY)
                os.dup2(devnull, 1)
                os.dup2(devnull, 2)
                outcome = self._written(folder, armed, again)
                with open(write, "wb") as pipe:
                    pickle.dump(outcome, pipe)
                status = 0
            finally:
                os._exit(status)
        os.close(write)
        with open(read, "rb") as pipe:
            sent = pipe.read()
        _, status = os.waitpid(process, 0)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL, status
            return None
        assert status == 0, (self.writer.name, "the trial itself failed")
        return pickle.loads(sent)

    def _written(self, folder: Path, armed: bool, again: bool) -> Outcome:
        error = None
        self._shim.arm(armed)
        try:
            self.writer.write(folder)
        except OSError as failed:
            error = type(failed).__name__, failed.errno, str(failed)
        except BaseException as failed:
            error = type(failed).__name__, None, str(failed)
        self._shim.arm(False)
        tree, later = tree_of(folder), None
        if again:
            try:
                self.writer.write(folder)
                later = tree_of(folder)
            except Exception as failed:
                later = {f"it fails: {failed}": (0, None)}
        return Outcome(error, tree, later)

    def faults(self) -> list[Fault]:
        """All faults of all calls."""
        found = []
        for at, call in enumerate(self.calls):
            for name, how in KILLS.items():
                if name != "half" or (call.name in WRITING and call.bytes > 1):
                    found.append(Fault(f"kill {name}", how, at))
            names = [*ERRORS, *(NOT_OVER if call.name in ("rename", "renameat2", "link") else ())]
            for name in names:
                number, onwards = getattr(errno, name), ERRORS.get(name, False)
                found.append(Fault(name, shims.FAIL, at, number, onwards))
            if call.name in WRITING and call.bytes > 1:
                found.append(Fault("short", shims.SHORT, at))
                found.append(Fault("short from there on", shims.SHORT, at, 0, True))
        return found

    def tried(self, fault: Fault) -> list[tuple[str, str]]:
        """Runs a trial; returns what is wrong: the kind of it, and the rest in words."""
        with self._folder(self.old) as folder:
            self._shim.prepare(folder, fault.how, fault.at, fault.error, fault.onwards)
            is_kill = fault.kind.startswith("kill")
            outcome = self._forked(folder, True, again=not is_kill)
            if is_kill:
                return self._after_kill(folder, outcome)
            assert outcome is not None
            return self._after_error(fault, folder, outcome)

    def _after_kill(self, folder: Path, outcome: Outcome | None) -> list[tuple[str, str]]:
        if outcome is not None:
            return [("not killed", "the call was not reached")]
        wrong = []
        tree, _ = split(tree_of(folder))
        states = self._states(tree, is_killed=True)
        if not states:
            wrong.append(("half-written", self._difference(tree, self.old)))
        later = self._forked(folder, False)
        assert later is not None
        if later.error is not None:
            return [*wrong, ("next run fails", str(later.error))]
        tree, rest = split(later.tree)
        if rest:
            wrong.append(("left behind", ", ".join(rest)))
        if not any(self._same(tree, self._next(state)) for state in states or ["old"]):
            strange = set(tree) - set(self.new)
            kind = "left behind" if strange else "next run is wrong"
            wrong.append((kind, self._difference(tree, self.new)))
        return wrong

    def _after_error(self, fault: Fault, folder: Path, outcome: Outcome) -> list[tuple[str, str]]:
        wrong = []
        call = self.calls[fault.at]
        tree, rest = split(outcome.tree)
        states = self._states(tree, is_killed=False)
        if not states:
            wrong.append(("half-written", self._difference(tree, self.old)))
        if rest and call.name not in REMOVING:
            wrong.append(("left behind", ", ".join(rest)))
        if outcome.error is None:
            if "new" not in states:
                wrong.append(("silent", "no error, and not what was to be written"))
        else:
            kind, number, text = outcome.error
            target = str(folder / self.writer.target) if self.writer.target else str(folder)
            parents = [str(path) for path in Path(target).parents if folder in path.parents]
            if number is None:
                wrong.append(("not an OSError", f"{kind}: {text}"))
            elif not any(f"'{path}" in text for path in (target, *parents)):
                wrong.append(("without its path", f"{kind}: {text}"))
            elif ".tcur-" in text or "/.tmp" in text:
                wrong.append(("a temporary path", f"{kind}: {text}"))
            elif fault.how == shims.SHORT:
                wrong.append(("not finished", f"{kind}: {text}"))
        assert outcome.again is not None
        tree, rest = split(outcome.again)
        if rest:
            wrong.append(("left behind", f"after another write: {', '.join(rest)}"))
        if not any(self._same(tree, self._next(state)) for state in states or ["old"]):
            wrong.append(("next run is wrong", self._difference(tree, self.new)))
        return wrong

    def _next(self, state: str) -> Tree:
        return self.new if state == "old" else self.newer

    def _states(self, tree: Tree, is_killed: bool) -> list[str]:
        """Which of the states "old" and "new" a tree is."""
        found = [name for name in ("old", "new") if self._same(tree, getattr(self, name))]
        if not found and self.writer.apart:
            both = {*self.old, *self.new}
            if set(tree) <= both and all(
                tree.get(name) in (self.old.get(name), self.new.get(name)) for name in both
            ):
                return ["new"] if is_killed else ["old", "new"]
        if not found and self.writer.appends and tree == {self.writer.target: (0o640, b"")}:
            return ["old"]  # a new file without rows: it is not removed, as others may wait for it
        if not found and self.writer.appends and is_killed:
            target = self.writer.target  # a cut line, which the next run removes
            (_, now), (_, new) = tree.get(target, (0, None)), self.new[target]
            old = self.old.get(target, (0, b""))[1]
            if now is not None and now.startswith(old) and new.startswith(now):
                return [] if now.endswith(b"\n") and b"2," in now[len(old) :] else ["old", "new"]
        return found

    def _same(self, tree: Tree, other: Tree) -> bool:
        """Whether two trees are one, but for empty folders above a target that is not there."""
        above = {str(path) for path in Path(self.writer.target).parents}
        mine, its = (
            {name: v for name, v in each.items() if name not in above} for each in (tree, other)
        )
        return mine == its

    def _difference(self, tree: Tree, other: Tree) -> str:
        names = [n for n in sorted({*tree, *other}) if tree.get(n) != other.get(n)]
        return "differs from before: " + ", ".join(
            f"{name} ({self._said(tree.get(name))}, not {self._said(other.get(name))})"
            for name in names
        )

    @staticmethod
    def _said(entry: tuple[int, bytes | None] | None) -> str:
        if entry is None:
            return "nothing"
        what = "folder" if entry[1] is None else f"{len(entry[1])} bytes {entry[1][:12]!r}"
        return f"{what}, {oct(entry[0])}"

    def order(self) -> list[tuple[str, str]]:
        """What is wrong with the order in which things come to the disk."""
        from tcur_kernels.files.whole import is_temporary

        dirty: dict[int, str] = {}  # files whose bytes may be lost: inode -> path
        entries: set[str] = set()  # folders where a new name may be lost
        wrong = []

        def is_inside(path: str) -> bool:
            return any(map(is_temporary, Path(path).parts))

        for call in self.calls:
            if call.name in (*WRITING, "ftruncate", "fallocate"):
                dirty[call.inode] = call.path
            elif call.name in ("fsync", "fdatasync"):
                dirty.pop(call.inode, None)
                entries.discard(call.path)
            elif call.name == "mmap":
                wrong.append(("mmap", f"writes {call.path} where no call is seen"))
            elif call.name in ("rename", "renameat2") and not is_inside(call.other):
                below = [path for path in dirty.values() if Path(call.path) in Path(path).parents]
                below += [path for path in dirty.values() if path == call.path]
                if below:
                    wrong.append(("not on the disk", f"{below} when {call.path} was renamed"))
                entries.add(str(Path(call.other).parent))
        left = [path for path in dirty.values() if not is_inside(path) and "deleted" not in path]
        left = [path for path in [*left, *entries] if "/#" not in path]
        if left:
            wrong.append(("not on the disk", f"{left} at the end"))
        return wrong


#: What strace is to look for: calls that change files, and the marks between them.
TRACED = "access,open,openat,?openat2,creat,write,pwrite64,writev,pwritev,pwritev2,sendfile,splice"
TRACED += ",copy_file_range,truncate,ftruncate,fallocate,fsync,fdatasync,msync,mmap,rename,renameat"
TRACED += (
    ",renameat2,link,linkat,symlink,symlinkat,unlink,unlinkat,rmdir,mkdir,mkdirat,chmod,fchmod"
)
TRACED += (
    ",fchmod,fchmodat,?fchmodat2,chown,fchown,lchown,fchownat,utimensat,utime,utimes,futimesat"
)
TRACED += ",setxattr,fsetxattr,lsetxattr"


def strace(args: argparse.Namespace) -> tuple[int, list[tuple[str, str, str]]]:
    """Compares what the shim sees with what strace sees, and fails what the shim cannot see.

    That is a renaming by safetensors: it makes the call itself, without the C library.

    Returns:
        The number of writers, and what is wrong: writer, kind, words.
    """
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        told = _straced(args, ["-o", str(log)])
        for text in log.read_text().split("TRACE_BEGINS ")[1:]:
            name = text.split('"')[0]
            seen: collections.Counter[str] = collections.Counter()
            for line in text.split("TRACE_ENDS")[0].splitlines()[1:-1]:
                kind = call_in(line, told[name]["folder"])
                if kind is not None:
                    seen[kind] += 1
            calls = [each for each in told[name]["calls"] if each != "close"]
            ours = collections.Counter(map(kind_of, calls))
            wrong += [
                (name, "unseen", f"{kind}: strace has {seen[kind]}, the shim {ours[kind]}")
                for kind in {*seen, *ours} - {"renameat"}
                if seen[kind] != ours[kind]
            ]
        # Of one writer, since strace counts calls from the start of a process.
        texts = log.read_text().split("TRACE_BEGINS ")
        own = next((n for n, text in enumerate(texts) if n and " renameat(" in text), None)
        if own is not None:
            name, first = texts[own].split('"')[0], 1 + "".join(texts[:own]).count(" renameat(")
            inject = f"inject=renameat:error=EIO:when={first}"
            one = _straced(args, ["-o", "/dev/null", "-e", inject])[name]
            number, text = one["error"][1:] if one["error"] else (None, "no error")
            if number != errno.EIO or f"'{one['folder']}/" not in text or ".tcur-" in text:
                wrong.append((name, "renameat", str(one)))
            if not one["is_old"]:
                wrong.append((name, "half-written", "after a renameat that failed"))
    return len(told), wrong


def _straced(args: argparse.Namespace, options: list[str]) -> dict[str, Any]:
    command = ["strace", "-f", "--seccomp-bpf", "-y", "-s", "0", "-e", f"trace={TRACED}", *options]
    command += ["-E", f"LD_PRELOAD={shims.compiled()}", sys.executable, __file__, "--trace"]
    command += ["--only", args.only] if args.only else []
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


#: Names of calls that do the same.
SAME = {"openat": "open", "openat2": "open", "fopen": "open", "creat": "open", "pwrite64": "pwrite"}
SAME |= {"renameat2": "rename", "linkat": "link", "symlinkat": "symlink", "unlinkat": "unlink"}
SAME |= {"mkdirat": "mkdir", "fchmodat": "chmod", "fchmodat2": "chmod", "fchownat": "chown"}
SAME |= {"lchown": "chown", "utimensat": "utimens"}


def kind_of(call: str) -> str:
    """One name for calls that do the same."""
    return SAME.get(call, call)


def call_in(line: str, folder: str) -> str | None:
    """The kind of a call in a line of strace, if it changes something below the folder."""
    call, _, rest = line.split(maxsplit=1)[1].partition("(")
    if folder not in rest or call == "access":
        return None
    if call in ("open", "openat") and not any(w in rest for w in ("O_WRONLY", "O_RDWR", "O_CREAT")):
        return None
    if call == "mmap" and not ("MAP_SHARED" in rest and "PROT_WRITE" in rest):
        return None
    return "rmdir" if call == "unlinkat" and "AT_REMOVEDIR" in rest else kind_of(call)


def chosen(faults: list[Fault], is_slow: bool, args: argparse.Namespace) -> list[Fault]:
    """All faults; in a quick run, the kills before each call, and three of the others."""
    draw = random.Random(args.seed).sample
    if args.quick:
        kills = [fault for fault in faults if fault.kind == "kill before"]
        others = [fault for fault in faults if not fault.kind.startswith("kill")]
        faults = [*(draw(kills, 2) if is_slow else kills), *draw(others, min(len(others), 3))]
    return faults if args.count is None else draw(faults, min(len(faults), args.count))


def main() -> int:
    """Runs the trials; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="in less than a minute")
    parser.add_argument("--only", help="writers whose names contain this")
    parser.add_argument("--seed", type=int, default=0, help="of the choice in a quick run")
    parser.add_argument("--count", type=int, help="at most so many trials of each writer")
    parser.add_argument("--folder", type=Path, help="where to write; default: memory, or /tmp")
    parser.add_argument("--no-strace", action="store_true", help="leave out the comparison")
    parser.add_argument("--trace", action="store_true", help="run each writer once; print calls")
    args = parser.parse_args()
    reason = shims.missing()
    if reason is not None:
        print(f"skipped: {reason}", file=sys.stderr)
        return 5
    shim = shims.preloaded()
    if shim is None:
        environment = {**os.environ, "LD_PRELOAD": str(shims.compiled())}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    os.environ.pop("LD_PRELOAD", None)  # of what this process starts
    import torch
    import writers

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.umask(0o027)
    memory = Path("/dev/shm")
    where = args.folder or (memory if os.access(memory, os.W_OK) else None)
    with tempfile.TemporaryDirectory(dir=where, prefix="tcur-faults-") as name:
        root = Path(os.path.realpath(name))
        (root / "kept").mkdir()
        made = writers.every(root / "kept", not args.quick)
        made = [writer for writer in made if (args.only or "") in writer.name]
        if args.trace:
            return trace(made, shim, root)
        return run(args, made, shim, root)


def trace(made: list[Any], shim: shims.Shim, root: Path) -> int:
    """Runs every writer once between two marks; prints what the shim saw, and how it ended."""
    told = {}
    for number, writer in enumerate(made):
        old, folder = root / f"old{number}", root / f"traced{number}"
        for each in (old, folder):
            each.mkdir()
            writer.before(each)
        before, error = tree_of(folder), None
        with contextlib.suppress(OSError):
            writer.write(old)  # what it imports
        shim.prepare(folder, shims.NOTHING, -1)
        os.access(f"TRACE_BEGINS {writer.name}", os.F_OK)
        shim.arm()
        try:
            writer.write(folder)
        except OSError as failed:
            error = type(failed).__name__, failed.errno, str(failed)
        shim.arm(False)
        os.access("TRACE_ENDS", os.F_OK)
        told[writer.name] = {
            "folder": str(folder),
            "calls": [call.name for call in shim.calls()],
            "error": error,
            "is_old": tree_of(folder) == before,
            "is_new": tree_of(folder) == tree_of(old),
        }
    print(json.dumps(told))
    return 0


def run(args: argparse.Namespace, made: list[Any], shim: shims.Shim, root: Path) -> int:
    """Tries all writers, prints what is wrong, and the result."""
    started = time.monotonic()
    kinds: collections.Counter[str] = collections.Counter()
    counts: dict[str, collections.Counter[str]] = {}
    shown: collections.Counter[str] = collections.Counter()
    (root / "trials").mkdir()
    right = 0

    def told(writer: str, what: str, kind: str, text: str) -> None:
        kinds[kind] += 1
        shown[writer] += 1
        if shown[writer] <= 12:
            print(f"WRONG {writer}: {what}: {kind}: {text[:600]}", flush=True)

    for writer in made:
        place = root / "trials" / str(len(counts))
        place.mkdir()
        trials = Trials(writer, shim, place)
        for kind, text in trials.order():
            told(writer.name, "order", kind, text)
        faults = chosen(trials.faults(), writer.slow, args)
        tried = counts[writer.name] = collections.Counter()
        for fault in faults:
            tried[fault.kind] += 1
            call = trials.calls[fault.at]
            what = f"{fault.kind} at call {fault.at} ({call.name} {Path(call.path).name})"
            wrong = trials.tried(fault)
            right += not wrong
            for kind, text in wrong:
                told(writer.name, what, kind, text)
        print(
            f"{writer.name}: {len(trials.calls)} calls, {sum(tried.values())} trials, "
            f"{time.monotonic() - started:.0f} s",
            flush=True,
        )
    traced = 0
    if not (args.quick or args.no_strace) and shutil.which("strace") is not None:
        traced, unseen = strace(args)
        for name, kind, text in unseen:
            told(name, "strace", kind, text)
    every = sum(sum(tried.values()) for tried in counts.values())
    result = {
        "kind": "kills",
        "tried": every,
        "right": right,
        "refused": 0,
        "crashes": 0,
        "silent": kinds["silent"],
        "half-written": kinds["half-written"],
        "left behind": kinds["left behind"],
        "wrong": dict(kinds),
        "traced": traced,
        "by writer": {name: sum(tried.values()) for name, tried in counts.items()},
        "by fault": dict(sum(counts.values(), collections.Counter())),
    }
    print(f"RESULT {json.dumps(result)}")
    return 1 if kinds else 0


if __name__ == "__main__":
    sys.exit(main())
