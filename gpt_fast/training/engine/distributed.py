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
        """Return True on rank 0, the process that prints and writes files."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until every rank (process of the job) has called this method. With one rank, return at once."""
        if self.size > 1:
            dist.barrier()

    def total(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over all ranks in place, and return it. With one rank, it stays as it is.

        Every rank must call this, with a tensor of the same shape and dtype on its device.
        """
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def anyone(self, flag: bool) -> bool:
        """Return True on every rank if `flag` is True on at least one, else False. Every rank must call this."""
        return bool(self.total(torch.tensor(float(flag), device=self.device))) if self.size > 1 else flag

    def number(self, value: int) -> int:
        """Return rank 0's integer `value` on every rank. Every rank must call this; other ranks' values are ignored."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.int64, device=self.device)
        dist.broadcast(tensor, 0)
        return int(tensor)

    def text(self, value: str) -> str:
        """Return rank 0's text `value` on every rank. Every rank must call this; other ranks' values are ignored."""
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
        """Return rank 0's dict `value` on every rank. Every rank must call this; other ranks' values are ignored.

        With several ranks, the result is a copy made through JSON, so `value` has to hold JSON values. With one rank,
        it is `value` itself.
        """
        return value if self.size == 1 else json.loads(self.text(json.dumps(value)))

    def wrap(self, model: nn.Module, dtype: torch.dtype) -> nn.Module:
        """Return `model` wrapped for data-parallel training, or `model` itself if there is one rank.

        With the strategy "ddp", the result is a DDP module around `model`, which stays whole on each rank. `release`
        needs that module, so it is kept in `wrapped`, too. With "fsdp", FSDP2 shards the parameters of `model` in
        place, and the result is `model`. Each decoder is an FSDP unit, and all other parameters form one more. If
        `dtype` is not float32, FSDP2 computes in `dtype` and sums gradients in float32. DDP ignores `dtype`.
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
        """Average the gradients over the ranks in the backward pass inside the block only if `wanted`.

        `parallel` is the module that `wrap` returned. With gradient accumulation, `wanted` is True for the last
        micro-batch alone. With FSDP2, the setting stays after the block. With one rank nothing is done.
        """
        if self.size == 1 or (wanted and self.strategy == "ddp"):
            yield
        elif self.strategy == "ddp":
            with parallel.no_sync():  # type: ignore[operator]
                yield
        else:
            parallel.set_requires_gradient_sync(wanted)  # type: ignore[operator]
            yield

    def release(self) -> None:
        """Delete the gradient reducers of the DDP modules that `wrap` made, while the process group still exists.

        The modules cannot train afterwards. Without DDP modules, nothing is done. A reducer that outlived the group's
        other owners would free the group. After a rank was lost, that can deadlock: the reducer holds the GIL while it
        waits for a thread of gloo, and that thread waits for the GIL. The process would never end.
        """
        for module in self.wrapped:
            module.reducer = module.logger = None  # type: ignore[assignment]

    def reshard(self, model: nn.Module) -> None:
        """Shard the parameters of an FSDP2 `model` again, as the optimizer knows them. Without FSDP, do nothing.

        After a forward pass without a backward pass, FSDP2's root module still shows unsharded parameters.
        """
        if self.size > 1 and self.strategy == "fsdp":
            from torch.distributed.fsdp import FSDPModule

            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def full(self, tensor: Tensor) -> Tensor:
        """Return the whole tensor, gathered from all ranks, if `tensor` is a DTensor, else `tensor` itself.

        Every rank must call this for a DTensor, the kind of tensor that FSDP2 shards.
        """
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    def replicated(self, tensor: Tensor) -> Tensor:
        """Return `tensor` as a DTensor replicated on all ranks, for arithmetic with FSDP2's sharded tensors.

        The values have to be the same on every rank, which is not checked. Without FSDP, return `tensor` itself.
        """
        if self.size == 1 or self.strategy == "ddp":
            return tensor
        from torch.distributed.tensor import DTensor, Replicate

        mesh = _mesh(torch.device(self.device).type, self.size)
        return DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)


@lru_cache(maxsize=1)
def _mesh(device: str, size: int) -> DeviceMesh:
    """Return the one-dimensional device mesh of all `size` ranks, which is cached. `device` is "cpu" or "cuda"."""
    return dist.init_device_mesh(device, (size,))


def resolve_device(name: str) -> str:
    """Return "cpu" or "cuda" for `name`, the value of --device. "auto" is "cuda" if PyTorch sees a GPU, else "cpu".

    Raise `ValueError` for any other name, and for "cuda" where PyTorch sees no CUDA device.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device {name}: expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this PyTorch sees no CUDA device; gpt-fast doctor tells more")
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def launched_size() -> int:
    """Return how many processes torchrun started, as its environment variable WORLD_SIZE says, or 1 if it is unset."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def world(strategy: str | None, device: str) -> Iterator[World]:
    """Yield the `World` of the processes that torchrun started, connected by NCCL between GPUs or gloo between CPUs.

    `device` is "cpu" or "cuda". A single process, with or without torchrun, gets a world of its own on `device`, and
    `strategy` is ignored. With several processes, `strategy` is "ddp" or "fsdp". Each process then takes the GPU of its
    local rank, if `device` is "cuda". Operations between ranks time out after ten minutes. A `RuntimeError` in the
    block that comes from a broken connection to another rank becomes a `LostRank`. At the end of the block the process
    group is destroyed, and DDP modules of the world cannot train any more. Raise `OptionError` if there are several
    processes and `strategy` is None.
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
    """Return True if `error` is a `DistError`, or has words such as "Broken pipe", "NCCL" or "gloo" in its text.

    Such an error means that the connection to another rank broke.
    """
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
    """Return the entries of run.json about the processes: their number "ranks", and "strategy" if there are several.

    "strategy" is "ddp" or "fsdp".
    """
    return {"ranks": world.size} | ({"strategy": world.strategy} if world.size > 1 else {})


def bytes_per_update(parameters: int, ranks: int, strategy: str, bits: int = 16, parts: int = 1) -> float:
    """Return the bytes that each rank sends, and also receives, in one update of P = `parameters` on N = `ranks`.

    DDP sums float32 gradients once: `2 (N - 1)/N · 4 P`. FSDP2 sends `(N - 1)/N · (2 k bits/8 + 4) P`. It gathers the
    weights for the forward and again for the backward pass of each of k = `parts` micro-batches, in the dtype of
    products (`bits` 16 or 32). It scatters the float32 sum of the gradients once. DDP does not depend on `bits` and
    `parts`. Raise `ValueError` if `strategy` is neither "ddp" nor "fsdp". Source: Thakur et al. (2005),
    doi:10.1177/1094342005051521, for the ring; Rajbhandari et al. (2020), arXiv:1910.02054, section 7.
    """
    if strategy not in ("ddp", "fsdp"):
        raise ValueError(f"strategy is {strategy!r}; expected ddp or fsdp")
    share = (ranks - 1) / ranks
    per_parameter = 8.0 if strategy == "ddp" else 2 * parts * bits / 8 + 4
    return share * per_parameter * parameters
