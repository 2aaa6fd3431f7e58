"""Build of the compiled kernels; everything else is in pyproject.toml."""

import functools
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel

STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # one binary for torch 2.10 and later
CPU, CUDA = "tcur_kernels._cpu", "tcur_kernels._cuda"
CUDA_FOLDER = Path("build", "cuda")
#: Keeps both libraries loadable with an older glibc.
GLIBC = "csrc/common/glibc.cpp"
#: What every release holds; PTX is compiled by the driver of later GPUs.
ALL_ARCHITECTURES = "8.0;9.0;10.0+PTX"


def cpu_extension():
    """`_cpu.torch.so`: operators on the LibTorch stable ABI, and facts as plain C functions."""
    # Imported here: the sdist and the metadata do not need torch.
    from torch.utils.cpp_extension import CppExtension

    if shutil.which(compiler()) is None:
        raise SystemExit(
            f"tcur_kernels: no C++ compiler: '{compiler()}' is not on the PATH; "
            "install g++ or clang (C++17), or name one by CXX."
        )
    folders = ["csrc/cpu", *(f"csrc/cpu/{name}" for name in instruction_sets())]
    return CppExtension(
        CPU,
        sources=[GLIBC]
        + [str(path) for folder in folders for path in sorted(Path(folder).glob("*.cpp"))],
        depends=headers("common", "cpu"),
        extra_compile_args=[
            "-O3",
            "-g0",
            "-fopenmp-simd",  # vectorise marked loops; threads come from torch
            "-ffp-contract=fast",
            "-fvisibility=hidden",
            "-Wall",
            "-Wno-psabi",  # vectors never cross a function that is not inlined
            STABLE_ABI,
        ],
    )


def compiler():
    """The C++ compiler: that of CXX, or the system's."""
    return os.environ.get("CXX", "c++").split()[0]


def target_machine():
    """The architecture that is compiled for, as "x86_64": by a cross compiler, not this one."""
    if shutil.which(compiler()) is None:
        return platform.machine()
    command = [compiler(), "-dumpmachine"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.split("-")[0].strip() or platform.machine()


def instruction_sets():
    """Names of those that the CPU kernels are compiled for: all, or what TCUR_ISA asks for.

    All are those of the architecture that is compiled for. An isa.h that is for one asks for it.
    """
    machine = target_machine()
    every = []
    for path in sorted(Path("csrc/cpu").glob("*/isa.h")):
        machines = re.findall(r"defined\(__(\w+)__\)", path.read_text(encoding="utf-8"))
        if not machines or machine in machines:
            every.append(path.parent.name)
    wanted = os.environ.get("TCUR_ISA", "").split() or every
    if not set(wanted) <= set(every):
        raise SystemExit(f"tcur_kernels: TCUR_ISA: expected some of {every}, got {wanted}.")
    return wanted


def headers(*folders):
    """Headers under these folders of csrc, for source distributions."""
    return [str(path) for name in folders for path in sorted(Path("csrc", name).rglob("*.h"))]


def find_nvcc():
    """CUDA's compiler: of CUDA_HOME, on the PATH, or where it is usually installed; or None."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")


def architectures():
    """Names of the targets of TORCH_CUDA_ARCH_LIST: "8.0 10.0+PTX" is ["80", "100", "100+PTX"].

    Without it those of the GPUs here, so that nobody waits for kernels that cannot run.
    """
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if wanted is None:
        wanted = " ".join(gpus_here())
    names = []
    for item in wanted.replace(";", " ").replace(".", "").split():
        number = item.removesuffix("+PTX")
        names += [number, item] if item != number else [number]
    return names


@functools.cache
def gpus_here():
    """Compute capabilities of the GPUs of this machine, as the driver tells them: ["9.0"]."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=compute_cap", "--format=csv,noheader"]
    result = subprocess.run(query, capture_output=True, text=True, check=False)
    found = sorted(set(result.stdout.split())) if result.returncode == 0 else []
    return [item for item in found if item.replace(".", "").isdigit()]


