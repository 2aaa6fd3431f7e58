"""Runs tests against mutants: one session of pytest collects, and forks a child for each mutant.

The parent has imported and collected everything and runs no test. A child breaks one module, runs
the tests that reach the broken line, the fastest first, and stops at the first that fails. A child
that does not come to an end is ended by a limit, and counts as noticed.
"""

import ast
import builtins
import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest

from swapping import broken, is_swappable

#: Seconds of a processor after which a child is ended; and how many times more if it only waits.
LIMIT, PATIENCE = 120, 8
CAUGHT, SURVIVED, HUNG, UNREACHED = "caught", "survived", "hung", "unreached"
#: The compiler refuses it, or makes the same code of it: no mutant.
NONE = "none"
#: Seconds of tests for mutants of what runs at import; each starts an interpreter.
AT_IMPORT = 30.0


class Reach:
    """Which lines of which files every test runs, and how long it takes.

    The functions of the files tell it themselves: before each statement they note its line.
    Python's own way, `sys.settrace`, would slow down every function of torch as well.
    """

    NOTE = "_tcur_reached"

    def __init__(self, files, folder):
        self.files, self.folder = files, folder
        self.now, self.tests = set(), {}

    def noting(self, number, path):
        """The source of a file that notes (number, line) before each statement of a function."""
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for function in [each for each in ast.walk(tree) if isinstance(each, ast.FunctionDef)]:
            for node in ast.walk(function):
                for name in ("body", "orelse", "finalbody"):
                    block = getattr(node, name, None)
                    if isinstance(block, list) and not hasattr(node, f"noted_{name}"):
                        setattr(node, f"noted_{name}", True)
                        setattr(node, name, self._with_notes(number, block))
        return ast.unparse(ast.fix_missing_locations(tree))

    def _with_notes(self, number, block):
        found = []
        for statement in block:
            is_text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            if not is_text:
                note = f"{self.NOTE}(({number}, {statement.lineno}))"
                found.append(ast.parse(note).body[0])
            found.append(statement)
        return found

    def measure(self, session):
        """Runs the tests of a session; those that fail or are skipped are left out."""
        outcome = {}

        class Outcome:
            @pytest.hookimpl
            def pytest_runtest_logreport(self, report):
                known = outcome.setdefault(report.nodeid, ["passed", 0.0])
                known[1] += report.duration
                if report.outcome != "passed":
                    known[0] = report.outcome

        session.config.pluginmanager.register(Outcome())
        setattr(builtins, self.NOTE, lambda where: self.now.add(where))
        with contextlib.ExitStack() as stack:
            for number, path in enumerate(self.files):
                into = self.folder / f"noting_{number}_{path.name}"
                with contextlib.suppress(LookupError):  # a file without functions
                    stack.enter_context(broken(path, self.noting(number, path), into))
            for item, following in _pairs(session.items):
                self.now = set()
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                passed, seconds = outcome.get(item.nodeid, ("missing", 0.0))
                if passed == "passed":
                    lines = {}
                    for number, line in self.now:
                        lines.setdefault(str(self.files[number]), []).append(line)
                    self.tests[item.nodeid] = [seconds, lines]
        return self.tests


def _pairs(items):
    return zip(items, [*items[1:], None], strict=True)


