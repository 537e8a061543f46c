"""The model and the tokenizer of a run folder."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ... import model_folder
from ...config import SPECIAL_TOKENS, GPTConfig
from ...data.tokenizer import UNKNOWN, load_tokenizer, vocabulary_size
from ...heads import HEADS, GPTForCausalLM, Head
from ...model_folder import AnyHead, read_config
from ..engine.distributed import World
from . import checkpoints
from .folder import check_run, check_weights, is_finished, read_record


def load_run(folder: Path, device: str) -> Head:
    """Return the model of a run folder with the head that it was saved with; of a stopped run, its last good one."""
    check_run(folder)
    name, _ = read_config(folder)
    if name not in HEADS:
        raise ValueError(f"{folder / 'config.json'}: head {name}; wanted one of {', '.join(HEADS)}")
    return load_head(HEADS[name], folder).to(device)


def load_head(head: type[AnyHead], folder: Path, **overrides: Any) -> AnyHead:
    """Return a head with the weights of a run: the final ones, or those of a stopped run's newest whole checkpoint.

    Warns if it takes a checkpoint. Raises `ValueError` if the weights have another size than the run's record says.
    """
    good = None
    if not is_finished(folder):
        good = checkpoints.newest_good(folder / checkpoints.FOLDER, warnings.warn)
    if good is None:
        check_weights(folder, read_record(folder), whole=False)
        return head.from_pretrained(folder, **overrides)
    path, _ = good
    warnings.warn(f"{folder}: a stopped run; its weights after update {checkpoints.step_of(path):,}", stacklevel=2)
    return model_folder.load(head, folder, overrides, _weights(path, *read_config(folder)))


def _weights(path: Path, name: str, config: GPTConfig) -> dict[str, Tensor]:
    """Return the weights in a checkpoint of a model with this head and configuration."""
    with torch.device("meta"):
        model = HEADS[name](config)
    tensors = {label: torch.empty_like(tensor, device="cpu") for label, tensor in model.named_parameters()}
    checkpoints.load(path, {f"model.{label}": tensor.detach() for label, tensor in tensors.items()}, World())
    return tensors


def load_generator(folder: Path, device: str) -> GPTForCausalLM:
    """The model of a run folder, which has to be one that generates text."""
    model = load_run(folder, device)
    if not isinstance(model, GPTForCausalLM):
        raise ValueError(
            f"{folder}: holds a {type(model).__name__}; wanted a GPTForCausalLM, which --objective clm trains"
        )
    return model


def run_tokenizer(folder: Path, model: Head) -> Tokenizer:
    """The tokenizer of a run folder, checked against the model's vocabulary. A model of another library has no rows for
    the special tokens, which are added to every tokenizer and of which no text consists."""
    tokenizer, rows = load_tokenizer(folder), model.config.num_tokens
    added = 0
    if model.config.extract_token is None:
        unknown = tokenizer.token_to_id(UNKNOWN)
        added = len(SPECIAL_TOKENS) + (unknown is not None and unknown >= rows)
    if vocabulary_size(tokenizer) > rows + added:
        wanted = f"{vocabulary_size(tokenizer)} tokens, the model has {rows}"
        raise ValueError(
            f"{folder}: tokenizer.json and model.safetensors do not belong together; the tokenizer has {wanted}"
        )
    return tokenizer
