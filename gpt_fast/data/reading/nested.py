"""Nested forms of well-known data sets as rows of a table: SQuAD's file, RACE's articles, ARC's choices."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count
from typing import Any

Row = dict[str, object]


def is_squad(articles: object) -> bool:
    """Return True if `articles` has the form of SQuAD's `data`: a list, not empty, of objects with `paragraphs`."""
    return (
        isinstance(articles, list)
        and bool(articles)
        and all(isinstance(entry, dict) and "paragraphs" in entry for entry in articles)
    )


def squad_rows(source: str, articles: list[Any]) -> Iterator[tuple[str, Row]]:
    """Yield ("row 5", row) for each question in SQuAD's list of articles, counted from 1. `source` is for messages.

    A row has the fields title, context, id and question, like Hugging Face's copy, with None for one that the file
    lacks. If the question has `answers`, the row has `answers` too: a dict of the lists `text` and `answer_start`,
    which are empty for a question without an answer, as in SQuAD 2.0. Raise `ValueError` if `paragraphs`, `qas` or
    `answers` is not a list of objects.
    """
    number = count(1)
    for article in articles:
        for paragraph in _objects(source, article, "paragraphs"):
            for question in _objects(source, paragraph, "qas"):
                row = {"title": article.get("title"), "context": paragraph.get("context")}
                row |= {name: question.get(name) for name in ("id", "question")}
                if "answers" in question:
                    answers = _objects(source, question, "answers")
                    row["answers"] = {name: [each.get(name) for each in answers] for name in ("text", "answer_start")}
                yield f"row {next(number)}", row


def unnested(place: str, row: Row) -> Iterator[tuple[str, Row]]:
    """Convert `row`, one object of a file, to rows of a table, and yield (place, row) for each of them.

    `place` is the position of `row` in the file, such as "row 5". An article of RACE has the field `article` and the
    lists `questions`, `options` and `answers`. It makes a row with id, article, question, options and answer for each
    question, and their places are "row 5, question 1" and so on. `answer` is the entry of `answers`, in RACE a letter.

    A row of ARC has `choices`: a dict of the lists `text` and `label`, or a list of dicts with these keys. Its
    `question` may be a dict with the text in `stem`, which then holds `choices` too. It makes one row at the same
    place, whose `question` is a text and whose `choices` are a list of texts. Its other fields stay. If `answerKey` is
    one of the labels, the field `answer` is added: the index of the right choice, counted from 0. Objects in neither
    form are yielded unchanged.
    """
    questions, choices = row.get("questions"), row.get("choices")
    parts = [row.get(name) for name in ("questions", "options", "answers")]
    if "article" in row and isinstance(questions, list) and all(isinstance(part, list) for part in parts):
        for number, question in enumerate(questions):
            answers, options = (row[name][number : number + 1] for name in ("answers", "options"))  # type: ignore[index]
            several = {"question": question, "options": [*options, None][0], "answer": [*answers, None][0]}
            yield f"{place}, question {number + 1}", {"id": row.get("id"), "article": row["article"], **several}
        return
    question = row.get("question")
    if isinstance(question, dict) and "stem" in question:
        question, choices = question["stem"], question.get("choices")
    if (
        isinstance(choices, list)
        and choices
        and all(isinstance(c, dict) and {"text", "label"} <= c.keys() for c in choices)
    ):
        choices = {name: [choice[name] for choice in choices] for name in ("text", "label")}
    if isinstance(choices, dict) and all(isinstance(choices.get(name), list) for name in ("text", "label")):
        row = row | {"choices": choices["text"]} | ({"question": question} if "question" in row else {})
        if row.get("answerKey") in choices["label"]:  # some of ARC's rows count from 1, most have letters
            row["answer"] = choices["label"].index(row["answerKey"])
    yield place, row


def _objects(source: str, value: Row, name: str) -> list[Row]:
    """Return the list of objects in the field `name` of `value`, a part of SQuAD's nested form.

    Raise `ValueError` if the field is missing or is something else. `source` names the file in the message.
    """
    found = value.get(name)
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise ValueError(f"{source}: {name} of SQuAD's form is {json.dumps(found)[:40]}; expected a list of objects")
    return found
