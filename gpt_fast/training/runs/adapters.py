"""LoRA adapters: PEFT attaches and trains them, a run folder holds them in PEFT's format, and reading one merges it.

Adapted are the projection to queries, keys and values, and both layers of the MLP: W + alpha / rank · B A, with
A [rank, in] and B [out, rank]. A task's own layer is trained as a whole. Source: Hu et al. (2021), arXiv:2106.09685.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..._files import replacing, sha256
from ...heads import Head
from ...heads.classifiers import TaskHead
from ...model import init_weights

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = (CONFIG, WEIGHTS)
# Modules that PEFT wraps in a decoder, and the weight to which the adapter is added.
_ADAPTED = {"multihead_attn": "multihead_attn.in_proj_weight", "ff.0": "ff.0.weight", "ff.3": "ff.3.weight"}
_SAVED, _LIVE = "base_model.model.", ".default"  # PEFT's files have the first in names, its modules the second


def require_peft(option: str) -> None:
    """Raise `ValueError` if PEFT is not installed. `option` is the option that needs it, for the message."""
    if find_spec("peft") is None:
        raise ValueError(f"{option}: needs peft, which is not installed; pip install gpt-fast[lora]")


class Adapter:
    """A LoRA adapter of a model in training."""

    def __init__(self, rank: int, alpha: float | None, base: Path):
        self.rank = rank
        self.alpha = 2.0 * rank if alpha is None else alpha
        self.base = base
        self._adapted: Any = None

    def record(self) -> dict[str, Any]:
        """Return "rank", "alpha" and "base_sha256", which a reader of the run needs to merge the adapter.

        The last is the SHA-256 of model.safetensors in the base run's folder, the weights that the adapter is added to.
        The file is read for this.
        """
        return {"rank": self.rank, "alpha": self.alpha, "base_sha256": sha256(self.base / "model.safetensors")}

    def attach(self, model: Head) -> Head:
        """Insert the adapter into `model` in place by PEFT, and return the same model. Call this once, before `save`.

        The adapter changes the projection to queries, keys and values, and both layers of the MLP, in each decoder. All
        weights are frozen but those of the adapter and of the task's output layer. A `TaskHead` has this layer, which
        is initialised again at random.
        """
        import peft

        if isinstance(model, TaskHead):
            init_weights(model.classifier, model.config.init_std)
        config = peft.LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=[name for name in _ADAPTED if name.startswith("ff")],
            target_parameters=[_ADAPTED["multihead_attn"]],
            modules_to_save=["classifier"] if isinstance(model, TaskHead) else None,
        )
        self._adapted = peft.get_peft_model(model, config)  # changes the model in place
        self._adapted.peft_config["default"].base_model_name_or_path = os.path.abspath(self.base)
        return model

    def save(self, model: Head, folder: Path) -> None:
        """Write the adapter into `folder` in PEFT's format: adapter_model.safetensors and adapter_config.json.

        The folder is made if it is missing. The file holds the current weights of the adapter that `attach` inserted,
        and the trained output layer of a task. `model` is ignored. The parameter exists because the training loop calls
        this method with the arguments of `Head.save_pretrained`.
        """
        import peft

        folder.mkdir(parents=True, exist_ok=True)
        tensors = peft.get_peft_model_state_dict(self._adapted)
        with replacing(folder / WEIGHTS) as temporary:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
        self._adapted.peft_config["default"].save_pretrained(str(folder))


def copy(source: Path, folder: Path) -> Path:
    """Copy the two files of an adapter from the folder `source` into `folder`. Return the path of the new weights.

    The files are adapter_config.json and adapter_model.safetensors. Existing ones are replaced. `folder` has to exist.
    """
    for name in FILES:
        with replacing(folder / name) as temporary:
            shutil.copyfile(source / name, temporary)
    return folder / WEIGHTS


def live_shapes(model: Head, rank: int) -> dict[str, tuple[str, list[int]]]:
    """Return {name in the adapter's file: (name in a model that trains it, shape)} for each tensor of an adapter.

    The adapter is one of rank `rank` for `model`, which need not have it. The tensors are A [rank, in] and B [out,
    rank] of each adapted weight [out, in], and the parameters of the classifier if `model` is a `TaskHead`.
    """
    found = {}
    for i, decoder in enumerate(model.trunk.decoders):
        for module, weight in _ADAPTED.items():
            rows, columns = decoder.get_parameter(weight).shape
            for part, shape in (("lora_A", [rank, columns]), ("lora_B", [rows, rank])):
                name = f"trunk.decoders.{i}.{module}.{part}"
                found[f"{_SAVED}{name}.weight"] = (f"{name}{_LIVE}.weight", shape)
    if isinstance(model, TaskHead):
        for name, parameter in model.classifier.named_parameters():
            live = f"classifier.modules_to_save{_LIVE}.{name}"
            found[f"{_SAVED}classifier.{name}"] = (live, list(parameter.shape))
    return found


def merge(model: Head, tensors: Mapping[str, Tensor], rank: int, alpha: float, path: Path) -> None:
    """Add an adapter to the weights of `model`, its base without an adapter, in place.

    `tensors` maps the names in the adapter's file to its tensors. Each adapted weight gets `alpha` / `rank` times the
    product B A added. The weights of the classifier of a `TaskHead` are replaced.

    Raises:
        ValueError: A tensor is missing, has another shape or is one too many. The message names `path`, the adapter's
            file. `model` is unchanged then.
    """
    expected = live_shapes(model, rank)
    for name, (_, shape) in expected.items():
        if name not in tensors or list(tensors[name].shape) != shape:
            has = f"{name} has shape {list(tensors[name].shape)}" if name in tensors else f"lacks {name}"
            raise ValueError(f"{path}: {has}; expected {shape} by config.json and run.json")
    if spare := sorted(tensors.keys() - expected.keys()):
        raise ValueError(f"{path}: holds {spare[0]}, which an adapter of this model does not have")
    with torch.no_grad():
        for i, decoder in enumerate(model.trunk.decoders):
            for module, weight in _ADAPTED.items():
                name = f"{_SAVED}trunk.decoders.{i}.{module}"
                product = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
                decoder.get_parameter(weight).add_(product, alpha=alpha / rank)
        if isinstance(model, TaskHead):
            for name, parameter in model.classifier.named_parameters():
                parameter.copy_(tensors[f"{_SAVED}classifier.{name}"])
