"""Settings: how one is declared, validated, read from a file and saved."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from .documents import YAML_LIMIT, parse_json, parse_yaml, read_bytes

S = TypeVar("S", bound="Settings")
# Rules for a setting in a resumed run. `same`: the user may omit it or repeat it. `more`: or give a larger number.
# `free`: the user may change it.
# `machine`: saved, but a resumed run takes the command's. `command`: neither saved nor compared.
Resume = Literal["same", "more", "free", "machine", "command"]


def option(
    default: Any,
    help: str,
    *,
    panel: str,
    metavar: str | None = None,
    resume: Resume = "same",
    also: str | None = None,
    **bounds: float,
) -> Any:
    """Declare a setting, which is also an option of the command line and a name in files.

    Args:
        default: Its default, `...` if it is required.
        help: Its help on the command line.
        panel: The panel of the help in which it is listed: "Run", "Data", "Model" or "Training".
        metavar: The name of its value in the help.
        resume: Rule for a resumed run. "same", "more" and "free": it keeps its original value if the user omits it. A
            given value must be the original one for "same", may also be larger for "more", and may be any for "free".
            "machine": the resuming command's value is taken, or the default. "command": likewise, and it is not saved.
        also: Another spelling on the command line, such as "--data".
        **bounds: Bounds of the value, such as `ge=1`, as pydantic's `Field` takes them.

    Returns:
        The pydantic field, to be assigned to an annotated attribute of a `Settings` class.
    """
    extra = {"panel": panel, "metavar": metavar, "resume": resume, "also": also}
    return Field(default, description=help, json_schema_extra=extra, **bounds)  # type: ignore[call-overload]


def extra(field: FieldInfo, name: str) -> Any:
    """Return the value of an argument of `option`, by which the setting `field` was declared.

    `name` is the argument's name: "panel", "metavar", "resume" or "also". Raise `AssertionError` for a field that was
    declared without `option`.
    """
    assert isinstance(field.json_schema_extra, dict)
    return field.json_schema_extra[name]


def option_name(field: str) -> str:
    """Return a setting's name on the command line and in files, without dashes in front, such as "batch-size".

    `field` is its name in Python, such as "batch_size". The field "source" is called "from".
    """
    return {"source": "from"}.get(field, field.replace("_", "-"))


class OptionError(ValueError):
    """Error in options that is alike on every rank of a distributed job.

    The first rank of each machine prints it for all.
    """


@contextmanager
def wrong_on_every_rank() -> Iterator[None]:
    """Turn a `ValueError` that is raised inside the block into an `OptionError` with the same message.

    An `OptionError` is an error that each rank of a distributed job raises alike, so that one rank of each machine
    prints it for all. An `OptionError` of the block, and other kinds of errors, are raised unchanged.
    """
    try:
        yield
    except OptionError:
        raise
    except ValueError as error:
        raise OptionError(str(error)) from error


class InvalidSettings(OptionError):
    """Error for settings that are not valid, with all of pydantic's `errors` in one line.

    `cls` is the class of the settings. `read` are the option names of settings that come from a file. `place` names
    that file in the message, as "--config FILE: "; it is "" if there is none.
    """

    def __init__(self, cls: type[Settings], errors: list[ErrorDetails], place: str = "", read: Collection[str] = ()):
        self.errors = errors
        super().__init__("; ".join(_describe(cls, error, place, read) for error in errors))


class Settings(BaseModel):
    """Frozen settings that know which of them the user gave (`model_fields_set`)."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", alias_generator=option_name, populate_by_name=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        """Raise an error for true and false unless the setting's type is bool: pydantic would take them for 1 and 0.

        Return each other value unchanged. This validator runs on each setting's value. pydantic turns the error, a
        `PydanticCustomError`, into a `ValidationError`.
        """
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise PydanticCustomError("boolean", "true or false")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_blank_paths(cls, value: Any, info: ValidationInfo) -> Any:
        """Raise an error for a blank text given as a path, which would become the current folder. Return other values.

        This validator runs on each setting's value before its type is checked, and looks only at settings whose type is
        a path or paths. A list is refused if one of its entries is blank. pydantic turns the error, a
        `PydanticCustomError`, into a `ValidationError`.
        """
        values = value if isinstance(value, list | tuple) else [value]
        if "Path" in str(cls.model_fields[str(info.field_name)].annotation) and any(
            isinstance(each, str) and not each.strip() for each in values
        ):
            raise PydanticCustomError("blank", "a path")
        return value

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InvalidSettings(type(self), error.errors(include_url=False)) from None

    @classmethod
    def fields(cls) -> dict[str, FieldInfo]:
        """Return the declarations of all settings: {option name, such as "batch-size": pydantic's field}."""
        return {option_name(name): field for name, field in cls.model_fields.items()}

    @classmethod
    def read(cls: type[S], path: Path | None, given: Mapping[str, Any]) -> S:
        """Return settings with the values in `given`, and otherwise those in the YAML or JSON file at `path`.

        `given` maps names of fields to values, which replace the file's. `path` is None for no file. The file's names
        may be those of options or of fields; null stands for a setting that is not given. Raise `InvalidSettings` for
        an unknown name, a missing setting or a value that is not valid. Raise `FileNotFoundError` if there is no such
        file, and `ValueError` if it is too large, not valid YAML or JSON, or holds no object.
        """
        names = {name: option_name(name) for name in cls.model_fields}
        known = {**{option: option for option in names.values()}, **names}
        content = {} if path is None else read_file(path)
        values = {known.get(name, name): value for name, value in content.items() if value is not None}
        values = {name: value for name, value in values.items() if name not in map(option_name, given)}
        try:
            return cls(**values, **{option_name(name): value for name, value in given.items()})
        except InvalidSettings as invalid:
            raise InvalidSettings(cls, invalid.errors, f"--config {path}: " if path else "", values) from None

    def changed(self: S, **values: Any) -> S:
        """Return a validated copy of these settings in which those named in `values`, by field name, have other values.

        All settings count as given by the user in the copy (`model_fields_set`). Raise `InvalidSettings` if a value is
        not valid.
        """
        return type(self)(**(dict(self) | values))

    def saved(self) -> dict[str, Any]:
        """Return the settings, defaults included, as a dict of JSON values by option name, for settings.yaml.

        Settings declared with `resume="command"`, such as --out, are left out.
        """
        unsaved = {name for name, field in type(self).model_fields.items() if extra(field, "resume") == "command"}
        return self.model_dump(mode="json", by_alias=True, exclude=unsaved)


