"""`ckpt.pt` as nanoGPT writes and reads it. This module alone unpickles, and only with `weights_only=True`."""

import math
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..._files import replacing

_USED = ("model", "model_args", "iter_num", "best_val_loss", "config")
_REFUSED = re.compile(r"GLOBAL ([\w.]+)")
_NEVER_EVALUATED = 1e9  # nanoGPT's best_val_loss before the first evaluation
# The hyperparameters of nanoGPT's train.py. A resumed run takes all but the learning rate from the checkpoint.
_LR, _BETAS, _WEIGHT_DECAY = 6e-4, (0.9, 0.95), 0.1


@dataclass(frozen=True)
class Checkpoint:
    """Content of a checkpoint.

    `progress` holds what nanoGPT needs to resume besides the weights, as `progress_of` returns it. `left_out` names the
    entries of the file that are not used.
    """

    state_dict: Any
    model_args: Any  # None: a bare state dict
    progress: dict[str, Any]
    left_out: list[str]


def read(path: Path) -> Checkpoint:
    """Return the `Checkpoint` in a file: `state_dict`, `model_args`, `progress` and `left_out`.

    `progress` has the entries "iter_num", "best_val_loss" and "config", as far as the file has them. `left_out` names
    the file's entries that are not used. For a bare state dict these are empty and `model_args` is None. The state dict
    and `model_args` of a checkpoint are not validated here. The file is read once for its checksums; the tensors are
    then mapped into memory, on the CPU. Raises `ValueError` for a file that is damaged, compressed, holds anything but
    tensors and plain values, or is no checkpoint.
    """
    content = _load(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds a {type(content).__name__}; expected nanoGPT's checkpoint or a state dict")
    if "model" not in content:
        if not content or not all(isinstance(tensor, Tensor) for tensor in content.values()):
            raise ValueError(f"{path}: has no key 'model'; expected nanoGPT's checkpoint or a state dict")
        return Checkpoint(content, None, {}, [])
    left_out = [str(name)[:40] for name in content if name not in _USED]
    return Checkpoint(content["model"], content.get("model_args"), progress_of(path, content), left_out)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors, by name, of a state dict that another library pickled, such as pytorch_model.bin.

    The tensors are mapped into memory, on the CPU.

    Raises:
        ValueError: The file is damaged or holds anything but named tensors.
    """
    content = _load(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds a {type(content).__name__}; expected a state dict")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{path}: {str(name)[:40]} is a {type(tensor).__name__}; expected a tensor")
    return dict(content)


def _load(path: Path) -> Any:
    """Return what `torch.save` wrote into a file, without running code of the file; tensors are mapped, on the CPU.

    Raise `ValueError` if the file is missing, damaged or compressed, or holds anything but tensors and plain values.
    """
    _check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a damaged protocol number; the error says enough
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # noqa: BLE001  a hostile pickle can make PyTorch raise an error of any type
        raise ValueError(f"{path}: {_why_refused(error)}") from None


def write(path: Path, state_dict: dict[str, Tensor], model_args: dict[str, Any], progress: dict[str, Any]) -> None:
    """Write nanoGPT's checkpoint, whole or not at all, with the state of an optimizer that has made no step.

    `state_dict` and `model_args` have nanoGPT's names. `progress` holds the checkpoint's entries "iter_num" (0 if
    missing), "best_val_loss" (1e9) and "config" (empty). An existing file is replaced. Raises `OSError` if the file
    cannot be written.
    """
    checkpoint = {
        "model": state_dict,
        "optimizer": _new_optimizer(state_dict),
        "model_args": model_args,
        "iter_num": progress.get("iter_num", 0),
        "best_val_loss": progress.get("best_val_loss", _NEVER_EVALUATED),
        "config": progress.get("config", {}),
    }
    with replacing(path) as temporary:
        try:
            torch.save(checkpoint, temporary)
        except RuntimeError as error:  # PyTorch's writer has no OSError
            raise OSError(f"{path}: cannot be written ({str(error).splitlines()[0][:120]})") from error


def _check_archive(path: Path) -> None:
    """Raise `ValueError` unless the file is a zip archive, as `torch.save` writes it, with correct checksums.

    The whole file is read. A compressed archive is refused, too, and one with two records of one name or with records
    larger than the file. Reading it could take more memory than the file has bytes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError(f"{path}: is compressed; expected a file that torch.save wrote")
            if len({entry.filename for entry in entries}) != len(entries):
                raise ValueError(f"{path}: has two records of one name; expected a file that torch.save wrote")
            if sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise ValueError(f"{path}: has records larger than the file; expected a file that torch.save wrote")
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, struct.error) as error:
        raise ValueError(f"{path}: damaged or cut off ({error}); expected a file that torch.save wrote") from None
    if damaged is not None:
        raise ValueError(f"{path}: damaged, the checksum of {damaged} is wrong; expected a file that torch.save wrote")


