"""Keys and values of what a model has read, and the two ways to attend to them: with a prompt, or one token a row."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..config import GPTConfig
from ..reference import split_qkv


class KVCache:
    """Keys and values of the tokens that a model has read: `keys` and `values` [L, B, H, S, D], allocated once.

    `lengths` [B], int64, is the number of tokens in each row; positions beyond it hold nothing. `batch` is B, `length`
    is S, the tokens that a row has room for. `num_layers` L and `num_heads` H are the configuration's unless given.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch: int,
        length: int,
        dtype: torch.dtype,
        device: torch.device,
        num_layers: int | None = None,
        num_heads: int | None = None,
    ):
        H, L = num_heads or config.num_heads, num_layers or config.num_layers
        shape = (L, batch, H, length, config.hidden_dim // H)
        with torch.inference_mode(False):  # tensors made in inference mode could not be written outside it
            # Zeros: what the reference multiplies by a probability of 0 must not be NaN. Untouched pages cost nothing.
            self.keys = torch.zeros(shape, dtype=dtype, device=device)
            self.values = torch.zeros(shape, dtype=dtype, device=device)
            self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)

    @property
    def batch(self) -> int:
        """Number of rows of the cache, B."""
        return self.keys.shape[1]

    @property
    def length(self) -> int:
        """Number of tokens that each row of the cache has room for, S."""
        return self.keys.shape[3]


class StepPass:
    """How attention uses the cache in one decode step: one new token for each row, at position `lengths[row]`.

    The caller advances the cache's `lengths` afterwards. Shapes do not depend on the lengths, so a CUDA graph can
    capture the step.
    """

    def __init__(self, cache: KVCache):
        self.cache = cache
        # A full row can only be one that is done: what it computes is not used, but has to stay inside the cache.
        self.positions = cache.lengths[:, None].clamp(max=cache.length - 1)  # [B, 1]

    def attend(self, layer: int, qkv: Tensor, num_heads: int) -> Tensor:
        """Write each row's new key and value into the cache of the block `layer`, and attend from the new token.

        `qkv` [B, 1, 3C] are the query, key and value of one new token in each row, for `num_heads` heads. The token
        attends to itself and to the tokens that its row of the cache holds. A full row overwrites its last entry. The
        cache's `lengths` stay. Return the attention's output [B, 1, C], before the output projection, in the dtype of
        `qkv`.
        """
        keys, values = self.cache.keys[layer], self.cache.values[layer]  # [B, H, S, D]
        q, k, v = (x[:, :, 0] for x in split_qkv(qkv.to(keys.dtype), num_heads))  # [B, H, D]
        out = ops.decode_attention_append(q, k, v, keys, values, self.positions[:, 0])  # [B, H, D]
        return out.to(qkv.dtype).flatten(1)[:, None]


class PromptPass:
    """How attention uses the cache for prompts: T new tokens for each of the cache's rows `first` to `first + B - 1`.

    Row b's tokens follow the `starts[b]` tokens that the row holds already. Padding on the right of a prompt is also
    written, as far as there is room, and overwritten by later tokens.
    """

    def __init__(self, cache: KVCache, starts: list[int], T: int, first: int = 0):
        self.cache = cache
        self.rows = slice(first, first + len(starts))
        self.starts = starts
        device = cache.keys.device
        positions = torch.tensor(starts, device=device)[:, None] + torch.arange(T, device=device)
        self.positions = positions.clamp(max=cache.length - 1)  # [B, T]; beyond is padding
        self.mask: Tensor | None = None
        if len(set(starts)) > 1:
            j = torch.arange(min(max(starts) + T, cache.length), device=device)
            self.mask = (j <= self.positions[:, :, None])[:, None]  # [B, 1, T, S']

    def attend(self, layer: int, qkv: Tensor, num_heads: int) -> Tensor:
        """Write the prompts' keys and values into the cache of the block `layer`, and attend causally from them.

        `qkv` [B, T, 3C] are the queries, keys and values of T new tokens in each row of this pass, for `num_heads`
        heads. They go behind the tokens that the row held when the pass was made, and also attend to those. What has no
        room in the cache is not written. The cache's `lengths` stay. Return the attention's output [B, T, C], before
        the output projection.
        """
        q, k, v = split_qkv(qkv, num_heads)  # [B, H, T, D]
        T = q.shape[2]
        keys, values = self.cache.keys[layer, self.rows], self.cache.values[layer, self.rows]
        for b, start in enumerate(self.starts):
            end = min(start + T, self.cache.length)
            keys[b, :, start:end] = k[b, :, : end - start]
            values[b, :, start:end] = v[b, :, : end - start]
        S = min(max(self.starts) + T, self.cache.length)
        out = ops.attention(
            q, keys[:, :, :S].to(q.dtype), values[:, :, :S].to(q.dtype), causal=self.mask is None, mask=self.mask
        )
        return out.transpose(1, 2).flatten(2)
