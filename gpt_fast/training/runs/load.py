"""The model and the tokenizer of a run folder."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from ...config import SPECIAL_TOKENS
from ...data.tokenizer import UNKNOWN, load_tokenizer, vocabulary_size
from ...heads import HEADS, GPTForCausalLM, Head
from ...model_folder import read_config
from .folder import check_run


def load_run(folder: Path, device: str) -> Head:
    """The model of a run folder with the head that it was saved with."""
    check_run(folder)
    name, _ = read_config(folder)
    if name not in HEADS:
        raise ValueError(f"{folder / 'config.json'}: head {name}; wanted one of {', '.join(HEADS)}")
    return HEADS[name].from_pretrained(folder).to(device)


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
