"""Model folders: `config.json` and `model.safetensors`, read and written whole or not at all. Nothing is unpickled."""

import json
import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ._files import replacing, write_json
from .config import GPTConfig

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_FORMAT = "gpt_fast"
_TIED = "output_layer.weight"  # not stored where it is the token embedding

AnyHead = TypeVar("AnyHead", bound=Any)


def as_path(function: str, directory: Any) -> Path:
    """Return a folder's name as a path; raise `TypeError` for what is no name."""
    if not isinstance(directory, str | os.PathLike):
        raise TypeError(
            f"gpt_fast.{function}: directory is of type {type(directory).__name__}; expected a path, str or os.PathLike"
        )
    return Path(directory)


def save(head: Any, directory: Path) -> None:
    """Write a head's configuration and weights; the configuration last, so that a folder that has it is complete."""
    state, config = head.state_dict(), head.config
    if _TIED in state and config.tied != head.is_tied():  # tied or untied after the model was made
        config = config.replace(tied=head.is_tied())
    _check_names(head, state, config)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    if config.tied:
        tensors.pop(_TIED, None)
    try:
        with replacing(directory / WEIGHTS) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})  # two entries would have no fixed order
    except SafetensorError as error:
        raise OSError(f"{directory / WEIGHTS}: cannot be written: {error}") from error
    write_config(head, config, directory)


def write_config(head: Any, config: GPTConfig, directory: Path) -> None:
    """Write the configuration of a head, without its weights."""
    write_json(directory / CONFIG, {"format": _FORMAT, "head": type(head).__name__, **config.to_dict()})


def _check_names(head: Any, state: dict[str, Tensor], config: GPTConfig) -> None:
    """Raise `ValueError` for a state that a model of the configuration does not have."""
    with torch.device("meta"):
        wanted = {name: tensor.shape for name, tensor in type(head)(config).state_dict().items()}
    spare, missing = sorted(state.keys() - wanted.keys()), sorted(wanted.keys() - state.keys())
    if spare or missing:
        raise ValueError(
            f"gpt_fast.save_pretrained: the model has {', '.join(spare[:3]) or 'nothing'} beyond its configuration and "
            f"lacks {', '.join(missing[:3]) or 'nothing'}; expected the model of its configuration, adapters merged"
        )
    for name, tensor in state.items():
        if hasattr(tensor, "full_tensor"):
            raise ValueError(
                f"gpt_fast.save_pretrained: {name} is sharded over ranks; expected a whole model: load a full state "
                "dict into one that is not sharded"
            )
        if tensor.shape != wanted[name]:
            raise ValueError(
                f"gpt_fast.save_pretrained: {name} has shape {list(tensor.shape)}; "
                f"expected {list(wanted[name])} by the configuration"
            )


def read_config(directory: Path) -> tuple[str, GPTConfig]:
    """The name of the head a folder was saved by, and its configuration."""
    path = directory / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{directory}: no {CONFIG} there, wanted a folder written by save_pretrained")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8 or not JSON
        raise ValueError(f"{path}: not JSON ({error}), wanted a configuration written by save_pretrained") from error
    if isinstance(values, dict) and "model_type" in values and "format" not in values:
        raise ValueError(
            f"{path}: a transformers model; gpt-fast convert --from {directory} --out FOLDER makes one of ours"
        )
    if not isinstance(values, dict) or values.pop("format", None) != _FORMAT:
        raise ValueError(f"{path}: not written by gpt_fast (no format {_FORMAT!r}), wanted one of its model folders")
    head = values.pop("head", None)
    try:
        return str(head), GPTConfig.from_dict(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def load(
    head_class: type[AnyHead], directory: Path, overrides: dict[str, Any], tensors: dict[str, Tensor] | None = None
) -> AnyHead:
    """Return a head of this class with the weights of a folder, or these; see `Head.from_pretrained`."""
    saved_by, config = read_config(directory)
    tensors = read_weights(directory / WEIGHTS) if tensors is None else tensors
    with torch.device("meta"):  # draws no weights that would be overwritten, whatever the default device is
        head = head_class(config.replace(**overrides))
    head.to_empty(device="cpu")
    wanted = dict(head.state_dict())
    if head.config.tied:
        wanted.pop(_TIED, None)
    same_head = saved_by == head_class.__name__
    missing = sorted(name for name in wanted if name not in tensors and (same_head or name.startswith("trunk.")))
    if missing:
        raise ValueError(f"{directory / WEIGHTS}: lacks {', '.join(missing)}, wanted every tensor of a {saved_by}")
    unexpected = sorted(name for name in tensors if name not in wanted and (same_head or name.startswith("trunk.")))
    if unexpected:
        raise ValueError(f"{directory / WEIGHTS}: holds {', '.join(unexpected)}, which a {saved_by} does not have")
    kept = {name: tensor for name, tensor in tensors.items() if name in wanted}
    for name, tensor in kept.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(
                f"{directory / WEIGHTS}: {name} has shape {list(tensor.shape)}, "
                f"wanted {list(wanted[name].shape)} by {CONFIG}"
            )
    head.draw_weights([name for name in wanted if name not in kept])
    with torch.no_grad():
        for name, tensor in kept.items():
            wanted[name].copy_(tensor)
    return head


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; `ValueError` where it is truncated or something else."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing, wanted the weights written by save_pretrained")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated, or no safetensors file ({error})") from error
