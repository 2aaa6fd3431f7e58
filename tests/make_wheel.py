"""Builds the wheel and the sdist as a release has them, and tries the wheel: `make wheel`.

1. The sdist is made of this checkout. It must hold every source.
2. The wheel is made of the sdist alone, as ``pip install tcur_kernels-….tar.gz`` makes it: in an
   environment of its own. With ``--cuda 1`` and nvcc it holds the CUDA library, too, for every
   architecture of a release. It must hold the modules and data of this checkout, and nothing else.
3. auditwheel looks for what systems as old as the tag says would lack, and names the wheel.
   torch's libraries are not packed: the process has loaded them.
4. For each Python of ``--pythons`` there is an environment with nothing but the wheel and what it
   depends on. ``smoke.py`` runs there, outside of the checkout, without a compiler on the PATH.

Wheel and sdist lie in ``dist`` then. The last line is the outcome; exits with 1 if anything failed.
"""

import argparse
import json
import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
#: The oldest systems that the wheel is for: RHEL 8, Debian 10, Ubuntu 20.04 and their like.
TAG = "manylinux_2_28"
#: torch brings these.
EXCLUDED = ("libtorch*.so", "libc10*.so")
PACKAGE = "tcur_kernels"


def run(command, **options):
    """Output of a command; ends the program if it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        **options,
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout[-8000:]}")
    return done.stdout


def with_tools(folder):
    """The environment in which the tools of make_wheel.txt are found."""
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PYTHONPATH": str(folder), "PATH": path}


def modules(root=ROOT):
    """What a wheel must hold of the package, without libraries: paths below ``root``."""
    found = (root / PACKAGE).rglob("*")
    kept = [path for path in found if path.suffix in (".py", ".typed", ".csv")]
    return {path.relative_to(root).as_posix() for path in kept}


def sources(root=ROOT):
    """What an sdist must hold beside the package."""
    found = [path for path in (root / "csrc").rglob("*") if path.is_file()]
    found += [root / name for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md")]
    return {path.relative_to(root).as_posix() for path in found}


def make_sdist(folder, tools):
    """The sdist of this checkout; what it holds is checked."""
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, ROOT]
    run(command, env=with_tools(tools))
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {"/".join(name.split("/")[1:]) for name in archive.getnames()}
    missing = (modules() | sources()) - names
    if missing or any(name.endswith((".so", ".pyc")) for name in names):
        raise SystemExit(f"{sdist.name}: missing {sorted(missing)}, or something compiled in it")
    return sdist


def make_wheel(sdist, folder, has_cuda):
    """The wheel of an sdist, made in isolation; what it holds is checked."""
    architectures = runpy.run_path(str(ROOT / "setup.py"))["ALL_ARCHITECTURES"] if has_cuda else ""
    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": architectures}
    environment.pop("TCUR_ISA", None)
    environment.pop("TCUR_ONLY", None)
    # A cached wheel of the same version would be of other sources.
    options = ["--no-deps", "--no-cache-dir", "--wheel-dir", folder]
    environment["PIP_BUILD_CONSTRAINT"] = environment["PIP_CONSTRAINT"] = str(
        ROOT / "constraints.txt"
    )
    run([sys.executable, "-m", "pip", "wheel", *options, sdist], env=environment, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    if not wheel.name.split("-", 2)[2].startswith("py3-none-linux_"):
        raise SystemExit(f"{wheel.name}: expected the tag py3-none-linux_…")
    names = names_of(wheel)
    libraries = {f"{PACKAGE}/_cpu.torch.so"}
    if has_cuda and f"{PACKAGE}/_cuda.torch.so" in names:
        libraries.add(f"{PACKAGE}/_cuda.torch.so")
    differing = {name for name in names if ".dist-info/" not in name} ^ (modules() | libraries)
    if differing:
        raise SystemExit(f"{wheel.name}: missing or not expected: {sorted(differing)}")
    return wheel


def names_of(wheel):
    """Names of the files in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def audit(wheel, folder, tools, system=f"{TAG}_x86_64"):
    """The wheel with the tag that auditwheel grants; the program ends if it does not grant it.

    ``system`` is "auto" for another architecture than this: the oldest that auditwheel grants.
    """
    excluded = [part for name in EXCLUDED for part in ("--exclude", name)]
    command = [sys.executable, "-m", "auditwheel", "repair", "--plat", system, "--only-plat"]
    run([*command, *excluded, "--wheel-dir", folder, wheel], env=with_tools(tools))
    (found,) = folder.glob(f"*-py3-none-{'manylinux*' if system == 'auto' else system}.whl")
    added = names_of(found) - names_of(wheel)
    if any(".dist-info/" not in name for name in added):  # it may add a list of components there
        raise SystemExit(f"{found.name}: auditwheel has packed into it {sorted(added)}")
    return found


