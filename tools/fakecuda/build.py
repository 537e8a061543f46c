"""Build the stand-in: `python -m tools.fakecuda.build FOLDER`, by a Python that has PyTorch's CUDA build.

Stubs are written for the functions that PyTorch imports from CUDA's libraries and driver/ does not define. Those of
cuBLAS do nothing, and those of the runtime fail with a message. Nothing then reaches the real libraries, which find no
device.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = sorted((HERE / "driver").glob("*.cpp"))
LIBRARIES = ("libtorch_cuda", "libtorch_cuda_linalg", "libtorch_python", "libc10_cuda")
IMPORTED = re.compile(r" U ((?:__)?cuda\w+|cublas\w+)")
DEFINED = re.compile(r" [TW] ((?:__)?cuda\w+|cublas\w+)$", re.MULTILINE)
HARMLESS = re.compile("Set|Get|Create|Destroy|Attribute|Init")  # functions of cuBLAS that launch nothing


def site_packages() -> Path:
    """Return the site-packages folder that holds the package `torch` of this Python.

    Exit with a message if PyTorch is not installed, or has no libtorch_cuda.so because it is no CUDA build.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("tools.fakecuda: torch is not installed; expected PyTorch's CUDA build: make fake-gpu")
    folder = Path(spec.origin).parent.parent
    if not (folder / "torch" / "lib" / "libtorch_cuda.so").exists():
        raise SystemExit(f"tools.fakecuda: torch in {folder} has no CUDA; expected PyTorch's CUDA build: make fake-gpu")
    return folder


def symbols(pattern: re.Pattern, *arguments: str) -> set[str]:
    """Run `nm` with `arguments` (options and files). Return what the one group of `pattern` captures in its output.

    These are names of symbols. Raise `subprocess.CalledProcessError` if `nm` fails.
    """
    listed = subprocess.run(["nm", *arguments], check=True, capture_output=True, text=True).stdout
    return set(pattern.findall(listed))


def stubs(imported: set[str], defined: set[str]) -> str:
    """Return C++ source with a stub for each function name in `imported` that is not in `defined`, sorted by name.

    `imported` are the functions of the CUDA runtime and cuBLAS that PyTorch's libraries import. `defined` are the
    functions that the C++ sources in driver/ define. A stub of a cuBLAS function does nothing and returns success. If
    the function would launch work, the stub also records the call. A stub of a CUDA runtime function returns an error.
    """
    lines = [
        'extern "C" void fakecuda_note(const char*, const char*, const void*);',
        'extern "C" int fakecuda_missing(const char*);',
        '#define STUB extern "C" __attribute__((visibility("default"))) int',
    ]
    for name in sorted(imported - defined):
        if not name.startswith("cublas"):
            body = f'return fakecuda_missing("{name}");'
        elif HARMLESS.search(name):
            body = "return 0;"
        else:  # the stream is the first field of a handle
            body = f'fakecuda_note("cublas", "{name}", *static_cast<void**>(handle)); return 0;'
        lines.append(f"STUB {name}(void* handle, ...) {{ {body} }}")
    return "\n".join(lines) + "\n"


def build(folder: Path) -> Path:
    """Compile the library that pretends to be CUDA's driver into `folder`, and return its path, `folder`/libcuda.so.1.

    Functions that PyTorch imports from CUDA and that driver/ does not define become stubs, see `stubs`. The folder is
    made if it is missing. It also gets stubs.cpp, the object files, and a copy of the library as libcuda.so. CUDA's
    headers are searched in CUDA_HOME, by default /usr/local/cuda, and in PyTorch's packages. Exit with a message if
    PyTorch has no CUDA. Raise `subprocess.CalledProcessError` if `nm` or the compiler fails.
    """
    site = site_packages()
    cuda = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    folder.mkdir(parents=True, exist_ok=True)
    compiler = [os.environ.get("CXX", "g++"), "-std=c++20", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall"]
    compiler += [f"-I{cuda / 'include'}", f"-I{site / 'nvidia' / 'cu13' / 'include'}"]
    objects = []
    for source in SOURCES:
        objects.append(str(folder / f"{source.stem}.o"))
        subprocess.run([*compiler, "-c", str(source), "-o", objects[-1]], check=True)
    imported = set()
    for name in LIBRARIES:
        imported |= symbols(IMPORTED, "-D", str(site / "torch" / "lib" / f"{name}.so"))
    written = folder / "stubs.cpp"
    written.write_text(stubs(imported, symbols(DEFINED, *objects)), encoding="utf-8")
    library = folder / "libcuda.so.1"
    link = [*compiler, "-shared", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(written), *objects]
    subprocess.run([*link, "-ldl", "-lpthread"], check=True)
    shutil.copyfile(library, folder / "libcuda.so")  # Triton's launcher is linked against this name
    return library


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tools.fakecuda.build", description=__doc__)
    parser.add_argument("folder", type=Path)
    print(build(parser.parse_args().folder.resolve()), file=sys.stderr)
