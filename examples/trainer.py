"""Train an accelerated GPT-2 with transformers' Trainer, offline: `python examples/trainer.py`.

A small random model learns the bytes of a file of Python's standard library. Evaluation asks for logits and gets them.
Training computes its loss without logits.
"""

import argparse
import inspect
import sys

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import gpt_fast

LENGTH = 64


class Blocks(Dataset):
    """Bytes of a source file as sequences of LENGTH tokens; the labels are the tokens, which the model shifts."""

    def __init__(self, module):
        tokens = torch.tensor(list(inspect.getsource(module).encode()))
        self.rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def main(out: str, steps: int = 100, bf16: bool = False) -> tuple[float, float]:
    """Train the model. Return its loss on other text before and after training."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "n_positions": LENGTH, "n_embd": 64, "n_layer": 2, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))
    print(gpt_fast.accelerate(model, strict=True))
    arguments = TrainingArguments(
        output_dir=out, max_steps=steps, per_device_train_batch_size=8, learning_rate=3e-3, bf16=bf16, save_steps=steps,
        report_to=[], disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Blocks(argparse), eval_dataset=Blocks(inspect))
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model(out)  # a transformers model like any other: from_pretrained reads it
    print(f"loss on other text: {before:.3f} before, {after:.3f} after {steps} steps")
    return before, after


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/examples/trainer")
