"""Checkpoints of nanoGPT and llm.c to model folders of this library, and model folders to nanoGPT's `ckpt.pt`."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from gpt_fast_settings.documents import read_object

from ... import model_folder
from ..._files import finite, new_folder, write_json
from ...config import SPECIAL_TOKENS
from ...data.tokenizer import letters_tokenizer, load_tokenizer, save_tokenizer
from ...heads import GPTForCausalLM
from . import checkpoint, llmc, weights

PROGRESS = "nanogpt.json"  # what ckpt.pt has besides the model: step, best validation loss, settings
_ZIP = b"PK\x03\x04"


def from_checkpoint(
    source: Path,
    out: Path,
    *,
    tokenizer: Path | None = None,
    characters: Path | None = None,
    heads: int | None = None,
    activation: str | None = None,
) -> dict[str, Any]:
    """Write the model in a file of nanoGPT, minGPT, build-nanogpt or llm.c as the folder `out`, whole or not at all.

    `tokenizer` is a tokenizer.json. `characters` is the text whose characters are the vocabulary of a character-level
    model. At most one of the two may be given. `heads` and `activation` are needed for a bare state dict, which does
    not hold them. Both are refused for llm.c, and `heads` for a file with `model_args`.

    The result has the keys "model", "from" ("nanoGPT" or "llm.c"), "numbers" (parameters), "dtype", "activation",
    "tied", "tokenizer" (True if one was written) and "left_out" (entries of the file that are not used). Raises
    `ValueError` for a file that is none of these or does not fit the options, `OSError` if `out` exists or `source`
    cannot be read.
    """
    _check_new(out)
    head = _first_bytes(source)
    progress: dict[str, Any] | None = None
    left_out: list[str] = []
    if llmc.magic(head) is not None:
        given = {"--heads": heads, "--activation": activation}
        for option, value in given.items():
            if value is not None:
                raise ValueError(f"{option} {value}: {source} is a file of llm.c, which tells; leave the option out")
        state, config = llmc.read(source)
        kind, model = "llm.c", weights.build(GPTForCausalLM, state, config)
    else:
        loaded = checkpoint.read(source)
        kind, progress, left_out = "nanoGPT", loaded.progress, loaded.left_out
        try:
            args = _model_args(loaded, heads, activation)
            overrides = {} if activation is None else {"activation": activation}
            model = weights.from_nanogpt(GPTForCausalLM, loaded.state_dict, args, overrides)
        except ValueError as error:
            raise ValueError(f"{source}: {str(error).removeprefix(f'{weights.USER}: ')}") from None
    rows = model.config.num_tokens
    chosen = _tokenizer(tokenizer, characters, rows)
    if chosen is not None:
        model.config = model.trunk.config = model.config.replace(start_token=_start_token(chosen, rows))
    with new_folder(out) as made:
        model.save_pretrained(made)
        if chosen is not None:
            save_tokenizer(chosen, made / "tokenizer.json")
        if progress:
            write_json(made / PROGRESS, finite(progress))
    return {
        "model": "GPTForCausalLM", "from": kind, "numbers": model.num_parameters(),
        "dtype": str(model.trunk.pos_emb.dtype).removeprefix("torch."), "activation": model.config.activation,
        "tied": model.is_tied(), "tokenizer": chosen is not None, "left_out": left_out,
    }  # fmt: skip


def to_checkpoint(source: Path, out: Path) -> dict[str, Any]:
    """Write the model in the folder `source` as nanoGPT's checkpoint, the file `out`, whole or not at all.

    Missing parent folders of `out` are created. The result has the keys "model" ("nanoGPT"), "from" (class of the
    model) and "numbers" (parameters). Raises `ValueError` for a model that nanoGPT cannot hold, `OSError` if a file of
    `source` is missing or `out` exists.
    """
    _check_new(out)
    name, _ = model_folder.read_config(source)
    if name != GPTForCausalLM.__name__:
        raise ValueError(f"{source}: holds a {name}; expected a GPTForCausalLM, the only model that nanoGPT has")
    model = GPTForCausalLM.from_pretrained(source)
    try:
        state, model_args = model.to_nanogpt()
    except ValueError as error:
        raise ValueError(f"{source}: {str(error).removeprefix('gpt_fast.to_nanogpt: ')}") from None
    missing = [folder for folder in out.parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write(out, state, model_args, _progress(source))
    except BaseException:
        for folder in missing:
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()
        raise
    return {"model": "nanoGPT", "from": name, "numbers": model.num_parameters()}


def _check_new(out: Path) -> None:
    """Raise `FileExistsError` if `out` exists."""
    if out.exists():
        raise FileExistsError(f"--out {out}: exists already; expected a path that does not")


def _first_bytes(source: Path) -> bytes:
    """Return the first 8 bytes of the file `source`; raise `ValueError` if neither `torch.save` nor llm.c wrote it."""
    with source.open("rb") as file:
        head = file.read(8)
    if llmc.magic(head) is None and not head.startswith(_ZIP):
        hint = " (a pickle without torch.save's archive is not read)" if head.startswith(b"\x80") else ""
        raise ValueError(f"{source}: no checkpoint{hint}; expected nanoGPT's ckpt.pt or llm.c's model_*.bin")
    return head


def _model_args(loaded: checkpoint.Checkpoint, heads: int | None, activation: str | None) -> Any:
    """Return the `model_args` of the checkpoint `loaded`, or make them for a bare state dict by its shapes and `heads`.

    `heads` is the number of attention heads, or None. `activation` is this library's name of an activation, such as
    "gelu", or None. It does not enter the result: this function only checks that it is given where the file implies
    none. Raises `ValueError` if `heads` is given although there are `model_args`, or if a bare state dict comes without
    `heads` or without `activation`. Raises it, too, if `model_args` lack "bias" or "dropout", as old ones do, and
    `activation` is None.
    """
    args = loaded.model_args
    if args is not None:
        if heads is not None:
            raise ValueError(f"has model_args, which tell the heads; leave --heads {heads} out")
        if activation is None and isinstance(args, dict) and not {"bias", "dropout"} <= args.keys():
            raise ValueError(
                "model_args has not both bias and dropout, so nanoGPT of 2023-05 or later did not write it; "
                "expected --activation gelu_tanh (minGPT, build-nanogpt, early nanoGPT) or --activation gelu"
            )
        return args
    if heads is None or activation is None:
        raise ValueError(
            "has no model_args, so nothing tells heads and activation; expected --heads, and --activation gelu_tanh "
            "(minGPT, build-nanogpt) or --activation gelu (nanoGPT)"
        )
    return weights.model_args_of(loaded.state_dict, heads)


def _tokenizer(path: Path | None, characters: Path | None, rows: int) -> Tokenizer | None:
    """Return the tokenizer in the file `path`, or one for the characters in the file `characters`.

    The result is None if both are None. Raises `ValueError` if both are given. It also does so if the tokenizer has ids
    beyond the model's `rows` token embeddings, its special tokens aside, or if the characters are not exactly `rows`.
    """
    if path is not None and characters is not None:
        raise ValueError(f"--tokenizer {path} and --characters {characters}: expected one of them")
    if characters is not None:
        return _characters_tokenizer(characters, rows)
    if path is None:
        return None
    tokenizer = load_tokenizer(path)
    ids = tokenizer.get_vocab(with_added_tokens=True)
    size = 1 + max((i for token, i in ids.items() if token not in SPECIAL_TOKENS.values()), default=-1)
    if size > rows:
        raise ValueError(f"--tokenizer {path}: has {size} tokens; expected at most {rows}, the model's vocabulary")
    return tokenizer


def _start_token(tokenizer: Tokenizer, rows: int) -> int | None:
    """Return the id of "<|endoftext|>", the token between GPT-2's documents, in the tokenizer.

    The result is None if the tokenizer lacks the token, or if the id is not below `rows`, the number of token
    embeddings.
    """
    token = tokenizer.token_to_id("<|endoftext|>")
    return token if token is not None and token < rows else None


def _characters_tokenizer(path: Path, rows: int) -> Tokenizer:
    """Return a tokenizer whose tokens are the different characters of the text in the file `path`, in sorted order.

    Raises `ValueError` if the text is not UTF-8 or has another number of different characters than `rows`, the size of
    the model's vocabulary.
    """
    try:
        letters = sorted(set(path.read_text(encoding="utf-8")))
    except UnicodeDecodeError as error:
        raise ValueError(f"--characters {path}: not UTF-8 (byte {error.start}); expected the training text") from None
    if len(letters) != rows:
        raise ValueError(
            f"--characters {path}: has {len(letters)} different characters; expected {rows}, the model's vocabulary"
        )
    return letters_tokenizer(letters)


def _progress(source: Path) -> dict[str, Any]:
    """Return entries of nanoGPT's checkpoint that tell how far the model in the folder `source` was trained.

    If the folder was made from a checkpoint, its nanogpt.json holds "iter_num" (step), "best_val_loss" and "config"
    (settings). The result has the entries that are there. Otherwise "iter_num" and "best_val_loss" are "steps" and
    "valid_loss" in run.json of the run that trained the model. The result is empty without either file.
    """
    if (source / PROGRESS).is_file():
        return checkpoint.progress_of(source / PROGRESS, read_object(source / PROGRESS))
    record = read_object(source / "run.json") if (source / "run.json").is_file() else {}
    names = {"steps": "iter_num", "valid_loss": "best_val_loss"}
    return {theirs: record[ours] for ours, theirs in names.items() if isinstance(record.get(ours), int | float)}
