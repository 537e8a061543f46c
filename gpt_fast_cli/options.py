"""The options that `pretrain` and `finetune` share, and their settings as a file."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .terminal import say, training_bar

if TYPE_CHECKING:
    from gpt_fast import interrupts
    from gpt_fast.training import loop

_UNSET: tuple[Any, ...] = (None, [], ())


def _load_config(context: typer.Context, path: Path | None) -> Path | None:
    """Puts a file's values where the command line's defaults are: whatever is given on the line itself wins."""
    if path is None:
        return None
    from gpt_fast.training.runs.resume import read_settings

    values = read_settings(path)
    options = {
        spelling.lstrip("-"): parameter
        for parameter in context.command.params
        for spelling in parameter.opts
        if spelling.startswith("--")
    }
    defaults: dict[str, Any] = {}
    for name, value in values.items():
        parameter = options.get(name.replace("_", "-"))
        if parameter is None:
            known = ", ".join(sorted(options))
            raise ValueError(f"--config {path}: {context.command.name} has no option {name!r}; it has {known}")
        if value not in _UNSET:
            defaults[str(parameter.name)] = value
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


Config = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        callback=_load_config,
        is_eager=True,
        help="YAML or JSON with values by the options' names; the command line wins. A run's settings.yaml is one.",
        rich_help_panel="Run",
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on from the last good checkpoint in --out; start where there is none, end where it is finished.",
        rich_help_panel="Run",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.", rich_help_panel="Run")]
CheckpointEvery = Annotated[int, typer.Option(help="Updates between checkpoints.", rich_help_panel="Run")]
KeepCheckpoints = Annotated[int, typer.Option(help="How many checkpoints to keep.", rich_help_panel="Run")]
LogEvery = Annotated[
    int | None,
    typer.Option(help="Updates between lines of metrics.jsonl; some fifty lines a run.", rich_help_panel="Run"),
]
TensorBoard = Annotated[
    bool, typer.Option("--tensorboard", help="Write tensorboard/ into the run folder, too.", rich_help_panel="Run")
]
Accumulate = Annotated[
    int, typer.Option(help="Parts that an update's batch is computed in, for less memory.", rich_help_panel="Training")
]
WeightDecay = Annotated[float, typer.Option(help="Of matrices; nothing else decays.", rich_help_panel="Training")]
Beta1 = Annotated[float, typer.Option(help="Of AdamW: the first moment's memory.", rich_help_panel="Training")]
Beta2 = Annotated[float, typer.Option(help="The second moment's.", rich_help_panel="Training")]
Strategy = Annotated[
    str | None,
    typer.Option(
        metavar="ddp|fsdp",
        help="Under torchrun: every rank holds the whole model, or a share of it.",
        rich_help_panel="Training",
    ),
]
MaxGradNorm = Annotated[float, typer.Option(help="Gradients are clipped to this norm.", rich_help_panel="Training")]
Precision = Annotated[
    str,
    typer.Option(
        metavar="float32|bfloat16|float16",
        help="The type that products are computed in, by autocast; float16 with a loss scale.",
        rich_help_panel="Training",
    ),
]
Compile = Annotated[bool, typer.Option("--compile", help="Run through torch.compile.", rich_help_panel="Training")]
CheckpointActivations = Annotated[
    bool,
    typer.Option(
        "--checkpoint-activations",
        help="Compute each decoder again in backward instead of storing what is inside it.",
        rich_help_panel="Training",
    ),
]
MaxSkips = Annotated[
    int,
    typer.Option(
        help="Updates in a row whose loss or gradient may be infinite or NaN; they are skipped.",
        rich_help_panel="Training",
    ),
]


def settings_from(cls: type, given: dict[str, Any], **changed: Any) -> Any:
    """A settings object from a command's arguments by their names."""
    names = inspect.signature(cls).parameters
    return cls(**{name: value for name, value in (given | changed).items() if name in names})


@contextmanager
def training_session(
    label: str,
) -> Iterator[tuple[Callable[[loop.Progress], None], Callable[[str], None], interrupts.Stop]]:
    """What training needs of the terminal: a bar, a voice, and the signals that stop it."""
    from gpt_fast.interrupts import caught

    if follows():
        with caught() as stop:
            yield _nothing, _nothing, stop
        return
    with caught() as stop, training_bar(label) as show:
        yield show, say, stop


def run_folder(out: Path) -> str:
    """Return the last line of a training's result: the run folder, and the picture in it if one could be drawn."""
    return f"{out}, with the curves in loss.png" if (out / "loss.png").exists() else str(out)


def follows() -> bool:
    """Is this a rank other than the first, which prints nothing but errors?"""
    return int(os.environ.get("RANK", "0")) > 0


def _nothing(_: object) -> None:
    """Stands for a display."""
