"""What training on many ranks sends: bytes of an update, by the formulas of ring collectives."""

from __future__ import annotations


def bytes_per_update(parameters: int, ranks: int, strategy: str, bits: int = 16, parts: int = 1) -> float:
    """The bytes that each rank sends, and as many that it receives, in one update of P parameters on N ranks.

    DDP sums float32 gradients once: `2 (N - 1)/N · 4 P`. FSDP2 gathers the weights for the forward and again for the
    backward of each of the batch's `parts` k, in the type that products are computed in (`bits` 16 or 32), and scatters
    the float32 sum of the gradients once: `(N - 1)/N · (2 k bits/8 + 4) P`. Source: Thakur et al. (2005),
    doi:10.1177/1094342005051521, for the ring; Rajbhandari et al. (2020), arXiv:1910.02054, section 7.
    """
    if strategy not in ("ddp", "fsdp"):
        raise ValueError(f"strategy is {strategy!r}, wanted ddp or fsdp")
    share = (ranks - 1) / ranks
    per_parameter = 8.0 if strategy == "ddp" else 2 * parts * bits / 8 + 4
    return share * per_parameter * parameters
