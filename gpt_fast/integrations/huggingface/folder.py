"""Model folders of this library to folders of transformers and back."""

import shutil
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, processors

from gpt_fast_settings.documents import read_object

from ... import model_folder
from ..._files import new_folder
from ...config import GPTConfig
from ...heads import HEADS, GPTForSequenceClassification
from . import convert

_NAMES = {"clm": "GPTForCausalLM", "mlm": "GPTForMaskedLM", "classifier": "GPTForSequenceClassification"}
# Our special tokens under transformers' names, for its tokenizer.
_SPECIAL = {
    "pad_token": "pad_token", "mask_token": "mask_token", "start_token": "bos_token", "end_token": "eos_token",
}  # fmt: skip
# Files that transformers keeps beside the model, and this library in a folder inside its own.
EXTRAS = "transformers"
_EXTRAS = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def convert_folder(source: Path, out: Path, head: str | None = None, to: str | None = None) -> dict[str, Any]:
    """Write the model in the folder `source` to a new folder `out` in the other library's format, whole or not at all.

    `to` names the format of `out`, "gpt-fast" or "transformers"; None means the one that `source` does not have. `head`
    ("clm", "mlm" or "classifier") chooses this library's head for a model of transformers; None takes the head that
    fits the saved class. The result has the keys "model" (class that was written), "from" (class that was read) and
    "numbers" (parameters). If `out` has transformers' format, it also has "left_out", a list of what transformers'
    class cannot hold.

    Raises `ValueError` for a folder of neither library, a model that the other does not have, or an unknown `head`. It
    also does so for a `head` with a folder of this library, and for a `source` that has the format `to` already. Raises
    `OSError` if a file is missing or `out` exists.
    """
    config_path = source / model_folder.CONFIG
    if not config_path.is_file():
        raise FileNotFoundError(f"{source}: no {model_folder.CONFIG} there; expected a model's folder")
    if out.exists():
        raise FileExistsError(f"--out {out}: exists already; expected a folder that does not")
    config = read_object(config_path)
    is_theirs = convert.is_transformers_folder(config)
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
    """Write transformers' model in `source`, with its tokenizer, to the folder `made` in this library's format.

    `config` is the content of its config.json. `head` is "clm", "mlm" or "classifier", or None for the head that fits
    the saved class. Other files of transformers' tokenizer go into the folder "transformers" inside `made`. The result
    has the keys "model" (class that was written), "from" (class that was read) and "numbers" (parameters). Raises
    `ValueError` for an unknown `head`, or if None is given and no head fits.
    """
    architecture = next(iter(config.get("architectures") or []), "GPT2LMHeadModel")
    if head is not None and head not in _NAMES:
        raise ValueError(f"--head {head}: expected one of {', '.join(_NAMES)}")
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
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=True)
        tokenizer.backend_tokenizer.save(str(made / "tokenizer.json"))
    _copy_extras(source, made / EXTRAS)
    return {"model": name, "from": architecture, "numbers": model.num_parameters()}


def _to_transformers(source: Path, made: Path) -> dict[str, Any]:
    """Write this library's model in `source`, with its tokenizer, to the folder `made` in transformers' format.

    The result has the keys "model" (class that was written), "from" (class that was read), "numbers" (parameters) and
    "left_out" (a list of what transformers' class cannot hold). Raises `ValueError` for a model that transformers does
    not have.
    """
    name, config = model_folder.read_config(source)
    if name not in HEADS:
        raise ValueError(f"{source}: holds a {name}; expected one of {', '.join(HEADS)}")
    model = HEADS[name].from_pretrained(source)
    model, left_out = _as_transformers_reads(model)
    theirs = model.to_hf()
    theirs.save_pretrained(made)
    if (source / "tokenizer.json").is_file():
        if (source / EXTRAS / "tokenizer_config.json").is_file():
            shutil.copy(source / "tokenizer.json", made)
        else:
            _new_tokenizer(source / "tokenizer.json", config).save_pretrained(made)
    _copy_extras(source / EXTRAS, made)
    return {
        "model": type(theirs).__name__, "from": name, "numbers": theirs.num_parameters(), "left_out": left_out,
    }  # fmt: skip


def _as_transformers_reads(model: Any) -> tuple[Any, list[str]]:
    """Return (model, left_out): the model in a form that transformers' classifier can hold, and what that form lacks.

    A classifier with pooling "extract" becomes a new one with the same weights and pooling "last". Its input ends in
    the extract token, so both read the same token. The new one has no language-model loss (`lm_weight` is 0). If
    `model` has one, `left_out` names this loss and, if it is not tied to the token embedding, the output layer. Other
    models are returned as they are, with an empty list.
    """
    config: GPTConfig = model.config
    if not isinstance(model, GPTForSequenceClassification) or config.pooling != "extract":
        return model, []
    plain = GPTForSequenceClassification(config.replace(pooling="last", lm_weight=0.0))
    names = plain.state_dict().keys()
    plain.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name in names})
    left_out = [f"the joint loss (lm_weight {config.lm_weight:g})"] if config.lm_weight else []
    if config.lm_weight and not model.is_tied():
        left_out.append("output_layer")
    return plain.to(next(model.parameters()).dtype).train(model.training), left_out


def _new_tokenizer(path: Path, config: GPTConfig) -> Any:
    """Return transformers' tokenizer with the content of this library's tokenizer.json at `path`.

    Its special tokens (pad, mask, bos, eos) are the pad, mask, start and end tokens of `config`, as far as it has them.
    For a model with pooling "extract" it puts the start, delimiter and extract tokens around texts, as in training.
    """
    tokenizer = Tokenizer.from_file(str(path))
    tokens = {ours: tokenizer.id_to_token(getattr(config, ours) or 0) for ours in _SPECIAL}
    special = {theirs: tokens[ours] for ours, theirs in _SPECIAL.items() if getattr(config, ours) is not None}
    if config.pooling == "extract":
        ids = [config.start_token, config.delimiter_token, config.extract_token]
        if None not in ids:
            start, between, extract = (tokenizer.id_to_token(token) for token in ids if token is not None)
            tokenizer.post_processor = processors.TemplateProcessing(
                single=[start, "$A", extract],
                pair=[start, "$A", between, "$B", extract],
                special_tokens=list(zip((start, between, extract), ids, strict=True)),
            )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=config.seq_len, **special)


def _copy_extras(source: Path, target: Path) -> None:
    """Copy transformers' tokenizer and generation files, as far as `source` has them, to the folder `target`.

    `target` is made if there is a file to copy. The model's config.json, its weights and tokenizer.json are not copied.
    """
    for name in _EXTRAS:
        if (source / name).is_file():
            target.mkdir(exist_ok=True)
            shutil.copy(source / name, target)