def smoke(python, wheel, torch, folder):
    """Facts that smoke.py tells of the wheel in a bare environment of this Python."""
    run([python, "-m", "venv", folder / "bare"])
    bare = folder / "bare" / "bin"
    # No compiler, and nothing of this checkout or of this user.
    environment = {"PATH": str(bare), "HOME": str(folder), "TMPDIR": str(folder)}
    kept = ("PIP_", "SSL_", "REQUESTS_", "http", "OMP_NUM_THREADS", "OPENBLAS_")
    environment |= {name: value for name, value in os.environ.items() if name.startswith(kept)}
    pip = [bare / "python", "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    run([*pip, "--only-binary", ":all:", f"torch=={torch}", wheel], env=environment, cwd=folder)
    for name in ("smoke.py", "tolerance.py"):
        shutil.copy(ROOT / "tests" / name, folder)
    output = run([bare / "python", "-W", "error", "smoke.py"], env=environment, cwd=folder)
    return json.loads(output.splitlines()[-1])


def pinned_torch():
    """The release of torch that constraints.txt names."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith("torch=="))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cuda", type=int, choices=(0, 1), default=1, help="with kernels for GPUs")
    parser.add_argument("--pythons", nargs="*", default=[sys.executable], help="to try it with")
    parser.add_argument("--torch", default=pinned_torch(), help="that it is tried with")
    parser.add_argument("--wheel", type=Path, help="builds nothing, tries this wheel")
    parser.add_argument("--tools", type=Path, default=ROOT / ".venv" / "wheel_tools")
    args = parser.parse_args()
    tools = args.tools.absolute()
    started, tried, failed = time.time(), [], []

    def say(text):
        print(f"{time.time() - started:5.0f} s  {text}", flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder, dist = Path(temporary), ROOT / "dist"
        for name in ("sdist", "wheel", "audited"):
            (folder / name).mkdir()
        wheel = args.wheel
        if wheel is None:
            sdist = make_sdist(folder / "sdist", tools)
            say(f"{sdist.name}: every source is in it")
            if args.cuda and runpy.run_path(str(ROOT / "setup.py"))["find_nvcc"]() is None:
                say("no nvcc here, so the wheel has no kernels for GPUs; CUDA=0 asks for that")
                args.cuda = 0
            made = make_wheel(sdist, folder / "wheel", args.cuda)
            say(f"{made.name}: made of the sdist, with every module and nothing else")
            found = audit(made, folder / "audited", tools)
            say(f"{found.name}: auditwheel finds nothing that such systems lack")
            shutil.rmtree(dist, ignore_errors=True)
            dist.mkdir()
            wheel = Path(shutil.copy(found, dist))
            shutil.copy(sdist, dist)
        for python in args.pythons:
            with tempfile.TemporaryDirectory() as bare:
                try:
                    tried.append(smoke(python, wheel.absolute(), args.torch, Path(bare)))
                    say(f"{python}: {json.dumps(tried[-1])}")
                except SystemExit as error:
                    failed.append(str(python))
                    say(f"FAILED: {python}: {error}")
        has_cuda = f"{PACKAGE}/_cuda.torch.so" in names_of(wheel)
    outcome = {
        "kind": "wheel",
        "tried": len(args.pythons),
        "right": len(tried),
        "refused": 0,
        "crashes": len(failed),
        "silent": 0,
        "wheel": wheel.name,
        "cuda": has_cuda,
        "pythons": [f"{one['python']} with torch {one['torch']}" for one in tried],
        "checks": sum(one["checks"] for one in tried),
    }
    print(f"RESULT {json.dumps(outcome)}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