def nvcc_command(nvcc):
    """Compilation of one source for all architectures, without input and output."""
    from torch.utils.cpp_extension import include_paths

    targets = []
    for name in architectures():
        number = name.removesuffix("+PTX")
        code = f"sm_{number}" if name == number else f"compute_{number}"
        targets.append(f"-gencode=arch=compute_{number},code={code}")
    return [
        nvcc,
        "-std=c++17",
        "-O3",
        "-Xcompiler=-fPIC,-fvisibility=hidden",
        "-Xptxas=-v,-warn-spills,-warn-lmem-usage",
        "-DUSE_CUDA",  # the stream of the current device, in torch's stable headers
        STABLE_ABI,
        f'-DTCUR_ARCHITECTURES="{" ".join(architectures())}"',
        *(f"-I{path}" for path in include_paths()),
        *targets,
    ]


def cuda_extension():
    """`_cuda.torch.so`: operators for CUDA tensors alone.

    A library of its own, because one that needs the CUDA part of torch cannot be loaded without it.
    None without nvcc or without architectures: the package then has no CUDA backend, and the build
    says so.
    """
    if find_nvcc() is None or not architectures():
        missing = "nvcc" if find_nvcc() is None else "GPU"
        print(
            f"tcur_kernels: no {missing} here, so no kernels for GPUs; with nvcc, "
            f"TORCH_CUDA_ARCH_LIST='{ALL_ARCHITECTURES}' asks for them."
        )
        return None
    sources = sorted(map(str, Path("csrc/cuda").glob("*.cu")))
    return Extension(CUDA, sources=sources, depends=headers("common", "cuda"))


def build_ext(has_all=False):
    """The command; ``has_all``: what is not among its extensions is not to be in the package."""
    from torch.utils.cpp_extension import BuildExtension, library_paths

    class Build(BuildExtension):
        """torch's build for C++, and nvcc for the sources that torch without CUDA cannot build."""

        def get_ext_filename(self, name):
            # The stable ABI and no Python in it: one file for every version of Python. A dot within
            # its name keeps Python from taking it for a module.
            return f"{name.replace('.', '/')}.torch.so"

        def build_extensions(self):
            # Objects are kept, also of an editable install, whose own folder is temporary; those of
            # another Python or torch beside them. What has to be compiled is ninja's to say.
            self.build_temp = str(cpu_folder().absolute())
            self.force = True
            everything = self.extensions
            self.extensions = [e for e in everything if e.name != CUDA]
            super().build_extensions()
            self.extensions = everything
            if has_all and all(extension.name != CUDA for extension in everything):
                # What an earlier build left there would be loaded, whatever its sources were.
                Path("tcur_kernels", "_cuda.torch.so").unlink(missing_ok=True)
            # Libraries from before they had these names: nothing loads them any more.
            for name in ("_cpu.so", "_cpu.cpython-*.so", "_cuda.so"):
                for path in Path("tcur_kernels").glob(name):
                    path.unlink()
            for extension in everything:
                if extension.name == CUDA:
                    self.build_cuda(extension)

        def build_cuda(self, extension):
            nvcc = find_nvcc()
            command = nvcc_command(nvcc)
            CUDA_FOLDER.mkdir(parents=True, exist_ok=True)

            def compile_one(source):
                target = cuda_object(source)
                if not is_up_to_date(source, command):
                    notes = ["-MMD", "-MF", str(target.with_suffix(".d"))]
                    log = run([*command, *notes, "-c", source, "-o", str(target)])
                    target.with_suffix(".log").write_text(log)
                    target.with_suffix(".command").write_text(text_of(command))
                return target

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(compile_one, extension.sources))
            library = Path(self.get_ext_fullpath(extension.name))
            if is_newer(library, objects):
                return
            library.parent.mkdir(parents=True, exist_ok=True)
            # Bound lazily, so that torch without CUDA can load it, register and tell; and never
            # "as needed": libtorch.so brings the CUDA part of torch where there is one.
            link = [nvcc, "-shared", "-cudart=static", "-Xlinker=-z,lazy,--no-as-needed"]
            link += [f"-L{path}" for path in library_paths()]
            kept = CUDA_FOLDER / "glibc.o"
            run([nvcc, "-Xcompiler=-fPIC", "-c", GLIBC, "-o", str(kept)])
            link += [*map(str, objects), str(kept)]
            torch_libraries = ["-ltorch", "-ltorch_cpu", "-lc10", "-o", str(library)]
            run([*link, *torch_libraries])
            stubs = older_glibc(library)
            if stubs:
                run([*link, f"-Xlinker={','.join(stubs)}", *torch_libraries])

    return Build.with_options(use_ninja=True)