def read_file(path: Path) -> dict[str, Any]:
    """Return the object in a JSON or YAML file as a dict with text keys. A name that does not end in .json means YAML.

    Raise `FileNotFoundError` if there is no such file. Raise `ValueError` if it is larger than `YAML_LIMIT` bytes (256
    KiB), not valid or holds no object. The messages name the option --config.
    """
    try:
        content = read_bytes(path, YAML_LIMIT)
        values = parse_json(path, content) if path.suffix.lower() == ".json" else parse_yaml(path, content)
        if not isinstance(values, dict):
            raise ValueError(f"{path}: has a {type(values).__name__}; expected names of options with values")
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"--config {error}") from None
    return {str(name): value for name, value in values.items()}


def did_you_mean(name: str, known: Collection[str]) -> str:
    """Return "; did you mean 'NAME'?" with the name in `known` that is nearest to `name`, or "" if none is near."""
    near = get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


_EXPECTED = {
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "finite_number": "a finite number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a smaller number",
    "float_parsing": "a number",
    "float_type": "a number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "boolean": "a value other than true and false",
    "path_type": "a path",
    "blank": "a path",
    "string_type": "a text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "literal_error": "{expected}",
}


def _describe(cls: type[Settings], error: ErrorDetails, place: str, read: Collection[str]) -> str:
    """Return one of pydantic's errors about settings of class `cls` as text.

    `read` has the settings that come from a file, by option name, such as "batch-size". `place` names that file, such
    as "--config FILE: ".

    - A wrong value from the file: "PLACE NAME has VALUE; expected WHAT".
    - Another wrong value: "--NAME VALUE: expected WHAT".
    - A missing setting: "--NAME: missing (HELP)".
    - An unknown name: PLACE, the class that lacks it, and the nearest known name, or all names if none is near.
    """
    name = option_name(str(error["loc"][0]))
    if error["type"] == "missing":
        return f"--{name}: missing ({cls.fields()[name].description})"
    if error["type"] == "extra_forbidden":
        known = sorted(cls.fields())
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
        return f"{place}{cls.__name__} has no {shortened(name)}; {hint}"
    if name in read:
        return f"{place}{name} has {shortened(error['input'])}; expected {expectation(error)}"
    return f"--{name} {error['input']}: expected {expectation(error)}"


def describe(error: ErrorDetails) -> str:
    """Return one of pydantic's errors about an object read from a file as text.

    The text is "NAME has VALUE; expected WHAT", "lacks NAME" for a missing field, or "unknown name 'NAME'". NAME is the
    field's path, such as "rows[0].size". An error about the whole object gives pydantic's message.
    """
    name = ""
    for part in error["loc"]:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    if error["type"] == "missing":
        return f"lacks {name}"
    if error["type"] == "extra_forbidden":
        return f"unknown name {shortened(name)}"
    if not name:
        return error["msg"]
    return f"{name} has {shortened(error['input'])}; expected {expectation(error)}"


def shortened(value: Any) -> str:
    """Return `repr(value)`, cut to its first 77 characters and "..." if it is longer than 80."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def expectation(error: ErrorDetails) -> str:
    """Return what was expected instead of the value that pydantic found wrong, such as "at least 1".

    `error` is an entry of a `ValidationError`'s `errors()`. For a kind of error without such words in `_EXPECTED`,
    return pydantic's message without "Input should be ".
    """
    expected = _EXPECTED.get(error["type"])
    if expected is None:
        return error["msg"].removeprefix("Input should be ")
    bounds = {name: _spelled(value) for name, value in error.get("ctx", {}).items()}
    return expected.format(**bounds)


def _spelled(value: object) -> object:
    """Return a whole number (1.0 too) as text with commas, such as "268,435,456", and other values unchanged."""
    return f"{int(value):,}" if isinstance(value, int | float) and float(value).is_integer() else value
