"""Comparison of a command's settings with the original ones of the run that it resumes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from .declaration import InvalidSettings, extra, option_name
from .training import TrainingSettings

S = TypeVar("S", bound=TrainingSettings)


def asks_for_more(settings: S, saved: Mapping[str, Any]) -> tuple[str, int] | None:
    """Return (option name, new value) if the user asks a run to train for longer than it was begun with, else None.

    Options that can ask for this are declared with `resume="more"`: "steps" or "epochs". `settings` are those of the
    command that resumes; defaults do not count. `saved` is the content of the run's settings.yaml, values by option
    name.
    """
    for name, field in type(settings).model_fields.items():
        value, before = getattr(settings, name), saved.get(option_name(name))
        is_given = extra(field, "resume") == "more" and name in settings.model_fields_set
        if is_given and isinstance(before, int) and value > before:
            return option_name(name), value
    return None


def resumed(settings: S, path: Path, saved: Mapping[str, Any], finished: bool = False) -> S:
    """Return the settings for resuming the run whose settings `saved` were read from the file `path`.

    `settings` are those of the command that resumes, and `saved` maps option names to values. Each setting is declared
    with a rule for resuming. For "command" and "machine", and for settings that `saved` lacks, the command's value is
    taken.

    Of the other settings, each one that the user omits keeps its original value; None or an empty tuple counts as
    omitted. A setting that the user gives must equal its original value, with two exceptions: "free" ones may change,
    and "more" ones may be larger. If the run is `finished`, "more" ones may also be smaller.

    Raise `ValueError` if a given value is not allowed, or if `saved` has a setting that this command lacks or a value
    that is not valid.
    """
    cls = type(settings)
    if foreign := sorted(set(saved) - set(cls.fields())):
        raise ValueError(
            f"--resume: {path} has {foreign[0]}, which is no option of gpt-fast {cls.command}; expected a run that "
            f"gpt-fast {cls.command} began"
        )
    kinds = {name: extra(field, "resume") for name, field in cls.model_fields.items()}
    command = {name: getattr(settings, name) for name, kind in kinds.items() if kind == "command"}
    try:
        began = cls.read(None, dict(saved) | command)
    except InvalidSettings as invalid:
        raise InvalidSettings(cls, invalid.errors, f"{path}: ", saved) from None
    values = dict(settings)
    for name, kind in kinds.items():
        mine, original = getattr(settings, name), getattr(began, name)
        if kind in ("command", "machine") or name not in began.model_fields_set:
            continue
        if name not in settings.model_fields_set or mine in (None, ()):
            values[name] = original
        elif mine != original and kind == "same":
            mine, original = (given.saved()[option_name(name)] for given in (settings, began))
            raise ValueError(
                f"--{option_name(name)} {mine}: the run in {path.parent} began with {original}; --resume "
                f"expects the same settings (--config {path} repeats them)"
            )
        elif kind == "more" and mine < original and not finished:
            raise ValueError(
                f"--{option_name(name)} {mine}: the run in {path.parent} began with {original}; "
                f"expected {original} or more"
            )
    return cls(**values)
