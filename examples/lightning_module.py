"""Train an accelerated GPT-1 with Lightning, offline: `python examples/lightning_module.py`.

A small random model learns the bytes of a file of Python's standard library, with gradient checkpointing, which
transformers' GPT-1 does not have by itself.
"""

import argparse
import inspect

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

import gpt_fast

LENGTH = 64


class LanguageModel(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        sizes = {"vocab_size": 256, "n_positions": LENGTH, "n_embd": 64, "n_layer": 2, "n_head": 4}
        self.model = OpenAIGPTLMHeadModel(OpenAIGPTConfig(**sizes))
        gpt_fast.accelerate(self, strict=True)  # finds the model in the module
        self.model.activation_checkpointing_enable()
        self.losses: list[float] = []

    def training_step(self, batch, index):
        (tokens,) = batch
        loss = self.model(tokens, labels=tokens).loss
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(steps: int = 100) -> list[float]:
    """Train the model, and return the loss of every step."""
    lightning.seed_everything(0, verbose=False)
    tokens = torch.tensor(list(inspect.getsource(argparse).encode()))
    rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    module = LanguageModel()
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="auto", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(rows), batch_size=8, shuffle=True))
    print(f"loss: {module.losses[0]:.3f} at first, {module.losses[-1]:.3f} after {steps} steps")
    return module.losses


if __name__ == "__main__":
    main()
