"""GPT-2 in PyTorch's own functions, as nanoGPT has it: what most people would train without this library.

Pre-norm blocks, F.scaled_dot_product_attention, F.cross_entropy on stored logits, the output layer tied to the token
embedding. The names of the parameters are those of `gpt_fast.GPTForCausalLM`, so that weights can be copied.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gpt_fast import GPTConfig


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        C = config.hidden_dim
        self.num_heads = config.num_heads
        self.dropout = config.attention_dropout
        self.in_proj = nn.Linear(C, 3 * C)
        self.out_proj = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        """Return causal self-attention of x [B, T, C], after the output projection, [B, T, C].

        In training mode, dropout acts on the attention probabilities.
        """
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.num_heads, -1).transpose(1, 2) for part in self.in_proj(x).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        return self.out_proj(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        C, eps = config.hidden_dim, config.layer_norm_eps
        self.layer_norm1 = nn.LayerNorm(C, eps)
        self.attention = Attention(config)
        self.layer_norm2 = nn.LayerNorm(C, eps)
        self.fc = nn.Linear(C, config.ff_dim)
        self.proj = nn.Linear(config.ff_dim, C)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.layer_norm1(x)))
        hidden = F.gelu(self.fc(self.layer_norm2(x)), approximate="tanh")
        return x + self.dropout(self.proj(hidden))


class PlainGPT(nn.Module):
    """tokens [B, T] → logits [B, T, V], or [B, V] of the last position; `loss` is that of the next tokens."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.token_emb = nn.Embedding(config.num_tokens, config.hidden_dim)
        self.pos_emb = nn.Embedding(config.seq_len, config.hidden_dim)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.hidden_dim, config.layer_norm_eps)
        self.output_layer = nn.Linear(config.hidden_dim, config.num_tokens, bias=False)
        self.output_layer.weight = self.token_emb.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                last = name.endswith(("out_proj.weight", ".proj.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * config.num_layers) ** 0.5 if last else 0.02)

    def hidden_states(self, tokens: Tensor) -> Tensor:
        """Return the hidden states [B, T, C] of int64 tokens [B, T], after the final norm."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.token_emb(tokens) + self.pos_emb(positions))
        for block in self.blocks:
            x = block(x)
        return self.final_norm(x)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits [B, T, V] of int64 tokens [B, T]; T is at most the model's number of positions."""
        return self.output_layer(self.hidden_states(tokens))

    def next_logits(self, tokens: Tensor) -> Tensor:
        """Return the logits [B, V] of the last position of tokens [B, T]."""
        return self.output_layer(self.hidden_states(tokens)[:, -1])

    def loss(self, tokens: Tensor) -> Tensor:
        """Return the mean cross-entropy of predicting each token of a row but the first, from the tokens before it.

        `tokens` is [B, T], T ≥ 2. The loss is in float32 at least.
        """
        labels = F.pad(tokens[:, 1:], (0, 1), value=-100)
        logits = self(tokens).flatten(0, 1)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels.flatten())

    def generate(self, tokens: Tensor, new: int) -> Tensor:
        """Generate greedily. Return tokens [B, T + new]: the prompt `tokens` [B, T], then `new` tokens.

        There is no cache: the whole context is computed again for each token. T + new - 1 must not exceed the model's
        positions.
        """
        for _ in range(new):
            tokens = torch.cat([tokens, self.next_logits(tokens).argmax(-1, keepdim=True)], dim=1)
        return tokens

    @torch.no_grad()
    def copy_weights(self, ours: nn.Module) -> "PlainGPT":
        """Copy the weights of `ours` into this model, converted to its dtype and device, and return this model.

        `ours` is a `GPTForCausalLM` of the same configuration, with pre-norm blocks.
        """
        theirs = ours.state_dict()
        for name, value in self.state_dict().items():
            value.copy_(theirs[name_of_ours(name)].view(value.shape))
        return self


def name_of_ours(name: str) -> str:
    """Return the name that the parameter `name` of a `PlainGPT` has in a `GPTForCausalLM`.

    For "blocks.0.attention.in_proj.weight" it is "trunk.decoders.0.multihead_attn.in_proj_weight".
    "output_layer.weight" has the same name in both.
    """
    for mine, theirs in _RENAMED:
        name = name.replace(mine, theirs)
    return name if name.startswith("output_layer.") else f"trunk.{name}"


_RENAMED = (
    ("pos_emb.weight", "pos_emb"),
    ("blocks.", "decoders."),
    ("attention.in_proj.", "multihead_attn.in_proj_"),
    ("attention.out_proj.", "multihead_attn.out_proj."),
    ("fc.", "ff.0."),
    (".proj.", ".ff.3."),
)
