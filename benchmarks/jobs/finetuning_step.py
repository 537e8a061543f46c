"""Benchmark of a fine-tuning step of a classifier, against a plain model and transformers."""

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

import gpt_fast
from benchmarks.models.counts import training
from benchmarks.models.job import hf_model
from benchmarks.models.plain_gpt import PlainGPT
from benchmarks.models.training import Loss, pair_bytes, training_peers
from benchmarks.topic import Case, Topic, Work, every, ids, main_dtype

JOB = "finetuning_step"


def inputs(case: Case) -> tuple:
    """Return random (tokens [B, T], labels [B]) in int64 on the case's device; B and T are sizes of the case.

    No row has padding, so that every implementation does the same work. A label is 0 or 1.
    """
    B, T = case.size["B"], case.size["T"]
    return ids(case, case.config.num_tokens, B, T), ids(case, 2, B)


def work(case: Case, passes: str) -> Work:
    """Return the least bytes and FLOPs of one training step, as a `Work`; `passes` is always "step" and is not used.

    AdamW reads and writes weights, gradients and moments: these are the bytes. A step has the FLOPs of three forward
    passes. The output layer of a language model is left out, because a classifier scores one position of each row, with
    a few labels.
    """
    return training(case.config, case.size["B"], case.size["T"], output_rows=0)


def cases(device: str) -> Iterator[Case]:
    """Yield the one case to benchmark on a device, "cpu" or "cuda": GPT-2 124M with dropout, in quick runs too.

    A step has 32 rows of 256 tokens in bfloat16 on a GPU, and 4 rows of 64 tokens in float32 on a CPU.
    """
    B, T = (32, 256) if device == "cuda" else (4, 64)
    yield from every(JOB, device, [{"model": "gpt2", "B": B, "T": T}], main_dtype(device), (0.1,), quick=True)


# ---- implementations


def ours(case: Case) -> tuple[nn.Module, Loss]:
    """Return (gpt_fast's classifier, a function from tokens [B, T] and labels [B] to its loss).

    The model has random float32 weights, and the configuration and device of `case`.
    """
    model = gpt_fast.GPTForSequenceClassification(case.config).to(case.device)
    return model, lambda tokens, labels: model(tokens, labels).loss


class PlainClassifier(nn.Module):
    """`PlainGPT` with a linear layer on the last position."""

    def __init__(self, case: Case):
        super().__init__()
        self.trunk = PlainGPT(case.config)
        self.dropout = nn.Dropout(case.config.classifier_dropout)
        self.classifier = nn.Linear(case.config.hidden_dim, case.config.num_labels)

    def loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy of the labels [B], scored at the last position of tokens [B, T]."""
        return F.cross_entropy(self.classifier(self.dropout(self.trunk.hidden_states(tokens)[:, -1])), labels)


def plain(case: Case) -> tuple[nn.Module, Loss]:
    """Return (the classifier in plain PyTorch, a function from tokens [B, T] and labels [B] to its loss).

    The model has random float32 weights, and the configuration and device of `case`.
    """
    model = PlainClassifier(case).to(case.device)
    return model, model.loss


def hugging_face(attention: str, case: Case) -> tuple[nn.Module, Loss]:
    """Return (transformers' classifier, a function from tokens [B, T] and labels [B] to its loss).

    The model has random float32 weights, and the configuration and device of `case`. `attention` is transformers'
    attention implementation, "eager" or "sdpa".
    """
    model = hf_model("GPT2ForSequenceClassification", case, attention).to(case.device)
    return model, lambda tokens, labels: model(tokens, labels=labels, use_cache=False).loss


TOPIC = Topic(
    JOB, "train", inputs, work, cases,
    peers=training_peers(ours, plain, hugging_face),
    title="fine-tuning step of a classifier",
    passes=("step",),
    tests=("model/test_model.py", "model/test_heads.py", "model/test_devices.py"),
    tokens=lambda case: case.size["B"] * case.size["T"],
    pair_bytes=pair_bytes,
)  # fmt: skip
