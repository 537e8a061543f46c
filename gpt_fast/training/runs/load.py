"""The model and the tokenizer of a run folder."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ... import model_folder
from ..._files import sha256, write_json
from ...config import SPECIAL_TOKENS, GPTConfig
from ...data.tokenizer import UNKNOWN, load_tokenizer, vocabulary_size
from ...heads import HEADS, GPTForCausalLM, Head
from ...heads.classifiers import TaskHead
from ...model_folder import AnyHead, read_config
from ..engine.distributed import World
from . import adapters, checkpoints
from .folder import SETTINGS, check_run, check_weights, is_finished, read_record, with_special_tokens

# Fields of a task's head in its configuration, beside the trunk's.
_OF_A_TASK = (
    "num_labels", "label_names", "problem", "pooling", "lm_weight", "classifier_dropout", "classifier_bias",
)  # fmt: skip


def load_run(folder: Path, device: str) -> Head:
    """Return the model of a run folder on `device`, such as "cuda", with the head that it was saved with.

    The weights are the final ones, with a LoRA adapter merged in. A stopped run with checkpoints gives the weights of
    its newest undamaged checkpoint, with a warning. Raise `FileNotFoundError` if the folder holds no run, and
    `ValueError` if its files are damaged or name an unknown head.
    """
    check_run(folder)
    name, _ = read_config(folder)
    if name not in HEADS:
        raise ValueError(f"{folder / 'config.json'}: head {name}; expected one of {', '.join(HEADS)}")
    return load_head(HEADS[name], folder).to(device)


def load_head(head: type[AnyHead], folder: Path, **overrides: Any) -> AnyHead:
    """Return a model of class `head` with the weights of the run in `folder`, on the CPU.

    `overrides` replace fields of the configuration. If the run was saved with another head, layers of `head` that it
    lacks get random weights. The weights are the final ones, with a LoRA adapter merged in. A stopped run with
    checkpoints gives the weights of its newest undamaged checkpoint, with a warning. Raise `ValueError` if the weights
    have another size than the run's record says, or all checkpoints of a stopped run are damaged.
    """
    good = None
    if not is_finished(folder):
        good = checkpoints.newest_good(folder / checkpoints.FOLDER, warnings.warn)
    if good is None:
        record = read_record(folder)
        check_weights(folder, record, whole=False)
        if not record.get("lora"):
            return head.from_pretrained(folder, **overrides)
        return load_adapted(head, folder, record, folder, **overrides)
    path, manifest = good
    warnings.warn(f"{folder}: a stopped run; its weights after update {checkpoints.step_of(path):,}", stacklevel=2)
    record = manifest["state"].get("record", {})
    if record.get("lora"):
        return model_folder.load(head, folder, overrides, _merged(folder, record, path))
    return model_folder.load(head, folder, overrides, _weights(path, *read_config(folder)))


def load_adapted(head: type[AnyHead], folder: Path, record: dict[str, Any], where: Path, **overrides: Any) -> AnyHead:
    """Return a model of class `head` for the run in `folder`: the weights of its base run with its adapter merged in.

    The adapter's weights are the file adapter_model.safetensors in the folder `where`. `record` is the content of the
    run's run.json. `overrides` replace fields of the configuration.
    """
    return model_folder.load(head, folder, overrides, _merged(folder, record, where / adapters.WEIGHTS))


def write_merged(folder: Path, out: Path) -> Head:
    """Write the run in `folder`, which was trained with --lora-rank, into `out` with the adapter merged.

    Return the model, on the CPU. `out` is an empty folder. It gets the model's config.json and model.safetensors, and
    copies of tokenizer.json, settings.yaml and metrics.jsonl if the run has them. Its run.json is the run's without
    "lora", with the size and SHA-256 of the new weights. Raise `FileNotFoundError` if `folder` holds no run. Raise
    `ValueError` unless the run is finished and was trained with --lora-rank, and if its adapter was changed.
    """
    check_run(folder)
    record = read_record(folder)
    if not is_finished(folder) or not record.get("lora"):
        raise ValueError(f"{folder}: a stopped run; expected a finished one, --resume ends it")
    check_weights(folder, record, whole=True)
    model = load_run(folder, "cpu")
    model.save_pretrained(out)
    for name in ("tokenizer.json", SETTINGS, "metrics.jsonl"):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    path = out / "model.safetensors"
    del record["lora"]
    record["weights"] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    write_json(out / "run.json", record)
    return model


def load_for_task(source: Path, load: Callable[..., AnyHead], overrides: dict[str, Any]) -> AnyHead:
    """Return the model that `load(source, **overrides)` makes, with the special tokens that a task's input has.

    `source` is a run folder, from which the tokenizer is taken. Special tokens that the model lacks get new rows of its
    embeddings. The field "pooling" is removed from the dict `overrides` and set last, when the token that pooling may
    read exists.
    """
    pooling = {"pooling": overrides.pop("pooling")} if "pooling" in overrides else {}
    model = load(source, **overrides)
    with_special_tokens(model, load_tokenizer(source))
    model.config = model.trunk.config = model.config.replace(**pooling)
    return model


def adapter_base(head: type[AnyHead], source: Path, **overrides: Any) -> AnyHead:
    """Return a model of class `head` with the weights of the run in `source`. The caller adds an adapter to it.

    Each call returns the same weights, so that an adapter can be saved without them. Weights that the run lacks, such
    as embeddings of special tokens, are drawn on the CPU with the seed 0. torch's random state is restored afterwards.
    `overrides` replace fields of the run's configuration.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed the GPUs' generators too, for good
        return load_for_task(source, head.from_pretrained, overrides)


