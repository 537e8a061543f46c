"""Hook of mkdocs: writes the page of the command line from the commands themselves, with typer's own generator."""

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from typer.cli import get_docs_for_click
from typer.core import MARKUP_MODE_KEY

from gpt_fast_cli.app import NAMES, load_command

PAGE = "reference/command-line.md"
INTRODUCTION = """\
# Command line

Every command and option of `gpt-fast`. `gpt-fast COMMAND --help` prints the same on a terminal.

"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page, with one section for each command."""
    files.append(File.generated(config, PAGE, content=INTRODUCTION + "\n".join(map(section, NAMES))))
    return files


def section(name: str) -> str:
    """Return the Markdown of a command: its purpose, usage, arguments and options."""
    command = load_command(name)
    context = typer.Context(command, info_name=name, obj={MARKUP_MODE_KEY: "rich"})
    return get_docs_for_click(obj=command, ctx=context, indent=1, name=name, call_prefix="gpt-fast")
