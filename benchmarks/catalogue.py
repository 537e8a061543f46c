"""Find the topics: every file of benchmarks/ops and benchmarks/jobs that defines `TOPIC` or `STUDY`.

Nothing is listed here. A new file is found because it is there.
"""

import functools
import importlib
from pathlib import Path

from benchmarks.topic import SUITES, Case, Study, Topic
from gpt_fast import ops as gpt_fast_ops

_FOLDER = Path(__file__).resolve().parent


def _find(folder: str) -> list[Topic | Study]:
    """Import each Python file in benchmarks/`folder`, and return a list with the `TOPIC` or else the `STUDY` of each.

    `folder` is "ops" or "jobs". The order is that of the files' names. Files whose names begin with an underscore are
    helpers and are left out. Raise `AttributeError` if a file has neither.
    """
    names = sorted(path.stem for path in (_FOLDER / folder).glob("[!_]*.py"))
    modules = [importlib.import_module(f"benchmarks.{folder}.{name}") for name in names]
    return [module.TOPIC if hasattr(module, "TOPIC") else module.STUDY for module in modules]


@functools.cache
def ops() -> dict[str, Topic]:
    """Return {name of an op: its `Topic`}, with the op's implementations and cases to time.

    The order is that of `gpt_fast.ops.NAMES`. Ops that are not in NAMES come last, by file name.
    """
    order = {name: place for place, name in enumerate(gpt_fast_ops.NAMES)}
    found = [topic for topic in _find("ops") if isinstance(topic, Topic)]
    return {topic.name: topic for topic in sorted(found, key=lambda topic: order.get(topic.name, len(order)))}


@functools.cache
def topics() -> dict[str, Topic]:
    """Return {name: `Topic`}: ops in the order of `gpt_fast.ops.NAMES`, then the jobs of suites "train" and "decode".

    A job is a task of a whole model, such as a training step. A topic compares implementations case by case. Studies,
    which have a table of their own, are not included.
    """
    jobs = [topic for topic in _find("jobs") if isinstance(topic, Topic)]
    return ops() | {topic.name: topic for topic in sorted(jobs, key=_place)}


@functools.cache
def studies() -> dict[str, Study]:
    """Return {name: `Study`} for the studies in benchmarks/jobs: suite "ops" first, then "train", then "decode".

    A study is a measurement with a table of its own, unlike a topic, which compares implementations case by case.
    """
    found = [study for study in _find("jobs") if isinstance(study, Study)]
    return {study.name: study for study in sorted(found, key=_place)}


def _place(topic: Topic | Study) -> int:
    """Return the index of the topic's or study's suite, as a sort key: 0 for "ops", 1 for "train", 2 for "decode"."""
    return SUITES.index(topic.suite)


def select(suite: str) -> list[Topic | Study]:
    """Return the topics (ops and whole-model jobs) and then the studies that --suite names; `suite` is its value.

    `suite` is "all", the name of a suite ("ops", "train" or "decode"), or the name of one topic or study. A study is a
    measurement with a table of its own.

    Raises:
        ValueError: if there is no suite, topic or study of that name.
    """
    everything: list[Topic | Study] = [*topics().values(), *studies().values()]
    found = [topic for topic in everything if suite in ("all", topic.suite, topic.name)]
    if not found:
        names = ", ".join(topic.name for topic in everything)
        raise ValueError(f"--suite is {suite}; expected {', '.join(SUITES)} or all, or one of {names}")
    return found


def cases(topic: Topic, device: str, quick: bool = False) -> list[Case]:
    """Return the cases to time of a topic, which is an op or job, on `device`, "cpu" or "cuda".

    A case has sizes, a dtype and a dropout probability. With `quick` there are only the cases that are marked for a
    quick run, perhaps none.
    """
    return [case for case in topic.cases(device) if case.quick or not quick]
