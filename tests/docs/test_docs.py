"""Test that the examples in README.md, CONTRIBUTING.md and docs/ work as the pages show.

The Python blocks of a page run in order in one process and must print what the page shows. Blocks with a title are
files of the repository, which tests/docs/test_worked_example.py runs. The shell commands of a page run in order in one
empty folder (marked slow). Every command, option and target that a page names must exist. Links must lead to existing
files and headings, and generated tables must be current. A comment right before a block says what the block needs:

    <!-- before: COMMANDS -->           COMMANDS run first, in the same shell. They make files that the page assumes, or
                                        define functions with the names of commands that add options for small sizes.
    <!-- in a clone: COMMANDS -->       The block runs in a new clone, after COMMANDS and the blocks of earlier pages.
    <!-- behind the commands -->        The block is Python that reads what the page's shell commands wrote.

A comment behind `print` ends with the printed text: `print(x)  # 3`. Otherwise a `text` block right after the code
shows the output, in which `…` stands for any text on its line. A `text` block with a title tells the reader why numbers
may differ. Its numbers with a decimal point may be off by 15 %, because the tutorial's differ by 12 % between seeds.

COMMANDS that end with the code 77 tell that an extra is not installed. The block is left out then, with a warning.
"""

import json
import pathlib
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import NamedTuple

import pytest

from benchmarks.measure.environment import ROOT
from gpt_fast import build_info
from gpt_fast_cli.app import NAMES, load_command
from tests.command_line import ENVIRONMENT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
WORKED_EXAMPLE = ROOT / "docs" / "contributing.md"
SUITE = "python -m benchmarks"
PARITY = "python -m benchmarks.parity"
EXTRA_IS_MISSING = 77
IN_A_CLONE, BEHIND = "in a clone", "behind the commands"
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
FENCE = re.compile(
    r"(?:^ *<!-- (?P<where>before|in a clone|behind the commands)(?::\s(?P<before>(?:(?!-->).)+?))?\s-->\n+)?"
    r"^(?P<indent> *)```(?P<language>\w+)(?: title=\"(?P<title>[^\"]+)\")?[^\n]*\n(?P<code>.*?)^(?P=indent)```"
    r"(?:\n+^(?P=indent)```text(?P<about> title=\"[^\"]+\")?\n(?P<output>.*?)^(?P=indent)```)?",
    re.DOTALL | re.MULTILINE,
)
# Runs the blocks in one namespace and prints a JSON list of their outputs.
RUNNER = """
import contextlib, io, json, sys

namespace, printed = {"__name__": "__main__"}, []
for number, code in enumerate(json.load(sys.stdin)):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, f"block {number}", "exec"), namespace)
    printed.append(out.getvalue())
json.dump(printed, sys.stdout)
"""


class Block(NamedTuple):
    where: str | None  # "before", "in a clone" or "behind the commands"
    before: str  # commands that run first
    title: str | None  # path of the file that the block is
    code: str
    output: str | None  # the output, if the page shows it
    about: bool  # the output has a title, so its numbers may differ
    language: str


def blocks(page: pathlib.Path, *languages: str) -> list[Block]:
    found = []
    for match in FENCE.finditer(page.read_text("utf-8")):
        if match["language"] in languages:
            strip = re.compile(f"^{match['indent']}", re.MULTILINE)
            output = match["output"] and strip.sub("", match["output"])
            code = strip.sub("", match["code"])
            about = match["about"] is not None
            before = match["before"] or ""
            found.append(Block(match["where"], before, match["title"], code, output, about, match["language"]))
    return found


def with_blocks(chosen: Callable[[Block], bool]) -> list:
    return [
        pytest.param(page, id=name)
        for page, name in zip(PAGES, IDS, strict=True)
        if any(map(chosen, blocks(page, "python", "sh")))
    ]


def is_python(block: Block) -> bool:
    return block.language == "python" and block.where is None and not block.title


def is_file(block: Block) -> bool:
    """Return True for a file of the repository, which tests/docs/test_worked_example.py writes and runs."""
    return bool(block.title) and block.language in ("python", "cpp")


def is_command(block: Block) -> bool:
    return (block.language == "sh" and block.where != IN_A_CLONE) or block.where == BEHIND


def is_for_a_clone(block: Block) -> bool:
    return block.where == IN_A_CLONE


