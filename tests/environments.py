"""Environments of other versions: of Python, torch and what comes with them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
HOME = ROOT / "build" / "environments"
#: What torch 2.15 says of itself in `opcheck`, and torch of the first Python 3.13.
IGNORED = (
    "ignore:The .grad attribute of a Tensor:UserWarning:torch._subclasses.meta_utils",
    "ignore:Guards may run slower on Python 3.13.0:RuntimeWarning",
)


def run(command, cwd=ROOT, **more):
    """A command, its output kept. Builds get one architecture, unless others are asked for."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={"TORCH_CUDA_ARCH_LIST": "9.0", "OMP_NUM_THREADS": "1", **os.environ, **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def done(command, cwd=ROOT, **more):
    """Output of a command that must not fail."""
    result = run(command, cwd, **more)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stdout[-8000:]}")
    return result.stdout


def interpreter(version):
    """A Python of this version, "3.12" for example: this one, on the PATH, or of pyenv; or None."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = [sys._base_executable, shutil.which(f"python{version}")]
    found += sorted(pyenv.glob(f"versions/{version}.*/bin/python"))
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    for path in filter(None, found):
        result = run([path, "-c", code])  # a shim of pyenv may have nothing behind it
        if result.returncode == 0 and result.stdout.strip() == version:
            return Path(path)
    return None


def constraints(without):
    """The lines of constraints.txt but for some packages, in a file for pip."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    kept = [line for line in lines if line.split("==")[0] not in without]
    path = ROOT / "build" / "versions" / f"without-{'-'.join(sorted(without))}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(kept) + "\n")
    return path


class Environment:
    """A virtual environment below ``build/environments``."""

    def __init__(self, name):
        self.folder = HOME / name
        self.python = self.folder / "bin" / "python"

    def make(self, python=sys.executable):
        """Makes it, unless it is there."""
        if not self.python.exists():
            done([python, "-m", "venv", self.folder])

    def install(self, *packages, without=()):
        """Installs packages, in the versions of constraints.txt but for those ``without``."""
        pip = [self.python, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
        done([*pip, "-c", constraints(without), *packages])

    def remove(self):
        shutil.rmtree(self.folder, ignore_errors=True)

    def test(self, files, tree=ROOT, chosen=""):
        """Runs tests of files, or those chosen by ``-k``, with the package of a tree."""
        options = ["-q", "-p", "no:cacheprovider", "-n", "logical", "--maxprocesses", "8"]
        ignored = " ".join(f"-W '{each}'" for each in IGNORED)
        # By way of variables, because tests start programs, and pytest, too.
        more = {"PYTHONPATH": str(tree), "PYTEST_ADDOPTS": ignored, "HF_HUB_OFFLINE": "1"}
        return run([self.python, "-m", "pytest", *options, "-k", chosen, *files], tree, **more)
