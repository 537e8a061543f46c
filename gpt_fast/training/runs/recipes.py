"""Recipes of the published models, from which a run takes the options that are not given."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gpt_fast_settings.declaration import Settings

from .folder import read_record

S = TypeVar("S", bound=Settings)


@dataclass(frozen=True)
class Recipe:
    """AdamW's numbers, and the share of the peak rate that the cosine falls to."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.01
    final_lr: float = 0.0

    @classmethod
    def of(cls, settings: Any) -> Recipe:
        """Return a recipe with the values of the attributes lr, beta1, beta2, weight_decay and final_lr of `settings`.

        `settings` is any object that has all of them.
        """
        return cls(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(cls)})


# Radford et al. (2018), section 4.1; the paper leaves the betas at Adam's own, as the authors' code has them.
GPT1 = Recipe(lr=2.5e-4)
# GPT-2's paper says nothing of its optimizer, so these are GPT-3's for the same sizes: Brown et al. (2020),
# arXiv:2005.14165, table 2.1 and appendix B.
_GPT3 = Recipe(lr=6e-4, beta2=0.95, weight_decay=0.1, final_lr=0.1)
# A small model takes, and needs, a higher rate. Its updates see few tokens, so the second moment is averaged over more
# of them than GPT-3's, and a run has too few updates for Adam's own thousand.
SMALL = Recipe(lr=2e-3, beta2=0.99)

RECIPES: dict[str | None, Recipe] = {
    None: SMALL,
    "notes": GPT1,
    "gpt1": GPT1,
    "gpt2": _GPT3,
    "gpt2-medium": dataclasses.replace(_GPT3, lr=3e-4),
    "gpt2-large": dataclasses.replace(_GPT3, lr=2.5e-4),
    "gpt2-xl": dataclasses.replace(_GPT3, lr=2e-4),
}
FINETUNE_LR = 6.25e-5  # Radford et al. (2018), section 4.1


def pretraining(preset: str | None, source: Path | None) -> Recipe:
    """Return the recipe of a preset, or the one by which the run in `source` was trained, if `source` is given.

    `preset` is a key of `RECIPES`, such as "gpt2". None is the recipe of small models. It is ignored if `source` is
    given. A value that the record of the run in `source` lacks is GPT-1's.
    """
    if source is None:
        return RECIPES[preset]
    record = read_record(source)
    known = {field.name for field in dataclasses.fields(Recipe)} & set(record)
    return dataclasses.replace(GPT1, **{name: record[name] for name in known})


def finetuning_lr(source: Path) -> float:
    """Return the default learning rate for fine-tuning the run in `source`.

    If the run's record names a preset, or states no learning rate, it is the GPT paper's rate, 6.25e-5. Otherwise it is
    a quarter of the rate in the record, which is the ratio of the two rates in the paper.
    """
    record = read_record(source)
    return FINETUNE_LR if record.get("lr") is None or record.get("preset") else record["lr"] / 4


def complete(settings: S, recipe: Recipe) -> S:
    """Return a copy of `settings` in which values of `recipe` replace those that are None.

    This is done for the fields of a recipe: lr, beta1, beta2, weight_decay and final_lr.
    """
    values = dataclasses.asdict(recipe)
    return settings.changed(**{name: value for name, value in values.items() if getattr(settings, name) is None})
