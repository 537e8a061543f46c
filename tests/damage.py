"""Damage a file at random, from a fixed seed: its bytes, the values in it, or its kind (a folder, a pipe, ...)."""

import functools
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tests.command_line import Cli, Data, succeed

DRAWS = 32  # damages for each case
SECONDS, MEMORY = 60, 12 << 30  # the limits for one command
DEEP = 100_000
# JSON values that no field of any file expects, or that are too large for most fields.
HARM = [
    "null", "true", "-1", "0", "1e18", str(10**18), str(2**63), "NaN", "1e999", "-Infinity", '"x"', '""', "[]", "{}",
    "[" * 70 + "]" * 70, "[" * DEEP + "]" * DEEP, "9" * 5000, '"' + "x" * 100_000 + '"', '{"a": 1}', "[null]",
]  # fmt: skip
YAML_HARM = [
    "a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]\n",
    "steps: !!python/object/apply:os.system ['true']\n",
    "steps: 5\nsteps: 6\n",
    "? [1, 2]\n: 3\n",
    "steps: 2001-99-99\n",
    "steps: !!int 'x'\n",
    "steps: {a: " * 200 + "1" + "}" * 200,
    "- steps\n",
    "seed: yes\n",
]


class Damage(NamedTuple):
    text: str
    apply: Callable[[Path], None]
    edit: bool = False  # a person might have made this edit on purpose, so the command's output may differ


class Case(NamedTuple):
    run: str
    file: str
    command: Callable[[Path, Data], list]


def flipped(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]


def zeroed(content: bytes, draw: random.Random) -> bytes:
    place, length = draw.randrange(len(content)), draw.choice([1, 16, 512])
    return content[:place] + bytes(min(length, len(content) - place)) + content[place + length :]


