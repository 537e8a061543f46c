"""Errors of the command line itself, in the form of all others: what came, and what is expected."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import typer
from typer.core import TyperCommand

_COLUMNS = ("text_column", "pair_column", "label_column", "columns")
_FILES = ("data", "more_data", "valid")  # beside those whose type is a path
# Texts that may be blank, and names whose own check lists what is valid.
_ELSEWHERE = ("prompt", "question", "text", "pair", "stop", "skip_label", "preset", "task", "tokenizer", "form")


class Command(TyperCommand):
    """Command that refuses blank paths, names of columns and other values that say nothing.

    An empty path would become the current folder: `--data "$FILES"` with an unset variable reads all that lies there.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line `args` into `ctx`, as click does, and return the arguments that are left.

        Raise typer's usage error if an option or argument has a blank value and may not: a path, the name of a column
        or another value that says nothing when blank.
        """
        values, _, _ = self.make_parser(ctx).parse_args(list(args))
        for param in self.params:
            given = values.get(str(param.name))
            for value in given if isinstance(given, list | tuple) else [given]:
                if isinstance(value, str) and not value.strip() and (expected := _expected(param)):
                    name = param.opts[0] if param.opts[0].startswith("-") else str(param.metavar or param.name)
                    ctx.fail(f"{name} {value!r}: expected {expected}")
        return super().parse_args(ctx, args)


def _expected(param: Any) -> str:
    """Return what a parameter of the command line expects, for a message, or "" if its value may be blank.

    Examples are "a path", "the name of a column", "auto or cpu or cuda" and "a value". `param` is click's parameter.
    """
    if param.name in _COLUMNS:
        return "the name of a column"
    annotation = param.get_runtime_param().annotation
    if param.name in _FILES or Path in (annotation, *get_args(annotation)):
        return "a path"
    if str not in (annotation, *get_args(annotation)) or param.name in _ELSEWHERE:
        return ""
    return " or ".join(param.metavar.split("|")) if "|" in (param.metavar or "") else "a value"


def no_such_command(name: str, known: tuple[str, ...]) -> str:
    """Return the message for an unknown command `name`, with the nearest of the `known` commands or all of them."""
    from gpt_fast_settings.declaration import did_you_mean

    return f"{name}: no such command" + (did_you_mean(name, known) or f"; expected one of {', '.join(known)}")


def message(error: typer.TyperException) -> str:
    """Return a one-line message for an error that typer raised while parsing the command line.

    It names the option, its value and what is expected, or for an unknown option the nearest one. Other errors keep
    typer's message.
    """
    from gpt_fast_settings.declaration import did_you_mean, expectation, shortened

    text: str = error.format_message()
    param: Any = getattr(error, "param", None)
    context: Any = getattr(error, "ctx", None)
    option: str | None = getattr(error, "option_name", None)
    errors = getattr(error.__cause__, "errors", None)  # pydantic's
    if param is not None and errors is not None:
        (found, *_) = errors()
        _, choices, listed = found["msg"].partition(" is not one of ")
        names = re.findall(r"'([^']*)'", listed)
        expected = f"one of {', '.join(names)}" if choices else expectation(found)
        near = did_you_mean(str(found["input"]), names) if choices else ""
        return f"{param.opts[0]} {shortened(found['input'])}: expected {expected}{near}"
    if text.startswith("Missing ") and param is not None:
        return f"{param.opts[0]}: missing ({param.help})"
    if option is not None and hasattr(error, "possibilities"):
        known = [name for each in context.command.params for name in (*each.opts, *each.secondary_opts)]
        hint = did_you_mean(option, [name for name in known if name.startswith("--")])
        return f"{option}: no such option{hint or f'; {context.command_path} --help lists them'}"
    if option is not None:
        return f"{option}: " + (
            "has a value; expected none" if "does not take" in text else "has no value; expected one"
        )
    if stray := re.fullmatch(r"Got unexpected extra argument\S* \((.*)\)", text):
        return f"unexpected argument {stray[1]}; expected options, which {context.command_path} --help lists"
    return text
