"""Copies batches to the device while it computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...data.batches import Batch


@dataclass(frozen=True)
class Sent:
    """The parts of one update on their way to the device. `Sender.receive` returns them."""

    parts: list[Batch]
    counts: Tensor  # [parts, terms]: the predictions of each term of the loss
    tokens: int  # real ones, which only the host's copy can tell without waiting
    arrived: torch.cuda.Event | None


class Sender:
    """Copies to one device. On CUDA a copy runs beside the kernels, on a stream of its own, and the host never waits.

    The host waits for a copy from pageable memory, so batches are pinned first.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, batches: Sequence[Batch], count: Callable[[Batch], Tensor]) -> Sent:
        """Start copying `batches`, the micro-batches of an update, to the device. Return a handle for `receive`.

        `count(batch)` returns a tensor [terms]: the number of predictions that each term of the loss has in a batch.
        These counts are copied too. There has to be at least one batch. Unless the device is a GPU, the copies are
        finished when this method returns.
        """
        counts = torch.stack([count(batch) for batch in batches])
        tokens = sum(batch.num_tokens() for batch in batches)
        if self._stream is None:
            return Sent([batch.to(self.device) for batch in batches], counts.to(self.device), tokens, None)
        with torch.cuda.stream(self._stream):
            parts = [batch.pinned().to(self.device) for batch in batches]
            counts = _pinned(counts).to(self.device, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        return Sent(parts, counts, tokens, arrived)

    def receive(self, sent: Sent) -> tuple[list[Batch], Tensor]:
        """Return (batches, counts), both on the device, for `sent`, the handle that `send` returned.

        Row i of `counts` [len(batches), terms] says how many predictions each term of the loss has in batch i. On CUDA,
        kernels that are launched on the current stream from now on wait for the copy. The host does not wait.
        """
        if sent.arrived is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(sent.arrived)
            for tensor in (sent.counts, *(x for part in sent.parts for x in part.inputs().values())):
                tensor.record_stream(stream)  # its memory belongs to the other stream's pool
        return sent.parts, sent.counts


def _pinned(tensor: Tensor) -> Tensor:
    """Return a copy of a CPU tensor in pinned memory, or a tensor of another device itself."""
    return tensor.pin_memory() if tensor.is_cpu else tensor
