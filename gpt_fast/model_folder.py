"""Model folders: `config.json` and `model.safetensors`, read and written whole or not at all. Nothing is unpickled."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gpt_fast_settings.documents import read_object

from ._files import replacing, write_json
from .config import GPTConfig

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_FORMAT = "gpt_fast"
_MANY_LAYERS = 1000  # of which even a model without memory takes a second to make
_TIED = "output_layer.weight"  # not stored where it is the token embedding

AnyHead = TypeVar("AnyHead", bound=Any)


def as_path(function: str, directory: Any) -> Path:
    """Return `directory`, the name of a folder, as a path. `function` is the name of the caller for messages.

    Raises:
        TypeError: `directory` is neither a string nor a path.
    """
    if not isinstance(directory, str | os.PathLike):
        raise TypeError(
            f"gpt_fast.{function}: directory is of type {type(directory).__name__}; expected a path, str or os.PathLike"
        )
    return Path(directory)


def save(head: Any, directory: Path) -> None:
    """Write model.safetensors and then config.json of the model `head` to the folder `directory`, made if needed.

    A new folder that has a config.json is therefore complete. Each file is replaced whole or not at all. The weight of
    an output layer that is tied to the token embedding is left out. The field "tied" of config.json says whether the
    two weights of `head` are tied now, even if `head.config` says otherwise.

    Raises:
        OSError: A file cannot be written.
        ValueError: The names or shapes of the model's tensors are not those of its configuration, or a tensor is
            sharded over ranks.
    """
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
    """Write config.json in `directory`: the fields of `config`, "head" (the class name of `head`) and "format"."""
    write_json(directory / CONFIG, {"format": _FORMAT, "head": type(head).__name__, **config.to_dict()})


def _check_names(head: Any, state: dict[str, Tensor], config: GPTConfig) -> None:
    """Raise an error unless `state`, the state dict of the model `head`, fits a new model of its class with `config`.

    Raises:
        ValueError: A name or a shape of a tensor differs, or a tensor is sharded over ranks.
    """
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
    """Return (name, config) of the folder `directory`: the name of the model's class, and its `GPTConfig`.

    Both are read from config.json. The class is that of the whole model, such as "GPTForCausalLM". The name is the text
    "None" if the file does not say it.

    Raises:
        FileNotFoundError: There is no config.json.
        ValueError: The file is damaged or of another library, such as transformers.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{directory}: no {CONFIG} there; expected a folder written by save_pretrained")
    values = read_object(path)
    if "model_type" in values and "format" not in values:
        raise ValueError(
            f"{path}: a transformers model; gpt-fast convert --from {directory} --out FOLDER makes one of ours"
        )
    if values.pop("format", None) != _FORMAT:
        raise ValueError(f"{path}: not written by gpt_fast (no format {_FORMAT!r}); expected one of its model folders")
    head = values.pop("head", None)
    try:
        return str(head), GPTConfig.from_dict(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def load(
    head_class: type[AnyHead], directory: Path, overrides: dict[str, Any], tensors: dict[str, Tensor] | None = None
) -> AnyHead:
    """Return a new model of class `head_class`, on the CPU in training mode, with the weights in `directory`.

    `overrides` are fields of `GPTConfig` that replace those in the folder. `tensors`, by name, take the place of the
    weights in the folder if given. If another class saved the folder, only the trunk has to match. Other layers of
    `head_class` for which there are no saved tensors get random weights, and other tensors are ignored.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, an override is invalid, or a tensor is missing, unexpected or of another shape.
    """
    saved_by, config = read_config(directory)
    path = directory / WEIGHTS
    tensors = read_weights(path) if tensors is None else tensors
    if config.num_layers > max(len(tensors), _MANY_LAYERS):
        raise ValueError(f"{path}: holds {len(tensors)} tensors; expected those of {config.num_layers:,} layers")
    with torch.device("meta"):  # draws no weights that would be overwritten, whatever the default device is
        head = head_class(config.replace(**overrides))
    wanted = dict(head.state_dict())
    if head.config.tied:
        wanted.pop(_TIED, None)
    same_head = saved_by == head_class.__name__
    missing = sorted(name for name in wanted if name not in tensors and (same_head or name.startswith("trunk.")))
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(missing)}; expected every tensor of a {saved_by}")
    unexpected = sorted(name for name in tensors if name not in wanted and (same_head or name.startswith("trunk.")))
    if unexpected:
        raise ValueError(f"{path}: holds {', '.join(unexpected)}, which a {saved_by} does not have")
    kept = {name: tensor for name, tensor in tensors.items() if name in wanted}
    for name, tensor in kept.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(
                f"{path}: {name} has shape {list(tensor.shape)}; expected {list(wanted[name].shape)} by {CONFIG}"
            )
    head.to_empty(device="cpu")
    head.draw_weights([name for name in wanted if name not in kept])
    state = head.state_dict()
    with torch.no_grad():
        for name, tensor in kept.items():
            state[name].copy_(tensor)
    return head


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return all tensors of the safetensors file `path`, on the CPU, by name.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: The file is truncated or no safetensors file.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open the safetensors file at `path` inside the block.

    Yields:
        The file, as `safetensors.safe_open` opens it.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: The file is truncated, no safetensors file or too long to be mapped. A `SafetensorError` or
            `MemoryError` that the block raises becomes this `ValueError` too.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; expected the weights written by save_pretrained")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, MemoryError) as error:  # MemoryError for a file that is too long to be mapped
        raise ValueError(f"{path}: truncated, or no safetensors file ({error})") from error
