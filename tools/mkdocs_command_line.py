"""Hook of mkdocs: lists every option on the page of the command line, by typer's own generator."""

import typer
from mkdocs.structure.pages import Page
from typer.cli import get_docs_for_click
from typer.core import MARKUP_MODE_KEY

from gpt_fast_cli.app import NAMES, load_command

PAGE = "reference/command-line.md"


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Return the page's Markdown; reference/command-line.md gets a section for each `gpt-fast` command at its end.

    mkdocs calls this function for each page.
    """
    return "\n".join([markdown, *map(section, NAMES)]) if page.file.src_uri == PAGE else markdown


def section(name: str) -> str:
    """Return the Markdown that documents the command `name` of `gpt-fast`: purpose, usage, arguments and options."""
    command = load_command(name)
    context = typer.Context(command, info_name=name, obj={MARKUP_MODE_KEY: "rich"})
    return get_docs_for_click(obj=command, ctx=context, indent=1, name=name, call_prefix="gpt-fast")
