"""Find cublasLt.h, which compiling csrc/cuda/cublaslt.cpp needs: `python -m tools.cublas_headers FOLDER`.

Print the folder that holds it: the CUDA toolkit's, or FOLDER, into which the headers of the package nvidia-cublas are
unpacked (a download of 420 MB, once, of which half a megabyte is kept).
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "nvidia-cublas==13.0.2.14"  # of the CUDA that GPU machines have
ROOT = Path(__file__).parent.parent
UNPACKED = ROOT / ".venv-codegen" / "cublas"  # where `make codegen` puts them


def toolkit() -> Path:
    """Return the folder of the CUDA toolkit: the environment variable CUDA_HOME, or else /usr/local/cuda.

    The folder may not exist.
    """
    return Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))


def find(folder: Path = UNPACKED) -> Path | None:
    """Return the folder that holds cublasLt.h: the include folder of the CUDA toolkit, or else `folder`.

    `folder` is by default where `make codegen` unpacks the headers. Return None if neither holds it.
    """
    return next((place for place in (toolkit() / "include", folder) if (place / "cublasLt.h").exists()), None)


def unpack(folder: Path) -> None:
    """Download the package nvidia-cublas (420 MB) by pip, and write its headers into `folder`.

    The folder is made if it is missing, and the headers lie directly in it. Raise `subprocess.CalledProcessError` if
    the download fails.
    """
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download", "--no-deps"]
        subprocess.run([*command, "--no-cache-dir", "--dest", temporary, PACKAGE], check=True)
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(next(Path(temporary).glob("*.whl"))) as wheel:
            for name in wheel.namelist():
                if name.endswith(".h"):
                    (folder / Path(name).name).write_bytes(wheel.read(name))


def main() -> None:
    """Print the folder that holds cublasLt.h: the CUDA toolkit's, or the one that the command line names.

    If neither holds it, headers are downloaded into the latter first.
    """
    folder = Path(sys.argv[1])
    if find(folder) is None:
        unpack(folder)
    print(find(folder))


if __name__ == "__main__":
    main()
