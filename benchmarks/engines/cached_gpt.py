"""PlainGPT with its key/value cache as inputs and outputs, as graph compilers take it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models.plain_gpt import PlainGPT


def greedy(logits: Callable[[Tensor], Tensor], tokens: Tensor, new: int) -> Tensor:
    """Generate greedily. Return tokens [B, T + new]: the prompt `tokens` [B, T], then `new` tokens.

    `logits` is a function that runs a model on tokens. It remembers the tokens of all its earlier calls, and returns
    the logits [B, V] after the last token. It is called with the prompt first, then with each new token [B, 1] but the
    last.
    """
    texts = [tokens]
    for _ in range(new):
        texts.append(logits(texts[-1]).argmax(-1, keepdim=True))
    return torch.cat(texts, dim=1)


class CachedGPT(nn.Module):
    """GPT that reads tokens and the cache of earlier tokens: (tokens, cache) → (logits, cache).

    tokens [B, T] and keys and values [B, H, P, D] of every layer give logits [B, V] after the last token, and keys and
    values [B, H, P + T, D].
    """

    def __init__(self, model: PlainGPT, masks: bool):
        """Wrap `model`, whose weights are shared.

        With `masks`, attention gets an explicit causal mask. Without, attention is only flagged as causal, for engines
        that align the causal mask to the last key. PyTorch itself aligns the flag's mask to the first key, so with a
        cache it needs `masks`.
        """
        super().__init__()
        self.model = model
        self.masks = masks

    def forward(self, tokens: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """Return (logits [B, V] after the last token, then keys and values [B, H, P + T, D] of every layer).

        `tokens` is [B, T]. `past` is the cache of P earlier tokens, P ≥ 0: keys, then values, [B, H, P, D] each, of the
        first layer, then of the second, and so on. The result has the caches in the same order. No argument is changed,
        and there is no dropout.
        """
        T, P = tokens.shape[1], past[0].shape[2]
        places = torch.arange(P, P + T)
        seen = places[:, None] >= torch.arange(P + T) if self.masks else None  # [T, P + T]
        x = self.model.token_emb(tokens) + self.model.pos_emb(places)
        caches = []
        blocks: Any = self.model.blocks
        for block, keys, values in zip(blocks, past[::2], past[1::2], strict=True):
            attention = block.attention
            qkv = attention.in_proj(block.layer_norm1(x)).split(x.shape[2], dim=2)
            q, k, v = (part.unflatten(2, (attention.num_heads, -1)).transpose(1, 2) for part in qkv)  # [B, H, T, D]
            k, v = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=not self.masks)
            x = x + attention.out_proj(y.transpose(1, 2).flatten(2))
            x = x + block.proj(F.gelu(block.fc(block.layer_norm2(x)), approximate="tanh"))
            caches += [k, v]
        return self.model.output_layer(self.model.final_norm(x[:, -1])), *caches

    def example(self) -> tuple[Tensor, ...]:
        """Return arguments of `forward` to trace it with, all zeros: int64 tokens [2, 3], and a cache of five tokens.

        The cache is keys [2, H, 5, D], then values of the same shape, for each layer, in float32.
        """
        config = self.model.config
        shape = 2, config.num_heads, 5, config.hidden_dim // config.num_heads
        past = [torch.zeros(shape) for _ in range(2 * config.num_layers)]  # the exporter would merge equal tensors
        return torch.zeros(2, 3, dtype=torch.int64), *past
