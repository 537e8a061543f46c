"""Docstrings are the reference: every public name says what a caller has to know, and names it can rely on."""

import inspect
import re

import pytest

import gpt_fast
from gpt_fast import data, layers, ops
from gpt_fast.integrations import report, sdpa

# What computes on tensors says all of these, if only by naming whose they are.
FACTS = {
    "an equation": r"=|→",
    "shapes": r"\[[A-Z…., 0-9'C3]+\]|[Ll]ike \w+",
    "dtypes": r"[Dd]types?",
    "precision": r"[Pp]recision|float32",
    "determinism": r"[Dd]etermini|same `?seed",
    "errors": r"Raises|[Ee]rrors",
    "a source": r"[Ss]ource|[Nn]otes",
}
# What does not: it configures, reports, or holds values.
OTHERS = {
    "GPTConfig", "NAMES", "accelerate", "build_info", "check_values", "decompositions", "new_seed", "ops", "restore",
    "serving", "use_reference", "values_checked",
}  # fmt: skip


def public() -> dict[str, object]:
    found = {f"gpt_fast.{name}": getattr(gpt_fast, name) for name in gpt_fast.__all__}
    found |= {f"gpt_fast.ops.{name}": getattr(ops, name) for name in ops.__all__}
    found |= {f"gpt_fast.layers.{name}": value for name, value in vars(layers).items() if is_ours(value, layers)}
    found |= {f"gpt_fast.data.{name}": getattr(data, name) for name in data.__all__}
    found |= {f"gpt_fast.integrations.sdpa.{name}": getattr(sdpa, name) for name in SDPA}
    return found | {"gpt_fast.integrations.report.Report": report.Report}


def is_ours(value: object, module: object) -> bool:
    return inspect.isclass(value) and value.__module__ == module.__name__ and not value.__name__.startswith("_")


SDPA = ("activate", "register", "report", "restore")
NAMES = {name: value for name, value in public().items() if not isinstance(value, tuple | dict)}
COMPUTES = sorted(
    name
    for name, value in NAMES.items()
    if name.rpartition(".")[2] not in OTHERS
    and not (inspect.isclass(value) and issubclass(value, tuple))
    and not name.startswith(("gpt_fast.data.", "gpt_fast.integrations."))
)
# What can be given something wrong, or a file that is not there.
READS = sorted(name for name, value in NAMES.items() if name.startswith("gpt_fast.data.") and inspect.isfunction(value))
HARMLESS = {"encode_documents", "vocabulary_size"}
MAKES_TENSORS = ("lm_windows", "mask_tokens", "task_batches")


@pytest.mark.parametrize("name", sorted(NAMES))
def test_is_documented(name):
    text = inspect.getdoc(NAMES[name])
    assert text, name
    assert text[0].isupper() or text[0] in "`'\"" or re.match(r"[\w(]", text), text
    assert len(text.split()) >= 8, f"{name} is documented by {text!r} alone"


@pytest.mark.parametrize("name", COMPUTES)
def test_says_what_a_caller_has_to_know(name):
    text = inspect.getdoc(NAMES[name]) or ""
    missing = [fact for fact, pattern in FACTS.items() if not re.search(pattern, text)]
    assert not missing, f"{name} does not say {', '.join(missing)}:\n{text}"


@pytest.mark.parametrize("name", READS)
def test_data_says_its_errors_shapes_and_dtypes(name):
    text, short = inspect.getdoc(NAMES[name]) or "", name.rpartition(".")[2]
    assert short in HARMLESS or "Raises" in text, text
    assert short not in MAKES_TENSORS or (re.search(FACTS["shapes"], text) and "int64" in text), text


@pytest.mark.parametrize("name", sorted(name for name, value in NAMES.items() if inspect.isclass(value)))
def test_methods_are_documented(name):
    """Public methods of our own classes; `forward` is described by its class."""
    undocumented = [
        method
        for method, value in vars(NAMES[name]).items()
        if inspect.isfunction(getattr(value, "__func__", value))
        and not method.startswith("_")
        and method != "forward"
        and not inspect.getdoc(value)
    ]
    assert undocumented == []