def _merged(folder: Path, record: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """Return {name: weight} of the run in `folder`: the weights of its base run with its adapter merged in.

    A tied output layer is left out. `record` is the content of the run's run.json. `path` is the adapter's file, or the
    folder of a checkpoint. Raise `ValueError` if the adapter or its base does not belong to the run's configuration,
    and `FileNotFoundError` if the base is missing.
    """
    name, config = read_config(folder)
    if name not in HEADS:
        raise ValueError(f"{folder / 'config.json'}: head {name}; expected one of {', '.join(HEADS)}")
    lora = record["lora"]
    overrides = {field: getattr(config, field) for field in _OF_A_TASK} if issubclass(HEADS[name], TaskHead) else {}
    model = adapter_base(HEADS[name], _base(folder, record), **overrides)
    if model.config != config:
        raise ValueError(f"{folder / 'config.json'}: is not that of the adapter's base with a head; was it changed?")
    if path.is_dir():
        live = adapters.live_shapes(model, lora["rank"])
        read = {f"model.{name}": torch.empty(shape) for name, shape in live.values()}
        checkpoints.load(path, read, World())
        tensors = {file: read[f"model.{name}"] for file, (name, _) in live.items()}
    else:
        tensors = model_folder.read_weights(path)
    adapters.merge(model, tensors, lora["rank"], lora["alpha"], path)
    state = dict(model.state_dict())
    if config.tied:
        state.pop("output_layer.weight", None)
    return state


def _base(folder: Path, record: dict[str, Any]) -> Path:
    """Return the folder of the run that the adapter in `folder` was trained on.

    `record` is the content of the run's run.json. The folder is the path in its field "from", or one of that name
    beside `folder`: the first whose weights have the SHA-256 in the record. Raise `FileNotFoundError` if neither has
    weights, and `ValueError` if none has the weights that the adapter began with.
    """
    source = Path(str(record.get("from")))
    there = [base for base in (source, folder.resolve().parent / source.name) if (base / "model.safetensors").is_file()]
    if not there:
        raise FileNotFoundError(
            f"{folder}: an adapter of {source}, which is no run folder; expected the one it began with"
        )
    for base in there:
        if sha256(base / "model.safetensors") == record["lora"]["base_sha256"]:
            return base
    raise ValueError(f"{there[0]}: has other weights than the adapter in {folder} was trained on")


def _weights(path: Path, name: str, config: GPTConfig) -> dict[str, Tensor]:
    """Return {name: weight} of the parameters in the checkpoint at `path`, on the CPU.

    `name` is the model's class, a key of `HEADS`, and `config` is its configuration. Raise `ValueError` if the
    checkpoint lacks a parameter or has one of another shape.
    """
    with torch.device("meta"):
        model = HEADS[name](config)
    tensors = {label: torch.empty_like(tensor, device="cpu") for label, tensor in model.named_parameters()}
    checkpoints.load(path, {f"model.{label}": tensor.detach() for label, tensor in tensors.items()}, World())
    return tensors


def load_generator(folder: Path, device: str) -> GPTForCausalLM:
    """Return the model of a run folder on `device`. Raise `ValueError` if it is not a causal language model.

    A stopped run gives the weights of its newest undamaged checkpoint, with a warning. Raise `FileNotFoundError` if the
    folder holds no run.
    """
    model = load_run(folder, device)
    if not isinstance(model, GPTForCausalLM):
        raise ValueError(
            f"{folder}: holds a {type(model).__name__}; expected a GPTForCausalLM, which --objective clm trains"
        )
    return model


def run_tokenizer(folder: Path, model: Head) -> Tokenizer:
    """Return the tokenizer of a run folder. Raise `ValueError` if it has more tokens than `model` has embeddings.

    If `model` has no extract token, the tokens that this library adds to every tokenizer are not counted: its special
    tokens, and perhaps `<|unk|>`. Such a model comes from another library and has no embeddings for them.
    """
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
