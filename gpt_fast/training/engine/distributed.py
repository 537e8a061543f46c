"""Many processes, one model: PyTorch's DDP and FSDP2 behind the few calls that the training loop makes.

Started by torchrun, which tells each process its rank. One process without torchrun is a world of its own, in which
every call here costs nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from gpt_fast_settings.declaration import OptionError

TIMEOUT = timedelta(minutes=10)


class LostRank(ValueError):
    """Error that another process of the job is gone, so that this one cannot continue."""


@dataclass(frozen=True)
class World:
    """The processes that train one model, seen from one of them."""

    rank: int = 0
    size: int = 1
    strategy: str = "ddp"
    device: str = "cpu"
    wrapped: list[nn.Module] = field(default_factory=list, compare=False)  # DDP's modules

    @property
    def first(self) -> bool:
        """Is this the process that prints and writes?"""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all ranks are here."""
        if self.size > 1:
            dist.barrier()

    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum over the ranks."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def anyone(self, flag: bool) -> bool:
        return bool(self.total(torch.tensor(float(flag), device=self.device))) if self.size > 1 else flag

    def number(self, value: int) -> int:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.int64, device=self.device)
        dist.broadcast(tensor, 0)
        return int(tensor)

    def text(self, value: str) -> str:
        """Rank 0's text, on every rank."""
        if self.size == 1:
            return value
        content = value.encode()
        length = self.number(len(content))
        letters = torch.zeros(length, dtype=torch.uint8, device=self.device)
        if self.first:
            letters.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        dist.broadcast(letters, 0)
        return bytes(letters.tolist()).decode()

    def values(self, value: dict[str, Any]) -> dict[str, Any]:
        """Rank 0's plain values, on every rank."""
        return value if self.size == 1 else json.loads(self.text(json.dumps(value)))

    def wrap(self, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        """Return the model that trains on this rank's part of each batch.

        DDP holds the whole model on each rank. FSDP2 holds a share on each rank, in place, one unit per decoder.
        """
        if self.size == 1:
            return model
        if self.strategy == "ddp":
            self.wrapped.append(nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True))
            return self.wrapped[-1]
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mixed = dtype != torch.float32
        policy = (
            MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32) if mixed else MixedPrecisionPolicy()
        )
        mesh = _mesh(torch.device(self.device).type, self.size)
        for decoder in model.trunk.decoders:  # type: ignore[union-attr]
            fully_shard(decoder, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        return model

    @contextmanager
    def synchronised(self, parallel: nn.Module, wanted: bool) -> Iterator[None]:
        """Sum gradients over the ranks only in the backward of the last part of a batch."""
        if self.size == 1 or (wanted and self.strategy == "ddp"):
            yield
        elif self.strategy == "ddp":
            with parallel.no_sync():  # type: ignore[operator]
                yield
        else:
            parallel.set_requires_gradient_sync(wanted)  # type: ignore[operator]
            yield

    def release(self) -> None:
        """Take the reducers from DDP's modules, which then train no more, while the group of processes is still there.

        A reducer that is freed last frees the group with it, holds the GIL meanwhile, and waits for a thread of gloo.
        After a rank was lost, that thread waits for the GIL to free a sum of gradients, and the process would not end.
        """
        for module in self.wrapped:
            module.reducer = module.logger = None  # type: ignore[assignment]

    def reshard(self, model: nn.Module) -> None:
        """Put back the parameters that the optimizer knows.

        After a forward without backward FSDP2's root still shows whole ones.
        """
        if self.size > 1 and self.strategy == "fsdp":
            from torch.distributed.fsdp import FSDPModule

            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def full(self, tensor: Tensor) -> Tensor:
        """Return a whole tensor, which may be spread over the ranks."""
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    def replicated(self, tensor: Tensor) -> Tensor:
        """Return a tensor for use beside sharded ones."""
        if self.size == 1 or self.strategy == "ddp":
            return tensor
        from torch.distributed.tensor import DTensor, Replicate

        mesh = _mesh(torch.device(self.device).type, self.size)
        return DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)


@lru_cache(maxsize=1)
def _mesh(device: str, size: int) -> DeviceMesh:
    return dist.init_device_mesh(device, (size,))


def resolve_device(name: str) -> str:
    """Return `cpu` or `cuda`; `auto` is a GPU if there is one."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device {name}: expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this PyTorch sees no CUDA device; gpt-fast doctor tells more")
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def launched_size() -> int:
    """Return how many processes torchrun started, or 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def world(strategy: str | None, device: str) -> Iterator[World]:
    """Join the world that torchrun describes: NCCL between GPUs, gloo between CPUs.

    A lost connection to another rank becomes a `LostRank`, which names the cause.
    """
    size = launched_size()
    if size == 1:
        yield World(device=device)
        return
    if strategy is None:
        raise OptionError(f"torchrun started {size} processes; say how they share the work: --strategy ddp or fsdp")
    rank = int(os.environ["RANK"])
    if device == "cuda":
        device = f"cuda:{int(os.environ['LOCAL_RANK'])}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=TIMEOUT)
    joined = World(rank, size, strategy, device)
    try:
        yield joined
    except RuntimeError as error:
        if _is_lost_connection(error):
            raise LostRank(
                f"rank {rank}: the connection to another rank broke ({str(error).splitlines()[0]}); "
                "start the job again with --resume"
            ) from None
        raise
    finally:
        joined.release()
        if dist.is_initialized():
            dist.destroy_process_group()


def _is_lost_connection(error: RuntimeError) -> bool:
    text = str(error)
    signs = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Connection refused",
        "Broken pipe",
        "NCCL",
        "gloo",
    )
    return isinstance(error, dist.DistError) or any(sign in text for sign in signs)


def settings_of(world: World) -> dict[str, Any]:
    """Return the entries of a run's record about its processes."""
    return {"ranks": world.size} | ({"strategy": world.strategy} if world.size > 1 else {})


def bytes_per_update(parameters: int, ranks: int, strategy: str, bits: int = 16, parts: int = 1) -> float:
    """Return the bytes that each rank sends, and also receives, in one update of P parameters on N ranks.

    DDP sums float32 gradients once: `2 (N - 1)/N · 4 P`. FSDP2 gathers the weights for the forward and again for the
    backward of each of the batch's `parts` k, in the type of products (`bits` 16 or 32), and scatters the float32 sum
    of the gradients once: `(N - 1)/N · (2 k bits/8 + 4) P`. Source: Thakur et al. (2005), doi:10.1177/1094342005051521,
    for the ring; Rajbhandari et al. (2020), arXiv:1910.02054, section 7.
    """
    if strategy not in ("ddp", "fsdp"):
        raise ValueError(f"strategy is {strategy!r}; expected ddp or fsdp")
    share = (ranks - 1) / ranks
    per_parameter = 8.0 if strategy == "ddp" else 2 * parts * bits / 8 + 4
    return share * per_parameter * parameters
