"""Settings as files: one YAML or JSON object whose names are those of the command line's options."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ..._files import write_text

S = TypeVar("S")
SETTINGS = "settings.yaml"
_UNSAVED = {"out", "overwrite", "resume"}  # of the command, not of the run


def option(name: str) -> str:
    """A field's name as the command line has it."""
    return {"source": "from"}.get(name, name.replace("_", "-"))


def write_settings(folder: Path, settings: Any) -> None:
    """Every setting with its value, defaults too."""
    path = folder / SETTINGS
    write_text(path, yaml.safe_dump(to_plain(settings), sort_keys=False, allow_unicode=True))


def to_plain(settings: Any) -> dict[str, Any]:
    """A dataclass of settings as plain values under the options' names."""
    fields = {name: value for name, value in dataclasses.asdict(settings).items() if name not in _UNSAVED}
    return {option(name): _plain(value) for name, value in fields.items()}


def read_settings(path: Path) -> dict[str, Any]:
    """The object in a .yaml, .yml or .json file."""
    if not path.is_file():
        raise FileNotFoundError(f"--config {path}: no such file")
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path}: neither YAML nor JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"--config {path}: wanted names of options with their values, got {type(values).__name__}")
    return {str(name): value for name, value in values.items()}


def take_up(folder: Path, began: dict[str, Any], settings: S, free: set[str]) -> S:
    """The settings of a run in `folder` that goes on, which `began` with these: what is not given is as it was then,
    and what is given has to be, but for `free`."""
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        name, value = option(field.name), _plain(getattr(settings, field.name))
        if field.name in free or name not in began or value == began[name]:
            continue
        if value not in (None, []):
            raise ValueError(
                f"--{name} {value}: the run in {folder} began with {began[name]}; --resume goes on with the same "
                f"settings (--config {folder / SETTINGS} repeats them)"
            )
        fields[field.name] = _of_type(str(field.type), began[name])
    return dataclasses.replace(settings, **fields)  # type: ignore[type-var]


def _of_type(hint: str, value: Any) -> Any:
    """A plain value as its field has it."""
    if isinstance(value, list):
        return tuple(_of_type(hint, entry) for entry in value)
    return Path(value) if "Path" in hint else value


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (tuple, list)):
        return [_plain(entry) for entry in value]
    return value