def older_glibc(library):
    """Libraries to link with before glibc, so that the library loads with glibc before 2.34, too.

    That version took the functions of libpthread, libdl and librt into libc under new versions of
    their symbols, and the static runtime of CUDA calls them. The old versions are in every glibc.
    These are empty libraries with the old names and versions; nothing of them is in the result.
    """
    if shutil.which("objdump") is None or target_machine() != "x86_64":
        return []
    listed = run(["objdump", "-T", str(library)])
    functions = sorted(set(re.findall(r"\(GLIBC_2\.34\) +(\S+)", listed)))
    homes = {"libdl.so.2": "dl", "librt.so.1": "shm_", "libpthread.so.0": ""}
    # Apart, because nvcc's own programs look for libraries in the folder that they run in.
    folder, found = CUDA_FOLDER / "glibc", []
    folder.mkdir(exist_ok=True)
    for home, start in homes.items():
        own = [name for name in functions if name.startswith(start)]
        functions = [name for name in functions if name not in own]
        if not own:
            continue
        old = [f"{name};" for name in own if name != "dlmopen"]
        versions = f"GLIBC_2.2.5 {{ global: {' '.join(old)} local: *; }};\n"
        if "dlmopen" in own:
            versions += "GLIBC_2.3.4 { global: dlmopen; } GLIBC_2.2.5;\n"
        source, script, target = folder / f"{home}.cpp", folder / f"{home}.map", folder / home
        bodies = [f'extern "C" void {name}() {{}}\n' for name in own]
        source.write_text("".join(bodies))
        script.write_text(versions)
        options = ["-shared", "-fPIC", "-nostdlib", "-fno-builtin", f"-Wl,-soname,{home}"]
        options += [f"-Wl,--version-script={script}", str(source), "-o", str(target)]
        run([compiler(), *options])
        found.append(str(target))
    return found


class Wheel(bdist_wheel):
    """A wheel for one system and every Python: neither library has any of Python in it."""

    def get_tag(self):
        _, _, system = super().get_tag()
        return "py3", "none", system


def cpu_folder():
    """Where the objects of the CPU library for this Python and this torch are kept."""
    import torch

    name = f"{sys.implementation.cache_tag}-torch-{torch.__version__}"
    machine = target_machine()
    return Path("build", "cpu", name if machine == platform.machine() else f"{name}-{machine}")


def cuda_object(source):
    """Where what nvcc makes of a source is kept; what it said and read lies beside it."""
    return CUDA_FOLDER / f"{Path(source).stem}.o"


def text_of(command):
    """A command and the torch whose headers it reads."""
    import torch

    return f"{torch.__version__}: {' '.join(command)}"


def is_up_to_date(source, command):
    """Whether its object was made by this command, of the source and the headers as they are."""
    target = cuda_object(source)
    mark, notes = target.with_suffix(".command"), target.with_suffix(".d")
    if not (notes.exists() and mark.exists() and mark.read_text() == text_of(command)):
        return False  # for other architectures, or with another torch
    inputs = [Path(name) for name in dependencies(notes.read_text())]
    return is_newer(target, inputs)


def is_newer(target, inputs):
    """Whether a file is there and not older than any of its inputs, which are all there."""
    if not all(path.exists() for path in (target, *inputs)):
        return False
    return all(path.stat().st_mtime <= target.stat().st_mtime for path in inputs)


def dependencies(notes):
    """Files that a compilation read, as the compiler notes them for make."""
    return notes.replace("\\\n", " ").partition(":")[2].split()


def run(command):
    """Output of a command; ends the build if it fails."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(
            f"{result.stdout}{result.stderr}\ntcur_kernels: nvcc failed; to build without the CUDA "
            "backend, set TORCH_CUDA_ARCH_LIST to nothing."
        )
    return result.stdout + result.stderr


def extensions():
    """Both libraries, or the one that TCUR_ONLY names: "cpu" or "cuda"."""
    only = os.environ.get("TCUR_ONLY") or None
    makers = {"cpu": cpu_extension, "cuda": cuda_extension}
    if only is not None and only not in makers:
        raise SystemExit(f"tcur_kernels: TCUR_ONLY: expected cpu or cuda, got {only}.")
    made = [make() for name, make in makers.items() if only in (None, name)]
    return [extension for extension in made if extension is not None], only is None


if __name__ == "__main__":
    found, has_all = extensions()
    setup(
        ext_modules=found, cmdclass={"build_ext": build_ext(has_all=has_all), "bdist_wheel": Wheel}
    )