def forked(function, seconds, log):
    """What ``function`` returned in a child: a small int, or None if a limit ended it."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(PATIENCE * seconds)
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            code = function()
        except BaseException as error:
            os.write(2, "".join(traceback.format_exception(error)).encode())
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):  # a crash is noticed, as a hang is
        return None if os.WTERMSIG(status) in (signal.SIGALRM, signal.SIGXCPU) else 1
    return os.WEXITSTATUS(status)


class Forks:
    """A plugin of pytest: what it does in place of running tests.

    Args:
        mutants: see `mutant.Mutant`.
        files: modules whose lines are looked at.
        folder: for what children write.
        budget: seconds of tests that a mutant gets, by what they took when nothing was broken.
        kept: a file that holds `Reach` between runs, or None.
        report: called with every mutant, its verdict and the test that failed.
        stop: called before each mutant; True ends the run.
    """

    def __init__(self, mutants, files, folder, budget, kept, report, stop=lambda: False):
        self.mutants, self.files, self.folder = mutants, files, Path(folder)
        self.budget, self.kept, self.report, self.stop = budget, kept, report, stop

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session):
        reach = self._reach(session)
        items = {item.nodeid: item for item in session.items if item.nodeid in reach}
        for number, mutant in enumerate(self.mutants):
            if self.stop():
                break
            self.report(number, mutant, *self._verdict(session, mutant, items, reach))
        return True

    def _reach(self, session):
        if self.kept is not None and self.kept.exists():
            return json.loads(self.kept.read_text())
        into = self.folder / "reach.json"
        print(f"measuring what {len(session.items)} tests reach", flush=True)
        start = time.time()

        def measure():
            into.write_text(json.dumps(Reach(self.files, self.folder).measure(session)))
            return 0

        code = forked(measure, 3600, self.folder / "reach.log")
        assert code == 0, (self.folder / "reach.log").read_text()[-4000:]
        if self.kept is not None:
            self.kept.write_text(into.read_text())
        reach = json.loads(into.read_text())
        print(f"{len(reach)} tests in {time.time() - start:.0f} s", flush=True)
        return reach

    def _chosen(self, reach, reaches, budget):
        """Ids of the tests that reach a mutant, the fastest first, as many as fit the budget."""
        ready = [nodeid for nodeid, (_, lines) in reach.items() if reaches(lines)]
        chosen, seconds = [], 0.0
        for nodeid in sorted(ready, key=lambda each: reach[each][0]):
            seconds += reach[nodeid][0]
            if chosen and seconds > budget:
                break
            chosen.append(nodeid)
        return chosen

    def _verdict(self, session, mutant, items, reach):
        """One of the words above, and by which test."""
        path = str(mutant.path)
        try:
            at_import = not is_swappable(mutant.path, mutant.text)
        except (SyntaxError, LookupError):
            return NONE, ""
        lines = mutant.lines()
        chosen = self._chosen(reach, lambda of: lines & set(of.get(path, ())), self.budget)
        of_file = self._chosen(reach, lambda of: path in of, AT_IMPORT)
        if at_import:  # or a method that would lose its `super`
            return self._imported(mutant, list(dict.fromkeys([*chosen, *of_file])))
        found = self._broken(session, mutant, [items[n] for n in chosen if n in items])
        if found[0] in (SURVIVED, UNREACHED):  # it may have done its work at import
            again = self._imported(mutant, of_file)
            return again if again[0] == CAUGHT else found
        return found

    def _imported(self, mutant, nodeids):
        if not nodeids:  # pytest would run all there are
            return UNREACHED, ""
        file = self.folder / f"{mutant.path.stem}_imported.py"
        file.write_text(mutant.text, encoding="utf-8")
        module = "tcur_kernels." + mutant.module.replace("/", ".")
        script = Path(__file__).with_name("fresh.py")
        quiet = ["-q", "-x", "-p", "no:cacheprovider"]
        command = [sys.executable, script, module, file, *quiet, *nodeids]
        root = Path(__file__).parent.parent.parent
        environment = {**os.environ, "PYTHONPATH": str(root)}
        try:
            done = subprocess.run(
                command, cwd=root, env=environment, capture_output=True, text=True,
                timeout=PATIENCE * LIMIT, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return HUNG, ""
        told = done.stdout + done.stderr
        # Tests whose arguments are numbers of the module have other names under a mutant of them.
        gone = set(re.findall(r"ERROR: not found: \S*/(tests/\S+)", told))
        if gone:
            kept = [nodeid for nodeid in nodeids if nodeid.split("[")[0] not in gone]
            assert len(kept) < len(nodeids), f"{mutant}: {told[-2000:]}"
            return self._imported(mutant, kept)
        failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
        if done.returncode == 0:
            return SURVIVED, ""
        return CAUGHT, failed[0].removeprefix("FAILED ").split(" - ")[0] if failed else "import"

    def _broken(self, session, mutant, items):
        if not items:
            return UNREACHED, ""
        log, failed = self.folder / "child.log", self.folder / "failed.txt"
        failed.unlink(missing_ok=True)

        class First:
            @pytest.hookimpl
            def pytest_runtest_logreport(self, report):
                if report.failed:
                    failed.write_text(report.nodeid)

        def run():
            session.config.pluginmanager.register(First())
            with broken(mutant.path, mutant.text, self.folder / f"{mutant.path.stem}.py"):
                for item, following in _pairs(items):
                    item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                    if failed.exists():
                        return 1
            return 0

        code = forked(run, LIMIT, log)
        words = {0: SURVIVED, 1: CAUGHT, None: HUNG}
        assert code in words, f"{mutant}: {log.read_text()[-2000:]}"
        return words[code], failed.read_text() if failed.exists() else ""
