"""Train an accelerated GPT-2 in your own loop with Hugging Face Accelerate: `python examples/accelerate_loop.py`.

A small random model learns the bytes of a file of Python's standard library in bfloat16 mixed precision. After
unwrapping and `gpt_fast.restore`, the model is transformers' own again.
"""

import argparse
import inspect

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel

import gpt_fast

LENGTH = 64


def main(steps: int = 100, mixed_precision: str = "bf16") -> tuple[GPT2LMHeadModel, list[float]]:
    """Train the model. Return it, restored to transformers' own, and the loss of every step."""
    set_seed(0)
    tokens = torch.tensor(list(inspect.getsource(argparse).encode()))
    rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    sizes = {"vocab_size": 256, "n_positions": LENGTH, "n_embd": 64, "n_layer": 2, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))
    gpt_fast.accelerate(model, strict=True)  # before `prepare`, which wraps the model's forward
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    accelerator = Accelerator(mixed_precision=mixed_precision, gradient_accumulation_steps=2)
    loader = DataLoader(TensorDataset(rows), batch_size=8, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    losses: list[float] = []
    while len(losses) < steps:
        for (batch,) in loader:
            with accelerator.accumulate(model):
                loss = model(batch, labels=batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(float(loss.detach()))
            if len(losses) == steps:
                break
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    gpt_fast.restore(model)
    print(f"loss: {losses[0]:.3f} at first, {losses[-1]:.3f} after {steps} steps")
    return model, losses


if __name__ == "__main__":
    main()
