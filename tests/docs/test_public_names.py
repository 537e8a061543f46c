"""Test the docstrings of the public names: they name every argument, and their examples run and print what they show.

ruff compares the arguments that a docstring lists with the signature (D417, DOC102), but accepts a docstring that lists
none, and does not read the docstrings of classes. griffe, which parses docstrings for the documentation, checks these.
"""

import contextlib
import dataclasses
import importlib
import inspect
import io
import re
from collections.abc import Callable, Iterator

import griffe
import pytest
import torch

import gpt_fast
from gpt_fast import data, layers, ops, training
from gpt_fast.generation import GenerateOutput
from gpt_fast.heads.base import Head, HeadOutput
from gpt_fast.integrations import report, sdpa
from tests.docs.test_docs import PAGES

NEED_CUDA = {"gpt_fast.training.GraphedStep"}


def public() -> dict[str, object]:
    """Return the functions and classes that users import, by name."""
    found = {f"gpt_fast.{name}": getattr(gpt_fast, name) for name in gpt_fast.__all__}
    found |= {f"gpt_fast.ops.{name}": getattr(ops, name) for name in ops.__all__}
    found |= {f"gpt_fast.data.{name}": getattr(data, name) for name in data.__all__}
    found |= {f"gpt_fast.training.{name}": getattr(training, name) for name in training.__all__}
    found |= {f"gpt_fast.layers.{name}": getattr(layers, name) for name in LAYERS}
    found |= {f"gpt_fast.integrations.sdpa.{name}": getattr(sdpa, name) for name in SDPA}
    found |= {f"{value.__module__}.{value.__name__}": value for value in (Head, HeadOutput, GenerateOutput)}
    found["gpt_fast.integrations.report.Report"] = report.Report
    return {name: value for name, value in found.items() if inspect.isclass(value) or inspect.isroutine(value)}


# Modules whose functions and classes compute on tensors.
COMPUTE = {f"gpt_fast.ops.{name}" for name in (*ops.NAMES, "linear")} | {
    "gpt_fast.layers", "gpt_fast.model", "gpt_fast.heads.language", "gpt_fast.heads.classifiers",
    "gpt_fast.generation.session", "gpt_fast.generation.text", "gpt_fast.scoring",
}  # fmt: skip
LAYERS = ("LayerNorm", "SelfAttention", "MLP", "TransformerDecoder")
SDPA = ("Calls", "activate", "register", "report", "restore")


def with_methods(names: dict[str, object]) -> Iterator[tuple[str, object]]:
    """Yield all names, and the public methods that their classes define here."""
    for name, value in names.items():
        yield name, value
        for owner in inspect.getmro(value) if inspect.isclass(value) else ():
            if not owner.__module__.startswith("gpt_fast"):
                continue
            for method, member in vars(owner).items():
                function = getattr(member, "__func__", member)
                if not method.startswith("_") and inspect.isroutine(function):
                    yield f"{function.__module__}.{function.__qualname__}", function


PUBLIC = public()
DOCUMENTED = dict(with_methods(PUBLIC))
FUNCTIONS = sorted(name for name, value in DOCUMENTED.items() if not inspect.isclass(value))
CLASSES = sorted(name for name, value in PUBLIC.items() if inspect.isclass(value))


def computes(value: object) -> bool:
    """Return True for a function or class that computes on tensors, and False for a class of results."""
    return value.__module__ in COMPUTE and not (inspect.isclass(value) and issubclass(value, tuple))


def sections(value: object) -> dict[griffe.DocstringSectionKind | str, object]:
    """Return the sections of a docstring by title, or by kind for the standard sections without a title."""
    docstring = griffe.Docstring(inspect.getdoc(value) or "")
    parsed = docstring.parse("google", warnings=False, returns_multiple_items=False)
    return {section.title or section.kind: section.value for section in parsed}


def listed(value: object, kind: griffe.DocstringSectionKind) -> list[str]:
    """Return the names that a docstring lists in its section of this kind."""
    return [item.name.lstrip("*") for item in sections(value).get(kind, ())]  # type: ignore[attr-defined]


def parameters(function: Callable) -> list[str]:
    """Return the names of the public arguments. Arguments with a leading underscore are for this library only."""
    names = inspect.signature(function).parameters
    return [name for name in names if name != "self" and name != "cls" and not name.startswith("_")]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_documents_its_arguments_and_result(name):
    function = DOCUMENTED[name]
    assert listed(function, griffe.DocstringSectionKind.parameters) == parameters(function)
    found = sections(function)
    results = griffe.DocstringSectionKind.returns in found or griffe.DocstringSectionKind.yields in found
    annotation = inspect.signature(function).return_annotation
    assert results == (annotation not in (None, "None")), annotation


@pytest.mark.parametrize("name", CLASSES)
def test_class_documents_what_it_is_made_of(name):
    """A result lists its fields as attributes. Any other class lists the arguments of its constructor."""
    kind = PUBLIC[name]
    attributes = listed(kind, griffe.DocstringSectionKind.attributes)
    if issubclass(kind, tuple):
        assert attributes == list(kind._fields)
    elif dataclasses.is_dataclass(kind) and attributes:
        assert attributes == [field.name for field in dataclasses.fields(kind)]
    else:
        assert listed(kind, griffe.DocstringSectionKind.parameters) == parameters(kind)


def examples(value: object) -> list[str]:
    """Return the Python blocks of a docstring's example."""
    found = sections(value).get("Example")
    text = found.contents if isinstance(found, griffe.DocstringAdmonition) else ""
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", sorted(name for name, value in DOCUMENTED.items() if examples(value)))
def test_example_runs_and_prints_what_it_says(name):
    """A line `print(x)  # 3` ends with what it prints, as in the pages of docs/."""
    if name in NEED_CUDA and not torch.cuda.is_available():
        pytest.skip("captures a CUDA graph")
    for code in examples(DOCUMENTED[name]):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(code, name, "exec"), {"__name__": "__main__"})
        printed = out.getvalue().splitlines()
        shown = re.findall(r"^ *print\(.*\)  # (.*)$", code, re.MULTILINE)
        assert printed == shown, code


@pytest.mark.parametrize("name", [name for name in PUBLIC if name.startswith(("gpt_fast.ops.", "gpt_fast.layers."))])
def test_ops_and_layers_have_an_example(name):
    assert examples(PUBLIC[name])


@pytest.mark.parametrize("name", [name for name, value in PUBLIC.items() if computes(value)])
def test_computations_note_their_numerics(name):
    """Functions and modules that compute on tensors have a note on precision, determinism, cost and source."""
    assert "Note" in sections(PUBLIC[name])


def test_every_public_name_of_the_documentation_is_checked():
    """The tests above cover each name that the pages of docs/ render with `:::`."""
    rendered = {name for page in PAGES for name in re.findall(r"^::: ([\w.]+)$", page.read_text("utf-8"), re.MULTILINE)}
    known = {id(value) for value in PUBLIC.values()}
    for name in rendered:
        module, _, short = name.rpartition(".")
        assert id(getattr(importlib.import_module(module), short)) in known, name
