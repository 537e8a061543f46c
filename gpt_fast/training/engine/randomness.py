"""The states of the random number generators that training draws from, as tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from ...data.stream import mix


def seed(seed: int, rank: int, step: int = 0) -> None:
    """Start a stream of dropout masks for each rank, and for each step from which a run resumes with other ranks."""
    torch.manual_seed(seed if rank == step == 0 else mix(seed, rank, step) >> 1)


def states(device: torch.device, rank: int) -> dict[str, Tensor]:
    """Return the states of torch's generators on the CPU and on this rank's GPU, by names of the rank's own."""
    found = {f"random.cpu.{rank}": torch.get_rng_state()}
    if device.type == "cuda":
        found[f"random.cuda.{rank}"] = torch.cuda.get_rng_state(device)
    return found


def restore(states: dict[str, Tensor], device: torch.device) -> None:
    """Set the generators from `states(device, rank)`."""
    for name, state in states.items():
        if ".cuda." in name:
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)