BYTES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "a bit flipped": flipped,
    "zeros": zeroed,
    "cut off": lambda content, draw: content[: draw.randrange(len(content))],
    "empty": lambda content, draw: b"",
    "bytes added": lambda content, draw: content + draw.randbytes(draw.choice([1, 100])),
    "bytes inserted": lambda content, draw: (
        content[: (place := draw.randrange(len(content)))] + draw.randbytes(3) + content[place:]
    ),
    "another kind of file": lambda content, draw: draw.choice(
        [b"\x80\x04.", b"PK\x03\x04" + bytes(60), b"\xff\xfea\0"]
    ),
    "all zeros": lambda content, draw: bytes(len(content)),
}


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_link(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def sparse(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(20 << 30)


KINDS: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "a folder": a_folder,
    "a pipe": a_pipe,
    "a link to nothing": functools.partial(a_link, target="none"),
    "a link to itself": lambda path: a_link(path, path.name),
    "an endless device": functools.partial(a_link, target="/dev/zero"),
    "sparse": sparse,
}


def places(value: Any, here: tuple = ()) -> Iterator[tuple]:
    """Yield the path of each value inside `value`, at most 40 for each list or dictionary."""
    inside = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for name, inner in inside[:40]:
        yield (*here, name)
        yield from places(inner, (*here, name))


def at(value: Any, place: tuple) -> Any:
    return functools.reduce(lambda value, name: value[name], place, value)


def changed_values(content: bytes, draw: random.Random) -> tuple[str, bytes, bool]:
    """Change one value of the JSON in `content`: replace, remove, rename, repeat or add it.

    Return a description, the new content, and whether a person might have made this edit on purpose.
    """
    value, mark = json.loads(content), "the place of the value"
    place = draw.choice(list(places(value)))
    outer, name, before = at(value, place[:-1]), place[-1], at(value, place)
    kind = draw.choice(["value"] * 5 + ["missing", "renamed", "twice", "unknown"])
    where = ".".join(map(str, place))
    if kind == "value" or not isinstance(outer, dict):
        harm = draw.choice(HARM)
        outer[name] = mark
        text = json.dumps(value).replace(json.dumps(mark), harm)
        try:
            after = json.loads(harm)
        except (ValueError, RecursionError):
            return f"{where} is {harm[:30]}", text.encode(), False
        number = isinstance(before, int | float) and isinstance(after, int | float)
        same = type(before) is type(after) or (number and bool not in (type(before), type(after)))
        return f"{where} is {harm[:30]}", text.encode(), same or None in (before, after)
    if kind == "twice":
        outer[mark] = draw.choice([before, None])
        text = json.dumps(value).replace(json.dumps(mark), json.dumps(name))
        return f"{where} twice", text.encode(), False
    if kind == "unknown":
        outer["unknown"] = before
        return f"{where} copied to an unknown name", json.dumps(value).encode(), place[0] in ("model", "model_vocab")
    del outer[name]
    if kind == "renamed":
        outer[f"{name}x"] = before
    return f"{where} {kind}", json.dumps(value).encode(), True  # many fields have a default


def is_part(now: Any, before: Any) -> bool:
    """Return True if every setting in `now` has its value of `before`. Settings of `before` may be missing."""
    return isinstance(now, dict) and now.items() <= before.items()


def skeleton(content: bytes) -> Any:
    """Return the names and types in a file of JSON or YAML, or None if the file is neither."""
    try:
        lines = content.decode().splitlines()
        value = [json.loads(line) for line in lines] if lines and lines[0].endswith("}") else yaml.safe_load(content)
    except (ValueError, yaml.YAMLError):
        return None
    return _types(value)


def _types(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _types(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_types(inner) for inner in value]
    return "number" if type(value) in (int, float) else str(type(value))


def drawn(path: Path, draw: random.Random) -> Damage:
    """Draw a damage of the file at `path`."""
    content = path.read_bytes()
    structured = path.suffix in (".json", ".jsonl")
    kind = draw.choice(["bytes", "kind"] + ["values"] * 3 * structured + ["yaml"] * 2 * (path.suffix == ".yaml"))
    if kind == "kind":
        name = draw.choice(list(KINDS))
        return Damage(name, KINDS[name])
    if kind == "yaml":
        text = draw.choice(YAML_HARM)
        if draw.random() < 0.5:
            return Damage(f"{text[:20]!r}", lambda path: path.write_text(text))
        lines = content.decode().splitlines()
        place = draw.randrange(len(lines))
        value = draw.choice([harm for harm in HARM if len(harm) < 1000])
        lines[place] = f"{lines[place].partition(':')[0]}: {value}"
        return Damage(lines[place], lambda path: path.write_text("\n".join(lines)), edit=True)
    if kind == "values":
        lines = content.splitlines() if path.suffix == ".jsonl" else [content]
        place = draw.randrange(len(lines))
        text, lines[place], edit = changed_values(lines[place], draw)
        return Damage(text, lambda path: path.write_bytes(b"\n".join(lines) + b"\n"), edit)
    name = draw.choice(list(BYTES))
    after = BYTES[name](content, draw)
    # Changed digits, letters, tokens and weights count as edits: the file is valid, and nothing in it shows the damage.
    before, now = skeleton(content), skeleton(after)
    same = after == content or (now is not None and now == before) or (path.suffix == ".yaml" and is_part(now, before))
    weights = path.suffix in (".safetensors", ".pt") and len(after) == len(content)
    return Damage(name, lambda path: path.write_bytes(after), same or weights or path.name == "tokenizer.json")


def check(cli: Cli, data: Data, whole: Path, folder: Path, name: str, case: Case) -> None:
    """Damage copies of `whole` inside `folder` and run the command on each.

    The command must either report an error that names the damaged run, or print the output of the whole run. Where a
    person might have made the edit, it may print another output. It must end within the limits of time and memory.
    """
    bounds = {"seconds": SECONDS, "memory": MEMORY}

    def result(damage: Damage | None) -> tuple[Path, Any]:
        shutil.rmtree(folder / "at", ignore_errors=True)
        run = folder / "at" / "run"
        shutil.copytree(whole, run)
        if damage is not None:
            damage.apply(run / case.file)
        return run, cli(*case.command(run, data), **bounds)

    _, right = result(None)
    succeed(right)
    wrong = []
    for i in range(DRAWS):
        damage = drawn(whole / case.file, random.Random(f"{name} {i}"))
        run, found = result(damage)
        lines = [line for line in found.err.splitlines() if line.startswith("gpt-fast: ")]
        refused = found.code == 2 and found.out == "" and str(run) in lines[-1] and "Traceback" not in found.err
        same = damage.edit or without_times(found.out) == without_times(right.out)
        if not refused and not (found.code == 0 and same):
            wrong.append(f"{i} {damage.text}: {found.code} {found.out[-200:]} {found.err[-400:]}")
    assert not wrong, "\n".join(wrong)


def without_times(text: str) -> str:
    return re.sub(r"[\d.,]+ (s|min|tokens/s)\b", "", text)
