"""JSON and YAML files that hold one object, parsed within limits.

A file may come from anybody. Its size and its nesting are limited, a name may be given once, and YAML aliases, with
which a few lines can stand for gigabytes, are refused.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

LIMIT = 64 << 20  # bytes
YAML_LIMIT = 1 << 18  # bytes, of which a second parses some ten thousand
DEPTH = 64  # lists and objects inside each other


def read_object(path: Path, *, limit: int = LIMIT, non_finite: bool = False) -> dict[str, Any]:
    """Return the JSON object in a file as a dict. Numbers must be finite unless `non_finite`.

    Raise `FileNotFoundError` if there is no regular file at `path`. Raise `ValueError` if it has more than `limit`
    bytes (64 MiB by default) or is not JSON. Raise it too if the file is nested more than `DEPTH` (64) deep, gives a
    name twice or holds something else than an object.
    """
    return checked_object(path, parse_json(path, read_bytes(path, limit), non_finite=non_finite))


def read_bytes(path: Path, limit: int = LIMIT) -> bytes:
    """Return the content of a regular file of at most `limit` bytes, by default 64 MiB.

    Raise `FileNotFoundError` if there is no regular file at `path`, and `ValueError` if it is larger.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: " + ("not a regular file" if path.exists() else "no such file"))
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path}: has {path.stat().st_size:,} bytes; expected at most {limit:,}")
    return content


def parse_json(path: Path, content: bytes, *, non_finite: bool = False) -> Any:
    """Return the JSON value in `content`, UTF-8 bytes of the file at `path`, which is only named in messages.

    Raise `ValueError` if it is not JSON, is nested more than `DEPTH` (64) deep, or gives a name twice in an object.
    Unless `non_finite`, NaN and numbers that are infinite as floats raise `ValueError` too.
    """
    given: dict[str, Any] = {} if non_finite else {"parse_constant": _finite, "parse_float": _finite}
    try:
        value = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_object, **given)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except RecursionError:
        raise ValueError(f"{path}: is nested too deep; expected at most {DEPTH} levels") from None
    if depth(value) > DEPTH:
        raise ValueError(f"{path}: is nested too deep; expected at most {DEPTH} levels")
    return value


def parse_yaml(path: Path, content: bytes) -> Any:
    """Return the YAML value in `content`, UTF-8 bytes of the file at `path`, which is only named in messages.

    An empty file gives None. Raise `ValueError` if it is not YAML of plain values, is nested more than `DEPTH` (64)
    deep, has an alias or gives a name twice in a mapping.
    """
    import yaml  # costs the start of the command line a tenth

    class Loader(yaml.SafeLoader):
        levels = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            """Compose the next node as PyYAML does. Raise `MarkedYAMLError` for an alias or over `DEPTH` levels."""
            if self.check_event(yaml.AliasEvent):
                mark = self.peek_event().start_mark
                raise yaml.MarkedYAMLError(None, None, "has an alias; expected each value written out", mark)
            self.levels += 1
            if self.levels > DEPTH:
                mark = self.peek_event().start_mark
                raise yaml.MarkedYAMLError(None, None, f"is nested more than {DEPTH} deep", mark)
            node = super().compose_node(parent, index)
            self.levels -= 1
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            """Construct a dict from a mapping as PyYAML does. Raise `MarkedYAMLError` if a name occurs twice in it."""
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for key, _ in node.value:
                if names.count(key.value) > 1:
                    raise yaml.MarkedYAMLError(None, None, f"gives {key.value!r} twice", key.start_mark)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(content.decode("utf-8-sig"), Loader)
    except (ValueError, yaml.YAMLError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from None


def checked_object(path: Path, value: Any) -> dict[str, Any]:
    """Return `value` if it is a dict, else raise `ValueError`. The message names the file `path` that holds it."""
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}; expected an object")
    return value


def depth(value: Any) -> int:
    """Return how deep lists and dicts are nested in `value`: 0 for a number, 1 for a flat or empty list."""
    level, waiting = 0, [value]
    while waiting := [value for value in waiting if isinstance(value, dict | list)]:
        level += 1
        waiting = [inner for outer in waiting for inner in (outer.values() if isinstance(outer, dict) else outer)]
    return level


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the dict of a JSON object's (name, value) pairs. Raise `ValueError` if a name occurs twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"gives {next(name for name in values if names.count(name) > 1)!r} twice")
    return values


def _finite(text: str) -> float:
    """Return the number that `text` spells in JSON. Raise `ValueError` if it is NaN or infinite."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"has the number {text}; expected finite numbers")
    return value
