"""The states of the random number generators that training draws from, as tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from ...data.stream import mix


def seed(seed: int, rank: int, step: int = 0) -> None:
    """Seed torch's generators on all devices, from which dropout draws its masks: each rank gets its own stream.

    `seed` is the run's seed, which rank 0 gets unchanged if `step` is 0. Otherwise the seed is a hash of all three
    numbers. `step` is 0, or the update after which a run resumes with another number of ranks than before, which starts
    new streams.
    """
    torch.manual_seed(seed if rank == step == 0 else mix(seed, rank, step) >> 1)


def states(device: torch.device, rank: int) -> dict[str, Tensor]:
    """Return {name: state} of torch's generators on the CPU and, if `device` is a GPU, on that GPU.

    The names are "random.cpu.RANK" and "random.cuda.RANK" with the number `rank`, so that one checkpoint can hold the
    states of all ranks.
    """
    found = {f"random.cpu.{rank}": torch.get_rng_state()}
    if device.type == "cuda":
        found[f"random.cuda.{rank}"] = torch.cuda.get_rng_state(device)
    return found


def restore(states: dict[str, Tensor], device: torch.device) -> None:
    """Set torch's generators to `states`, a dict {name: state} that the function `states` returned on this rank.

    A state with ".cuda." in its name is set on the GPU `device`, any other on the CPU.
    """
    for name, state in states.items():
        if ".cuda." in name:
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)