def assert_prints(printed: str, block: Block) -> None:
    """Assert that `printed` is the output that the page shows, in which `…` stands for any text on its line."""
    shown, told = str(block.output).rstrip("\n"), f"printed:\n{printed}\nshown:\n{block.output}"
    printed = printed.rstrip("\n")
    if block.about:
        decimal = r"\d+\.\d+"
        numbers, expected = (list(map(float, re.findall(decimal, text))) for text in (printed, shown))
        assert numbers == pytest.approx(expected, rel=0.15), told
        printed, shown = (re.sub(decimal, "0.0", text) for text in (printed, shown))
    pattern = "[^\n]*".join(re.escape(part) for part in shown.split("…"))
    assert re.fullmatch(pattern, printed), told


@pytest.mark.parametrize("page", with_blocks(is_python))
def test_python_runs_and_prints_what_the_page_says(page, tmp_path):
    run_python([block for block in blocks(page, "python") if is_python(block)], tmp_path)


def run_python(ran: list[Block], folder: pathlib.Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", RUNNER], input=json.dumps([block.code for block in ran]),
        cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    for block, printed in zip(ran, json.loads(run.stdout), strict=True):
        if block.output is not None:
            assert_prints(printed, block)
            continue
        comments = re.findall(r"^ *print\(.*\)  # (.*)$", block.code, re.MULTILINE)
        lines = printed.splitlines()
        assert len(comments) == len(lines), f"{block.code}\nprinted:\n{printed}"
        for comment, line in zip(comments, lines, strict=True):
            assert comment.endswith(line), f"printed {line!r} where the page says {comment!r}"


def shell_lines(block: Block) -> list[str]:
    """Return the commands of a block with continued lines joined and without comments."""
    joined = re.sub(r"\\\n\s*", "", block.code)
    lines = [re.sub(r"(^|\s+)#.*$", "", line).strip() for line in joined.splitlines()]
    return [line for line in lines if line]


@pytest.mark.slow
@pytest.mark.parametrize("page", with_blocks(is_command))
def test_shell_commands_run(page, tmp_path):
    path = f"{pathlib.Path(sys.executable).parent}:{ENVIRONMENT['PATH']}"
    for block in filter(is_command, blocks(page, "python", "sh")):
        if block.language == "python":
            run_python([block], tmp_path)
        else:
            run_shell(block, tmp_path, ENVIRONMENT | {"PATH": path})


def run_shell(block: Block, folder: pathlib.Path, environment: dict[str, str]) -> None:
    run = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"{block.before}\n{block.code}"],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if run.returncode == EXTRA_IS_MISSING and "exit 77" in block.before:
        warnings.warn(f"not run, because an extra is not installed: {block.code}", stacklevel=2)
        return
    assert run.returncode == 0, f"{block.code}\n{run.stdout}\n{run.stderr}"
    if block.output is not None:
        assert_prints(run.stdout, block)


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> pathlib.Path:
    """Make a clone of the repository, which holds only what is committed."""
    folder = tmp_path_factory.mktemp("clone") / "gpt_fast"
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(folder)], check=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", with_blocks(is_for_a_clone))
def test_commands_run_in_a_clone(page, clone):
    """The commands run without this test's virtual environment, with the machine's Python and default threads."""
    ours = {"OMP_NUM_THREADS", "PYTHONPATH", "VIRTUAL_ENV"}
    environment = {name: value for name, value in ENVIRONMENT.items() if name not in ours}
    path = environment["PATH"].split(":")
    environment["PATH"] = ":".join(p for p in path if p != str(pathlib.Path(sys.executable).parent))
    for block in filter(is_for_a_clone, blocks(page, "sh")):
        run_shell(block, clone, environment)


@pytest.mark.parametrize("page", [pytest.param(p, id=i) for p, i in zip(PAGES, IDS, strict=True)])
def test_every_block_runs_in_a_test(page):
    """Every block belongs to exactly one test. No block has an unknown language or comment, which no test would run."""
    text = page.read_text("utf-8")
    languages = set(re.findall(r"^ *```(\w+)", text, re.MULTILINE))
    assert languages <= {"python", "sh", "cpp", "text"}, languages
    found = blocks(page, *languages)
    outputs = sum(block.output is not None for block in found)
    assert len(found) + outputs == len(re.findall(r"^ *```\w", text, re.MULTILINE))
    assert page == WORKED_EXAMPLE or "cpp" not in languages
    kinds = (is_python, is_file, is_command, is_for_a_clone)
    for block in blocks(page, "python", "sh"):
        assert sum(is_kind(block) for is_kind in kinds) == 1, block
    for comment in re.findall(r"<!--\s((?:(?!-->).)+?)\s-->\n+^ *```", text, re.DOTALL | re.MULTILINE):
        assert re.match(r"before:\s|in a clone(:\s|$)|behind the commands$", comment), comment


