"""GPU architectures that the kernels are compiled for: one row each.

A new architecture needs a row here, rows in launch_configs.py where those of an older one do not fit, and its budget
(`make codegen CODEGEN_FLAGS=--update`). The launchers, tools/, setup.py and the Makefile read this table. It imports
neither torch nor triton, so that setup.py and the codegen gate can load it without them.
"""

from typing import NamedTuple

INTERPRETER = 0  # capability of Triton's interpreter in launch_configs.py


class Architecture(NamedTuple):
    """What the kernels and their tools need to know about a GPU architecture."""

    capability: int  # compute capability times ten: the key of launch configurations
    shared: int  # bytes of shared memory that a program may use
    descriptors: bool  # the tensor memory accelerator reads tiles by tensor descriptor
    wgmma: bool  # products in 16 bits must compile to wgmma
    targeted: bool  # DESIGN's speed targets are set for it: the codegen gate judges attention's loops on it
    nvcc: tuple[str, ...]  # what setup.py compiles csrc/cuda to: "sm" machine code, "compute" PTX for newer GPUs


ARCHITECTURES = (
    Architecture(80, shared=163 * 1024, descriptors=False, wgmma=False, targeted=False, nvcc=("sm",)),
    Architecture(90, shared=227 * 1024, descriptors=True, wgmma=True, targeted=True, nvcc=("sm", "compute")),
    Architecture(100, shared=227 * 1024, descriptors=True, wgmma=False, targeted=False, nvcc=()),
)
OLDEST = min(row.capability for row in ARCHITECTURES)
NVCC_FLAGS = [
    f"-gencode=arch=compute_{row.capability},code={kind}_{row.capability}" for row in ARCHITECTURES for kind in row.nvcc
]


def serving(capability: int) -> Architecture:
    """Return the row that serves a compute capability: the newest that is not newer."""
    return max(row for row in ARCHITECTURES if row.capability <= capability)


def has_descriptors(capability: int) -> bool:
    """Return True if tensor descriptors work on a compute capability, or in the interpreter."""
    return capability == INTERPRETER or serving(capability).descriptors


if __name__ == "__main__":  # for the Makefile
    print(*(row.capability for row in ARCHITECTURES))
