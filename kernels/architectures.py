"""GPU architectures that the kernels are compiled for: one row each.

A new architecture needs a row here, rows in launch_configs.py where those of an older one do not fit, and its budget
(`make codegen CODEGEN_FLAGS=--update`). The launchers, tools/, setup.py and the Makefile read this table. It imports
neither torch nor triton, so that setup.py and the codegen gate can load it without them.
"""

import functools
from typing import NamedTuple

INTERPRETER = 0  # number of Triton's interpreter in launch_configs.py


class Architecture(NamedTuple):
    """Facts about a GPU architecture, for the kernels and their tools."""

    capability: int  # compute capability times ten: the key of launch configurations
    rows: int  # number of the newest architecture whose rows in launch_configs.py serve this one where it has none
    shared: int  # bytes of shared memory that a program may use
    descriptors: bool  # True if the kernels read tiles by tensor descriptor (tensor memory accelerator)
    wgmma: bool  # True if products in 16 bits must compile to wgmma instructions
    targeted: bool  # True if the speed targets are set for it: the codegen gate checks attention's loops on it
    nvcc: tuple[str, ...]  # forms in which setup.py compiles csrc/cuda: "sm" machine code, "compute" PTX for newer GPUs


# An RTX 5090 has tensor descriptors and an RTX 3090's shared memory, but no wgmma, which reads its operands from shared
# memory. Compiled with descriptors, its products spill up to 752 bytes. With pointers and an RTX 3090's tiles they
# spill nothing.
ARCHITECTURES = (
    # A100
    Architecture(80, 80, shared=163 * 1024, descriptors=False, wgmma=False, targeted=False, nvcc=("sm",)),
    # A10 and RTX 3090; L4 and RTX 4090, sm_89, have the same limits
    Architecture(86, 86, shared=99 * 1024, descriptors=False, wgmma=False, targeted=False, nvcc=()),
    # H100 and H200
    Architecture(90, 90, shared=227 * 1024, descriptors=True, wgmma=True, targeted=True, nvcc=("sm", "compute")),
    # B200
    Architecture(100, 100, shared=227 * 1024, descriptors=True, wgmma=False, targeted=False, nvcc=()),
    # RTX 5090
    Architecture(120, 86, shared=99 * 1024, descriptors=False, wgmma=False, targeted=False, nvcc=()),
)
OLDEST = min(row.capability for row in ARCHITECTURES)
NVCC_FLAGS = [
    f"-gencode=arch=compute_{row.capability},code={kind}_{row.capability}" for row in ARCHITECTURES for kind in row.nvcc
]


def serving(capability: int) -> Architecture:
    """Return the row of ARCHITECTURES that serves a GPU: the one with the largest capability up to `capability`.

    `capability` is a compute capability times ten, such as 90. Raise `ValueError` if it is below those of all rows.
    """
    older = [row for row in ARCHITECTURES if row.capability <= capability]
    if not older:
        raise ValueError(f"gpt_fast: the compute capability is {capability / 10}; expected {OLDEST / 10} or newer")
    return max(older)


def fits(architecture: int, capability: int) -> bool:
    """Return True if launch configurations made for `architecture` may be used on a GPU with this compute capability.

    Both numbers are compute capabilities times ten, or INTERPRETER. Configurations for Triton's interpreter fit only
    the interpreter. Configurations for a GPU fit if `architecture` equals `capability`, so that a GPU without a row in
    ARCHITECTURES, such as an RTX 4090 (89), may have some too. They also fit if `architecture` is the capability of the
    row that serves the GPU (see `serving`), or at most the number in that row's field `rows`. Several architectures may
    fit, and the caller chooses among them. Raise `ValueError` for a GPU older than all rows.
    """
    if INTERPRETER in (architecture, capability):
        return architecture == capability
    return architecture in (capability, serving(capability).capability) or architecture <= serving(capability).rows


@functools.cache
def has_descriptors(capability: int) -> bool:
    """Return True if the kernels use tensor descriptors on a GPU of this compute capability, or for INTERPRETER.

    The capability is times ten, such as 90. The row of ARCHITECTURES that serves the GPU decides. Raise `ValueError`
    for a GPU older than all rows.
    """
    return capability == INTERPRETER or serving(capability).descriptors


if __name__ == "__main__":  # the Makefile reads this list
    print(*(row.capability for row in ARCHITECTURES))