def command_options() -> dict[str, set[str]]:
    """Return the options of every `gpt-fast` command, and of `python -m benchmarks` under that name."""
    import typer

    from benchmarks.__main__ import app as suite
    from benchmarks.parity import app as parity

    commands = {name: load_command(name) for name in NAMES} | {
        SUITE: typer.main.get_command(suite),
        PARITY: typer.main.get_command(parity),
    }
    found = {
        name: {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for name, command in commands.items()
    }
    return found | {"bench": found[SUITE]}  # gpt-fast bench passes its arguments on


@pytest.mark.parametrize("page", [pytest.param(p, id=i) for p, i in zip(PAGES, IDS, strict=True) if blocks(p, "sh")])
def test_commands_exist(page):
    """Every `gpt-fast` command and option, `make` target and script that a page names exists."""
    makefile = (ROOT / "Makefile").read_text("utf-8")
    known = command_options()
    for line in (line for block in blocks(page, "sh") for line in shell_lines(block)):
        words = line.split()
        name, arguments = "", []
        if line.startswith((f"{SUITE} ", f"{PARITY} ")):
            name, arguments = " ".join(words[:3]), words[3:]
        elif "gpt-fast" in words and words[-1] != "gpt-fast":
            name, *arguments = words[words.index("gpt-fast") + 1 :]
        if name:
            assert name in known, line
            options = {word.split("=")[0] for word in arguments if word.startswith("--")} - {"--help"}
            assert options <= known[name], f"{line}: no option {', '.join(sorted(options - known[name]))}"
        if words[0] == "make":
            for target in (word for word in words[1:] if re.fullmatch(r"[a-z-]+", word)):
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), line
        for script in (word for word in words if re.fullmatch(r"(examples|benchmarks)/[\w/.-]+\.py", word)):
            assert (ROOT / script).exists(), line


def shown_options() -> tuple[dict[str, set[str]], set[str]]:
    """Return (options of each `gpt-fast` command in the pages' blocks, options in blocks that show an output)."""
    given: dict[str, set[str]] = {}
    with_output = set()
    for block in (block for page in PAGES for block in blocks(page, "sh")):
        for words in map(str.split, shell_lines(block)):
            if "gpt-fast" in words[:-1]:
                name, *arguments = words[words.index("gpt-fast") + 1 :]
                options = {word.split("=")[0] for word in arguments if word.startswith("--")}
                given.setdefault(name, set()).update(options)
                with_output |= options if block.output is not None else set()
    return given, with_output


@pytest.mark.parametrize("command", NAMES)
def test_every_option_has_a_command_with_its_output(command):
    """Each option of a command occurs in a block of some page, and in a block that shows an output.

    For a flag, either of its two forms counts.
    """
    given, with_output = shown_options()
    for parameter in load_command(command).params:
        if parameter.param_type_name == "option" and parameter.name != "help":
            spellings = {*parameter.opts, *parameter.secondary_opts}
            assert spellings & given.get(command, set()), f"no page runs gpt-fast {command} {parameter.opts[0]}"
            assert spellings & with_output, f"no page shows what {parameter.opts[0]} prints"


@pytest.mark.parametrize("page", [pytest.param(p, id=i) for p, i in zip(PAGES, IDS, strict=True)])
def test_links_lead_somewhere(page):
    """The files and headings to which pages link, and the images that they show, exist."""
    text = FENCE.sub("", page.read_text("utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"<img[^>]* src=\"([^\"]+)\"", text):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        if anchor and linked.suffix == ".md":
            assert anchor in headings(linked), target


def headings(page: pathlib.Path) -> set[str]:
    """Return the anchors of a page: of its headings, of included files, and of its API blocks (`:::`)."""
    included = re.compile(r'^--8<-- "([^":]+).*$', re.MULTILINE)
    text = included.sub(lambda found: (ROOT / found[1]).read_text("utf-8"), page.read_text("utf-8"))
    text = FENCE.sub("", text)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    slugs = {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}
    return slugs | set(re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE))


@pytest.mark.skipif(build_info() is None, reason="the extension is not built: its kernels cannot be listed")
def test_support_table_is_current():
    run = [sys.executable, "-c", "from benchmarks.report import support; print(support.table(), end='')"]
    table = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert table in (ROOT / "README.md").read_text("utf-8"), "README.md is out of date: make report"
