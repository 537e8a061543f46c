"""Rules for the labels of a column: one for the whole column, or an error where two are possible."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence

ANSWERS = ("text", "letters", "0", "1")  # how a column names one of several answers
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_CODE = re.compile(r"[+-]?0\d")  # 007 is a name, not the number 7
Place = Callable[[int], str]


def number(label: str) -> float | None:
    """Return the finite number that a label such as "-1", "2.5e3" or "007" spells; None if it spells none.

    A label with spaces, "inf" and "nan" spell none.
    """
    if not _NUMBER.fullmatch(label):
        return None
    value = float(label)
    return value if math.isfinite(value) else None


def is_same_label(label: str, other: str) -> bool:
    """Return True for equal labels and for two spellings of one number, such as -1 and -1.0."""
    return label == other or (number(label) is not None and number(label) == number(other))


def class_names(source: str, column: str, labels: Sequence[str], place: Place) -> list[str]:
    """Return the classes of a label column, each once.

    If all labels are numbers, labels of equal value, such as 1 and 1.0, are one class. The classes are then sorted by
    value, each in its shortest spelling. In any other column, each different label is a class, and the classes are
    sorted as texts. A label such as 007, with a leading 0 before another digit, is not a number here. `labels` holds
    the label of each row. Messages name the file `source`, the column `column` and the position `place(row)` of a row,
    "line 5" for example.

    Raise `ValueError` if not all labels are numbers and two of them may be one class: they differ only in case, or
    spell one number, such as 1 and 1.0. Also raise it if a label may mark rows without a label: -1 in a column of whole
    numbers from -1 on with 0 among them, or "-" in any other column without "+". The message asks the user to skip
    that label by --skip-label or to list the classes by --labels.
    """
    rows: dict[str, int] = {}
    for row, label in enumerate(labels):
        rows.setdefault(label, row)
    where = f"{source}: column {column!r}"
    found = _as_numbers(rows)
    if found is not None:
        values, least = set(found), min(found)
        if least == -1 and 0 in values and all(value.is_integer() for value in values):
            marks = [place(row) for row, label in enumerate(labels) if number(label) == -1]
            raise ValueError(_two_readings(where, "-1", marks, [_spelled(value) for value in sorted(values)]))
        return [_spelled(value) for value in sorted(values)]
    alike: dict[object, str] = {}
    for label, row in rows.items():
        value = number(label)
        for key in (label.casefold(), value):
            other = alike.setdefault(key, label) if key is not None else label
            if other != label:
                raise ValueError(
                    f"{where} holds {other!r} ({place(rows[other])}) and {label!r} ({place(row)}), which may be one "
                    f"class or two; expected one spelling of each class, or --labels {','.join(sorted(rows)[:12])}"
                )
    if "-" in rows and "+" not in rows:
        marks = [place(row) for row, label in enumerate(labels) if label == "-"]
        raise ValueError(_two_readings(where, "-", marks, sorted(rows)))
    return sorted(rows)


def _as_numbers(labels: Iterable[str]) -> list[float] | None:
    """Return the values of `labels` if there are any and all of them are numbers, else None.

    Labels such as 007, with a leading 0 before another digit, are no numbers.
    """
    values = [None if _CODE.match(label) else number(label) for label in labels]
    found = [value for value in values if value is not None]
    return found if found and len(found) == len(values) else None


def _spelled(value: float) -> str:
    """Return the shortest spelling of a number: "2" for 2.0, "0.5" for 0.5."""
    return str(int(value)) if value.is_integer() else repr(value)


def _two_readings(where: str, mark: str, marks: list[str], names: Sequence[str]) -> str:
    """Return the error message for a label `mark` that may be a class or mark rows without a label.

    `where` names the file and the column, `marks` are the positions of the rows with that label, and `names` are the
    classes that the message suggests to list. It shows at most 3 positions and 12 classes.
    """
    listed = ", ".join(marks[:3]) + (", …" if len(marks) > 3 else "")
    return (
        f"{where} holds {mark} in {len(marks):,} rows ({listed}), which may be a class or mark rows without a label; "
        f"expected --skip-label={mark} to skip them, or --labels={','.join(names[:12])} to list the classes"
    )


def class_rule(names: Sequence[str], listed: bool) -> str:
    """Return a description of the classes and their order for the user, such as "integers 0..4, sorted by value".

    `names` are the classes, of which at most 12 are written out; `listed` is True if the user listed them with
    --labels. Other forms are "b, a (as --labels lists them)", "a, b (2 texts, sorted)" and "1, 3 (2 integers, sorted by
    value)".
    """
    shown = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
    if listed:
        return f"{shown} (as --labels lists them)"
    values = _as_numbers(names)
    if values is None:
        return f"{shown} ({len(names)} texts, sorted)"
    if values == list(range(int(values[0]), int(values[0]) + len(values))):
        return f"integers {names[0]}..{names[-1]}, sorted by value"
    kind = "integers" if all(value.is_integer() for value in values) else "numbers"
    return f"{shown} ({len(names)} {kind}, sorted by value)"


def class_index(names: Sequence[str]) -> Callable[[str], int | None]:
    """Return a function that maps a label to its index in `names`, or to None if `names` lacks it.

    The function strips the label. If all names are numbers, a label that is no name as it stands is compared by value:
    1.0 has the index of 1, but 01 has none.
    """
    exact = {name: i for i, name in enumerate(names)}
    values = _as_numbers(names)
    by_value = {value: i for i, value in enumerate(values)} if values is not None else {}

    def index(label: str) -> int | None:
        """Return the index of the stripped `label` in the list of classes, or None if it is not there.

        The list is `names`, the argument of `class_index`. If all names are numbers, a label that is no name as it
        stands is compared by value.
        """
        label = label.strip()
        if label in exact:
            return exact[label]
        value = None if _CODE.match(label) else number(label)
        return None if value is None else by_value.get(value)

    return index


def answer_index(reading: str, label: str, choices: Sequence[str]) -> int | None:
    """Return the index in `choices` that a label names, or None if it names no choice.

    `reading` is how the label names it, one of `ANSWERS`: by a choice's text without spaces around ("text"), by one
    letter from A on in either case ("letters"), or by a whole number that counts from 0 ("0") or from 1 ("1"). If
    several choices have that text, the first is taken.
    """
    if reading == "text":
        stripped = [choice.strip() for choice in choices]
        return stripped.index(label) if label in stripped else None
    if reading == "letters":
        place = ord(label.upper()) - ord("A") if len(label) == 1 else -1
    else:
        value = number(label)
        place = int(value) - int(reading) if value is not None and value.is_integer() else -1
    return place if 0 <= place < len(choices) else None


def answer_reading(source: str, labels: Sequence[str], choices: Sequence[Sequence[str]], place: Place) -> str:
    """Return the way in which the labels of a column name the right choice: "text", "letters" or "0".

    These are the choice's text, a letter from A on, and a number that counts from 0 (see `answer_index`). A way is
    possible if every row's label names a choice by it. If several ways are possible and name the same choice in every
    row, the first of them is returned. `labels` and `choices` hold the label and the list of choices of each row.

    Raise `ValueError` if no way is possible, or if two possible ways name different choices in a row. Also raise it if
    the labels can only be numbers that count from 1, which the user has to confirm by --answers 1. Messages name the
    file `source` and the position `place(row)` of a row, "line 5" for example.
    """
    found = {
        reading: [answer_index(reading, label, each) for label, each in zip(labels, choices, strict=True)]
        for reading in ANSWERS
    }
    possible = [reading for reading in ANSWERS if None not in found[reading]]
    if not possible:
        best = max(ANSWERS, key=lambda reading: sum(index is not None for index in found[reading]))
        row = found[best].index(None)
        served = sum(index is not None for index in found[best])
        others = f" as in {served:,} of {len(labels):,} rows" if served else ""
        known = f"{_letters(len(choices[row]))}, 0 to {len(choices[row]) - 1}"
        raise ValueError(
            f"{source}, {place(row)}: unknown label {labels[row]!r}; expected {ANSWER_NAMES[best]}{others}, one way "
            f"in the whole column: an answer's text, or one of {known}"
        )
    for reading in possible[1:]:
        for row, (one, other) in enumerate(zip(found[possible[0]], found[reading], strict=True)):
            if one != other:
                raise ValueError(
                    f"{source}, {place(row)}: answer {labels[row]!r} may be {ANSWER_NAMES[possible[0]]} or "
                    f"{ANSWER_NAMES[reading]}; expected --answers {possible[0]} or --answers {reading}"
                )
    if possible == ["1"]:
        row = max(range(len(labels)), key=lambda i: number(labels[i]) or 0)
        raise ValueError(
            f"{source}, {place(row)}: answer {labels[row]!r} of {len(choices[row])} counts from 1; expected numbers "
            "that count from 0, or --answers 1"
        )
    return possible[0]


ANSWER_NAMES = {
    "text": "an answer's text", "letters": "a letter", "0": "a number that counts from 0",
    "1": "a number that counts from 1",
}  # fmt: skip


def _letters(count: int) -> str:
    """Return the letters that name `count` choices, at most 26, with commas between them: "A, B, C"."""
    return ", ".join(chr(ord("A") + i) for i in range(min(count, 26)))
