"""Model folders of this library to folders of transformers and back."""

import json
import shutil
from pathlib import Path
from typing import Any

import transformers

from ... import model_folder
from ..._files import new_folder
from ...config import SPECIAL_TOKENS
from ...heads import HEADS
from . import convert

_NAMES = {"clm": "GPTForCausalLM", "mlm": "GPTForMaskedLM", "classifier": "GPTForSequenceClassification"}
# Our special tokens under transformers' names, for its tokenizer.
_SPECIAL = {"pad_token": "pad_token", "mask_token": "mask_token", "start_token": "bos_token"}


def convert_folder(source: Path, out: Path, head: str | None = None, to: str | None = None) -> dict[str, Any]:
    """Write the model in `source` to `out` in the other library's format, whole or not at all; says what it was.

    `to` names that format, "gpt-fast" or "transformers"; None takes it from the folder. Raises `ValueError` for a
    folder of neither library, a model that the other does not have, an unknown `head`, a folder that has the format
    `to` already; `OSError` where something is missing, or `out` exists.
    """
    config_path = source / model_folder.CONFIG
    if not config_path.is_file():
        raise FileNotFoundError(f"{source}: no {model_folder.CONFIG} there, wanted a model's folder")
    if out.exists():
        raise FileExistsError(f"--out {out}: exists already, wanted a folder that does not")
    config = json.loads(config_path.read_text(encoding="utf-8"))
    is_theirs = isinstance(config, dict) and convert.is_transformers_folder(config)
    if to is not None and to != ("gpt-fast" if is_theirs else "transformers"):
        held = "a folder of transformers" if is_theirs else "a folder of gpt-fast"
        raise ValueError(f"--to {to}: {source} is {held} already; leave --to out to convert it")
    with new_folder(out) as made:
        if is_theirs:
            result = _from_transformers(source, made, config, head)
        elif head is not None:
            raise ValueError(f"--head {head}: {source} is no transformers folder, whose head could be chosen")
        else:
            result = _to_transformers(source, made)
    return result


def _from_transformers(source: Path, made: Path, config: dict[str, Any], head: str | None) -> dict[str, Any]:
    architecture = next(iter(config.get("architectures") or []), "GPT2LMHeadModel")
    if head is not None and head not in _NAMES:
        raise ValueError(f"--head {head}: wanted one of {', '.join(_NAMES)}")
    name = convert.our_class(architecture, config.get("is_causal", True)) if head is None else _NAMES[head]
    if name not in HEADS:
        raise ValueError(
            f"{source} holds a {architecture}, which has none of this library's heads; --head {', '.join(_NAMES)} "
            "puts one on its trunk"
        )
    model = HEADS[name].from_hf(source)
    model.save_pretrained(made)
    if (source / "tokenizer.json").is_file():
        shutil.copy(source / "tokenizer.json", made)
    elif (source / "vocab.json").is_file():
        transformers.AutoTokenizer.from_pretrained(source).backend_tokenizer.save(str(made / "tokenizer.json"))
    return {"model": name, "from": architecture, "numbers": model.num_parameters()}


def _to_transformers(source: Path, made: Path) -> dict[str, Any]:
    name, config = model_folder.read_config(source)
    if name not in HEADS:
        raise ValueError(f"{source}: holds a {name}, wanted one of {', '.join(HEADS)}")
    model = HEADS[name].from_pretrained(source)
    theirs = model.to_hf()
    theirs.save_pretrained(made)
    if (source / "tokenizer.json").is_file():
        special = {
            _SPECIAL[ours]: token for ours, token in SPECIAL_TOKENS.items()
            if ours in _SPECIAL and getattr(config, ours) is not None
        }  # fmt: skip
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(source / "tokenizer.json"), model_max_length=config.seq_len, **special
        )
        tokenizer.save_pretrained(made)
    return {"model": type(theirs).__name__, "from": name, "numbers": model.num_parameters()}