def _why_refused(error: Exception) -> str:
    """Return, as text, why `torch.load` refused a file with `error`.

    If the file holds an object of a class whose name ends in "Config", the text advises how to convert the file.
    """
    found = _REFUSED.search(str(error))
    if found is None:
        reason = (str(error).rpartition("WeightsUnpickler error: ")[2].strip().splitlines() or [""])[0]
        return f"damaged or no checkpoint ({type(error).__name__}: {reason[:120]}); expected one of nanoGPT"
    text = f"holds {found[1]}, which torch.load(weights_only=True) does not unpickle; expected tensors and plain values"
    if found[1].endswith("Config"):
        text += (
            ". Where you trust the file and its class can be imported: checkpoint = torch.load(FILE, "
            "weights_only=False); torch.save({'model': checkpoint['model'], 'model_args': vars(checkpoint['config'])}, "
            "NEW)"
        )
    return text


def progress_of(path: Path, content: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the entries "iter_num", "best_val_loss" and "config" of a checkpoint's `content`, as far as it has them.

    "iter_num" is the step. "best_val_loss" becomes a float and is left out if it is not finite. "config" holds the
    settings whose names are strings and whose values are numbers, bools or strings; others are left out. `path` names
    the file in messages. Raises `ValueError` if the step is no integer of 0 or more, the loss no number, or "config" no
    mapping.
    """
    progress: dict[str, Any] = {}
    if "iter_num" in content:
        step = content["iter_num"]
        if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 2**63:
            raise ValueError(f"{path}: iter_num is a {type(step).__name__}; expected an integer of 0 or more")
        progress["iter_num"] = step
    if "best_val_loss" in content:
        loss = content["best_val_loss"]
        if isinstance(loss, Tensor) and loss.numel() == 1 and not loss.is_meta and loss.is_floating_point():
            loss = loss.item()
        if not isinstance(loss, int | float) or isinstance(loss, bool):
            raise ValueError(f"{path}: best_val_loss is a {type(loss).__name__}; expected a number")
        if math.isfinite(loss):
            progress["best_val_loss"] = float(loss)
    if "config" in content:
        settings = content["config"]
        if not isinstance(settings, Mapping):
            raise ValueError(f"{path}: config is a {type(settings).__name__}; expected names and values")
        plain = {name: value for name, value in settings.items() if isinstance(value, int | float | str)}
        progress["config"] = {name: value for name, value in plain.items() if isinstance(name, str)}
    return progress


def _new_optimizer(state_dict: dict[str, Tensor]) -> dict[str, Any]:
    """Return the `state_dict()` of a new AdamW for the parameters in `state_dict`, in nanoGPT's two groups.

    The first group holds the matrices, which have weight decay, and the second one gains and biases. "lm_head.weight"
    is not counted, because it is the token embedding.
    """
    dims = [tensor.dim() for name, tensor in state_dict.items() if name != "lm_head.weight"]  # tied: one parameter
    groups = [
        {"params": [nn.Parameter(torch.empty(0)) for dim in dims if (dim >= 2) is decays], "weight_decay": decay}
        for decays, decay in ((True, _WEIGHT_DECAY), (False, 0.0))
    ]
    return torch.optim.AdamW(groups, lr=_LR, betas=_BETAS).state_dict()
