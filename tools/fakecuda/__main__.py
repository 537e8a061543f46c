"""Run a command on the stand-in for CUDA: `python -m tools.fakecuda [--capability 90] [--devices 1] -- COMMAND ...`.

The library is that of tools.fakecuda.build. No kernel runs, so the results of a command on `cuda` are meaningless. Its
calls of the devices, the host's time and CUDA's refusals are real.
"""

import argparse
import os
from pathlib import Path

CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)
LIBRARY = Path("build", "fakecuda", "lib")


def environment(
    library: Path, capability: int = 90, devices: int = 1, memory: int = 80, driver: int = 13000
) -> dict[str, str]:
    """Return a copy of this process's environment variables for a process that shall see `devices` pretended GPUs.

    LD_PRELOAD gets the stand-in for CUDA's driver in front of what it has, and the variables that configure the
    stand-in are set. `library` is the folder that tools.fakecuda.build wrote. `capability` is the compute capability
    times ten. Each GPU has `memory` GB. `driver` is the driver's CUDA version, such as 13000 for 13.0. Raise
    `SystemExit` if the folder has no libcuda.so.1.
    """
    library = library.resolve()
    if not (library / "libcuda.so.1").exists():
        raise SystemExit(f"tools.fakecuda: {library} has no libcuda.so.1; expected what tools.fakecuda.build makes")
    preloaded = [str(library / "libcuda.so.1"), *os.environ.get("LD_PRELOAD", "").split(":")]
    return os.environ | {
        "LD_PRELOAD": ":".join(filter(None, dict.fromkeys(preloaded))),
        "TRITON_LIBCUDA_PATH": str(library),
        "FAKECUDA_CAPABILITY": str(capability),
        "FAKECUDA_DEVICES": str(devices),
        "FAKECUDA_MEMORY_GB": str(memory),
        "FAKECUDA_DRIVER": str(driver),
    }


def main() -> None:
    """Replace this process by the command that follows the options. The command sees the pretended GPUs.

    Exit with a message if the stand-in library has not been built. Raise `OSError` if the command cannot be started.
    """
    parser = argparse.ArgumentParser(prog="python -m tools.fakecuda", description=__doc__)
    parser.add_argument("--capability", type=int, default=90, choices=CAPABILITIES, help="compute capability times ten")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--memory", type=int, default=80, help="GB of each device")
    parser.add_argument("--driver", type=int, default=13000, help="CUDA version that the driver serves, as in 13000")
    parser.add_argument("--library", type=Path, default=LIBRARY, help="folder that tools.fakecuda.build wrote")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    chosen = environment(options.library, options.capability, options.devices, options.memory, options.driver)
    os.execvpe(options.command[0], options.command, chosen)


if __name__ == "__main__":
    main()
