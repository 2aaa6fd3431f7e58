"""Builds the wheel for aarch64 and tries it in an emulator: `make wheel-aarch64`.

It needs Debian's g++-aarch64-linux-gnu and qemu-user, and apt-get for a Python of aarch64, which is
unpacked into ``build/aarch64`` and not installed. There ``smoke.py`` checks the wheel as on
x86-64: the kernels are then plain C++ of the baseline. It says nothing about speed. Importing torch
alone takes the emulator a minute.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from make_wheel import ROOT, audit, modules, names_of, run

KEPT = ROOT / "build" / "aarch64"
CROSS = "aarch64-linux-gnu-"
EMULATOR = "qemu-aarch64"
PYTHON = "python3.11"
#: Debian packages of the emulated Python, with all that they depend on.
DEBIAN = (f"{PYTHON}-minimal", f"lib{PYTHON}-stdlib", "libstdc++6", "libgomp1")
#: Systems whose wheels an aarch64 of today takes.
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")


def fetch_python(root):
    """Debian's Python for aarch64, unpacked; apt keeps its lists beside it, not in the system."""
    state = KEPT / "apt"
    for name in ("lists/partial", "debs/partial"):
        (state / name).mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "",
        "Dir::State": state,
        "Dir::State::lists": state / "lists",
        "Dir::State::status": state / "status",
        "Dir::Cache": state,
        "Dir::Cache::archives": state / "debs",
    }
    apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in settings.items())]
    run([*apt, "update"])
    run([*apt, "install", "-y", "--download-only", "--no-install-recommends", *DEBIAN])
    for package in (state / "debs").glob("*.deb"):
        run(["dpkg", "-x", package, root])


def fetch_packages(site):
    """torch for aarch64 and what it needs, for the emulated Python."""
    platforms = [part for name in PLATFORMS for part in ("--platform", f"{name}_aarch64")]
    options = ["--no-deps", "--no-compile", "--only-binary=:all:", "--python-version", "3.11"]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    listed = ROOT / "tests" / "wheel_aarch64.txt"
    run([*pip, *options, *platforms, "--target", site, "-r", listed])


def make_wheel(site, folder):
    """The wheel, compiled for aarch64 and linked with its torch."""
    tools = {"CC": f"{CROSS}gcc", "CXX": f"{CROSS}g++"}
    tools |= {"LDSHARED": f"{CROSS}gcc -shared", "LDCXXSHARED": f"{CROSS}g++ -shared"}
    # The linker passes over the torch of this machine, whose libraries are not for aarch64.
    tools |= {"LDFLAGS": f"-L{site / 'torch' / 'lib'}", "TORCH_CUDA_ARCH_LIST": ""}
    base = ["build", "--build-base", KEPT / "build", "egg_info", "--egg-base", folder]
    command = ["setup.py", "-q", *base, "bdist_wheel", "--plat-name", "linux_aarch64"]
    shutil.rmtree(KEPT / "build", ignore_errors=True)
    environment = {**os.environ, **tools, "TCUR_ISA": "", "TCUR_ONLY": "cpu"}
    run([sys.executable, *command, "--dist-dir", folder], env=environment, cwd=ROOT)
    (wheel,) = folder.glob("*-py3-none-linux_aarch64.whl")
    held = {name for name in names_of(wheel) if ".dist-info/" not in name}
    if held != modules() | {"tcur_kernels/_cpu.torch.so"}:
        raise SystemExit(f"{wheel.name}: {sorted(held ^ modules())}")
    return wheel


def smoke(root, site, wheel, folder):
    """Facts that smoke.py tells of the wheel under the emulator."""
    target = folder / "site-packages"
    run([sys.executable, "-m", "zipfile", "-e", wheel, target])
    for name in ("smoke.py", "tolerance.py"):
        shutil.copy(ROOT / "tests" / name, folder)
    python = [shutil.which(EMULATOR), "-L", root, root / "usr" / "bin" / PYTHON]
    environment = {**os.environ, "PYTHONPATH": f"{target}{os.pathsep}{site}", "PATH": str(folder)}
    output = run([*python, "smoke.py", *python], env=environment, cwd=folder)
    return json.loads(output.splitlines()[-1])


def main():
    needed = (f"{CROSS}g++", EMULATOR, "apt-get", "dpkg")
    missing = [name for name in needed if shutil.which(name) is None]
    if missing:
        raise SystemExit(
            f"no {', '.join(missing)} here: apt-get install g++-aarch64-linux-gnu qemu-user"
        )
    tools = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / ".venv" / "wheel_tools").absolute()
    root, site, started = KEPT / "root", KEPT / "packages", time.time()

    def say(text):
        print(f"{time.time() - started:5.0f} s  {text}", flush=True)

    if not (root / "usr" / "bin" / PYTHON).exists():
        fetch_python(root)
    if not (site / "torch").exists():
        fetch_packages(site)
    emulated = [EMULATOR, "-L", root, root / "usr" / "bin" / PYTHON, "-V"]
    say(subprocess.run(emulated, capture_output=True, text=True, check=True).stdout.strip())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "audited").mkdir()
        wheel = audit(make_wheel(site, folder), folder / "audited", tools, "auto")
        say(f"{wheel.name}: compiled, and granted by auditwheel")
        (ROOT / "dist").mkdir(exist_ok=True)
        kept = Path(shutil.copy(wheel, ROOT / "dist"))
        facts = smoke(root, site, kept, folder)
        say(json.dumps(facts))
    outcome = {"kind": "wheel-aarch64", "tried": 1, "right": 1, "refused": 0, "crashes": 0}
    outcome |= {"silent": 0, "wheel": wheel.name, **facts}
    print(f"RESULT {json.dumps(outcome)}")


if __name__ == "__main__":
    main()
