"""Options from the declarations in `gpt_fast_settings`, and the run of a training with a bar, signals and a result."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import Parameter, Signature
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer
from pydantic.fields import FieldInfo

from gpt_fast_settings.declaration import OptionError, extra, option_name
from gpt_fast_settings.training import PANELS, RUN, TrainingSettings

from .terminal import print_json, require_train_extra, say, training_bar

if TYPE_CHECKING:
    from gpt_fast import interrupts
    from gpt_fast.training import loop

S = TypeVar("S", bound=TrainingSettings)
Config = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="YAML or JSON with values by the options' names; the command line wins. A run's settings.yaml is one.",
        rich_help_panel=RUN,
    ),
]

SkipLabel = Annotated[
    list[str] | None,
    typer.Option(metavar="LABEL", help="Skip rows with this label besides those that training skipped."),
]
Columns = Annotated[
    str | None, typer.Option(help="Names of the columns of a .csv or .tsv without a header line, with commas between.")
]
SkipRagged = Annotated[
    bool, typer.Option("--skip-ragged", help="Skip rows with another number of fields than the header, or of choices.")
]


def from_settings(cls: type[S]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that makes a command of a function, whose first parameter takes settings of class `cls`.

    The command has an option for each setting, --config for a file with settings, and the function's other parameters.
    It keeps the function's docstring as its help. It calls the function with validated settings. Their
    `model_fields_set` names the settings that an option or the file gave; an option replaces the file's value.

    The command raises `ValueError` if a package of the extra `train` is missing or a setting is not valid. If the
    function raises a `ValueError` about a setting from the file, it is raised again with the file's name.
    """

    def decorate(body: Callable[..., None]) -> Callable[..., None]:
        """Return the command that typer calls, made of the command's function `body(settings, **others)`."""

        def command(context: typer.Context, config: Path | None, **values: Any) -> None:
            """Read the settings from the options and the file --config, and call the outer `body` with them.

            `values` maps the names of the settings of the outer `cls`, and of the function's other parameters, to the
            values of their options. An option wins over the file. Raise `ValueError` for settings that are not valid.
            """
            require_train_extra()
            options = {name: values.pop(name) for name in cls.model_fields}
            given = {name: value for name, value in options.items() if _is_given(context, name)}
            settings = cls.read(config, given)
            try:
                body(settings, **values)
            except ValueError as error:
                option = str(error).removeprefix("--").partition(" ")[0].removesuffix(":")
                from_file = settings.model_fields_set - given.keys()
                if config is None or option not in map(option_name, from_file):
                    raise
                kind = OptionError if isinstance(error, OptionError) else ValueError
                raise kind(f"--config {config}: {error}") from error

        _, *own = Signature.from_callable(body).parameters.values()
        hints = get_type_hints(body, include_extras=True)
        parameters = [
            Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context),
            *_parameters(cls),
            Parameter("config", Parameter.KEYWORD_ONLY, default=None, annotation=Config),
            *(param.replace(kind=Parameter.KEYWORD_ONLY, annotation=hints[param.name]) for param in own),
        ]
        # typer reads the parameters from these two.
        command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {param.name: param.annotation for param in parameters}
        command.__doc__ = body.__doc__
        return command

    return decorate


def _is_given(context: typer.Context, name: str) -> bool:
    """Return True if the user gave a value for the parameter `name`, False if its value is the default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _parameters(cls: type[TrainingSettings]) -> list[Parameter]:
    """Return a keyword-only parameter of a command's signature for each setting of `cls`, by the panels of the help.

    In a panel the settings that `cls` declares itself come before those that it inherits. A parameter's default is that
    of the setting. It is None if the setting is required, or if its default is an empty tuple.
    """
    own = cls.__annotations__
    fields = sorted(
        cls.model_fields.items(), key=lambda item: (PANELS.index(extra(item[1], "panel")), item[0] not in own)
    )
    return [
        Parameter(
            name,
            Parameter.KEYWORD_ONLY,
            default=None if field.is_required() or field.default == () else field.default,
            annotation=_annotation(name, field),
        )
        for name, field in fields
    ]


def _annotation(name: str, field: FieldInfo) -> Any:
    """Return a setting's annotation for typer: its type, with the option's spellings, help and panel.

    `name` is the setting's name in Python, `field` its declaration. A required setting is optional here, because a file
    given by --config may hold it; its help is marked as required, and pydantic validates later that it is given. A
    switch that a resumed run may change also has the spelling --no-NAME. A tuple becomes a list.
    """
    kind, spelling, text = _without_none(field.annotation), f"--{option_name(name)}", field.description
    if get_origin(kind) is tuple:
        kind = list[get_args(kind)[0]]  # type: ignore[misc]
    if kind is bool and extra(field, "resume") == "free":
        spelling += f"/--no-{option_name(name)}"  # a resumed run may switch it off
    if field.is_required():
        text = f"{text} [red]\\[required][/red]"
    return Annotated[
        kind if kind is bool else kind | None,
        typer.Option(
            *([spelling] if extra(field, "also") is None else [spelling, extra(field, "also")]),
            help=text,
            metavar=extra(field, "metavar"),
            rich_help_panel=extra(field, "panel"),
            show_default=kind is not bool,
        ),
    ]


def _without_none(annotation: Any) -> Any:
    """Return the type T of an annotation `T`, `T | None`, `Annotated[T, …]` or `Annotated[T, …] | None`."""
    if isinstance(annotation, UnionType) or NoneType in get_args(annotation):
        (annotation,) = (kind for kind in get_args(annotation) if kind is not NoneType)
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def train(
    label: str, program: Callable[..., dict[str, Any]], settings: TrainingSettings, as_json: bool
) -> dict[str, Any] | None:
    """Run the training `program` with a progress bar. Return its record, a dict of results, for the caller to print.

    If `as_json`, this function prints the record as JSON itself, with the path of the run folder added under "out", and
    returns None. On ranks other than the first it prints nothing and returns None. `label` stands beside the bar.
    `program(settings, show, say, stop)` is called with functions that update the bar and print a line, and with an
    object that records a SIGINT or SIGTERM. For speed, the C library keeps freed memory until the process ends.
    """
    from gpt_fast._memory import keep_freed

    keep_freed()
    with training_session(label) as session:
        record = program(settings, *session)
    if follows():
        return None
    if as_json:
        print_json({"out": str(settings.out), **record})
        return None
    return record


@contextmanager
def training_session(
    label: str,
) -> Iterator[tuple[Callable[[loop.Progress], None], Callable[[str], None], interrupts.Stop]]:
    """Yield (show, say, stop), by which a training updates its bar, prints a line and learns of a signal.

    `show` updates a progress bar with `label` from a `loop.Progress`, and `say` prints a line on stderr. On ranks other
    than the first, both do nothing. `stop` handles SIGINT and SIGTERM inside the block: by its `signum` the training
    learns that it shall save and end.
    """
    from gpt_fast.interrupts import caught
    from gpt_fast.training.program import ignore

    if follows():
        with caught() as stop:
            yield ignore, ignore, stop
        return
    with caught() as stop, training_bar(label) as show:
        yield show, say, stop


def run_folder(out: Path) -> str:
    """Return the path `out` of a run folder as text; if it holds loss.png, ", with the curves in loss.png" follows."""
    return f"{out}, with the curves in loss.png" if (out / "loss.png").exists() else str(out)


def follows() -> bool:
    """Return True on each rank of a distributed job but the first (the environment variable RANK is above 0).

    These ranks print nothing but errors.
    """
    return int(os.environ.get("RANK", "0")) > 0
