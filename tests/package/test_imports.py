"""Test that imports run one way.

They run from the command line to training → heads, generation, integrations → model → layers → ops → kernels. The tests
read the import statements of every module of the package. Only the last test imports the package.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Layers from the lowest to the highest. A room is a top-level module or folder of the package. A module may import from
# its own room and from the rooms of lower layers.
LAYERS = (
    ("_levels",),
    (
        "_transforms",
        "_files",
        "_hub",
        "_memory",
        "_disk",
        "_llmc",
        "_extension",
        "_activations",
        "interrupts",
        "gpt_fast_settings",
    ),
    ("reference", "kernels"),
    ("ops", "config"),
    ("_plain", "tuning"),
    ("layers",),
    ("model", "model_folder", "data"),
    ("heads",),
    ("generation", "integrations"),
    ("scoring",),
    ("training",),
    ("gpt_fast_cli",),
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
# Imports against this direction. They are allowed only inside the function that needs them.
LATE = {
    ("gpt_fast", "gpt_fast.integrations"),  # gpt_fast.accelerate and gpt_fast.restore
    ("gpt_fast.model", "gpt_fast.integrations.huggingface"),  # from_hf and to_hf
    ("gpt_fast.model", "gpt_fast.generation"),  # model.generate
    ("gpt_fast.heads.language", "gpt_fast.integrations.nanogpt"),  # from_nanogpt and to_nanogpt
    ("gpt_fast.__main__", "gpt_fast_cli.__main__"),
}
DATA_IMPORTS = {"_disk", "_files", "_hub", "_memory", "gpt_fast_settings", "_llmc", "config", "interrupts"}


class Import(NamedTuple):
    """One import: the importing module, the imported module, and whether the import runs when the former is loaded."""

    module: str
    imported: str
    at_once: bool


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """Return the room of a module: "ops" for "gpt_fast.ops.mlp", and "" for gpt_fast/__init__.py."""
    first, _, rest = module.partition(".")
    return first if first != "gpt_fast" else rest.partition(".")[0]


def is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports_of(module: str, path: Path, known: set[str]) -> Iterator[Import]:
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def visit(node: ast.AST, at_once: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if is_for_types_only(child):
                continue
            if isinstance(child, ast.Import):
                yield from (Import(module, alias.name, at_once) for alias in child.names)
            if isinstance(child, ast.ImportFrom):
                parents = package.split(".")
                base = ".".join(parents[: len(parents) - child.level + 1]) if child.level else ""
                source = ".".join(filter(None, (base, child.module)))
                for alias in child.names:
                    submodule = f"{source}.{alias.name}"
                    yield Import(module, submodule if submodule in known else source, at_once)
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from visit(child, at_once and not is_function)

    yield from visit(ast.parse(path.read_text("utf-8")), True)


# gpt_fast/kernels is a symlink to kernels, which is read under its own name below.
FILES = {
    name_of(path): path
    for top in ("gpt_fast", "gpt_fast_cli", "gpt_fast_settings")
    for path in sorted((ROOT / top).rglob("*.py"))
    if path.parent != ROOT / "gpt_fast" / "kernels"
}
IMPORTS = [found for module, path in FILES.items() for found in imports_of(module, path, set(FILES))]
OURS = [found for found in IMPORTS if found.imported.partition(".")[0].startswith("gpt_fast")]


def is_late(found: Import) -> bool:
    return any(
        found.module == module and (found.imported + ".").startswith(imported + ".") for module, imported in LATE
    )


def test_every_room_has_a_layer():
    rooms = {room_of(module) for module in FILES} - {"", "__main__"}
    assert rooms <= set(LEVEL)
    assert all(len([rooms for rooms in LAYERS if room in rooms]) == 1 for room in LEVEL)


@pytest.mark.parametrize("module", FILES)
def test_a_module_imports_lower_layers_only(module):
    own = room_of(module)
    if own == "":
        return  # gpt_fast/__init__.py re-exports names of all rooms except training
    for found in OURS:
        if found.module != module or is_late(found):
            continue
        other = room_of(found.imported)
        if other == "":
            # `from .. import _C` imports the extension. The command line may import everything.
            assert own in ("gpt_fast_cli", "__main__", "generation"), (
                f"{module} imports the package itself, which imports every room: name the module that is meant"
            )
            continue
        assert other == own or LEVEL[other] < LEVEL[own], f"{module} imports {found.imported}, which lies above it"


def test_imports_against_the_direction_wait_for_their_function():
    late = [found for found in OURS if is_late(found)]
    assert {(found.module, found.imported) for found in late if found.at_once} <= {
        ("gpt_fast.__main__", "gpt_fast_cli.__main__")
    }
    assert len(late) >= len(LATE), "an entry of LATE is not needed any more"


def test_settings_import_neither_torch_nor_the_package():
    """The settings import neither, so that the command line shows `--help` and completes options without torch."""
    found = {found.imported.partition(".")[0] for found in IMPORTS if room_of(found.module) == "gpt_fast_settings"}
    assert found - set(sys.stdlib_module_names) == {"gpt_fast_settings", "pydantic", "pydantic_core", "yaml"}


def test_data_imports_no_model():
    rooms = {room_of(found.imported) for found in OURS if room_of(found.module) == "data"}
    assert rooms - {"data"} <= DATA_IMPORTS


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda path: path.stem)
def test_kernels_know_torch_and_triton_only(path):
    names = {f"kernels.{other.stem}" for other in (ROOT / "kernels").glob("*.py")}
    found = {found.imported for found in imports_of(f"kernels.{path.stem}", path, names)}
    tops = {name.partition(".")[0] for name in found}
    assert tops - set(sys.stdlib_module_names) <= {"torch", "triton", "kernels"}


def test_the_package_imports_nothing_of_the_checkout_around_it():
    tops = {found.imported.partition(".")[0] for found in IMPORTS if found.module.startswith("gpt_fast.")}
    assert not tops & {"benchmarks", "tools", "tests", "kernels", "examples"}


def test_no_circle_among_modules():
    """No modules import each other in a circle.

    An `__init__.py` counts as a module with its own imports, except for the modules inside its package.
    """
    edges: dict[str, set[str]] = {module: set() for module in FILES}
    for found in OURS:
        inside = (found.module + ".").startswith(found.imported + ".")
        if found.at_once and found.imported in edges and not inside:
            edges[found.module].add(found.imported)
    waiting, done = dict(edges), set()
    while waiting:
        ready = [module for module, needs in waiting.items() if needs <= done]
        assert ready, f"in a circle, or behind one: {sorted(waiting)}"
        done.update(ready)
        for module in ready:
            del waiting[module]


def test_the_core_loads_no_integration():
    script = (
        "import sys, gpt_fast\n"
        "def loaded(): return sorted(name for name in sys.modules if name.startswith('gpt_fast.integrations'))\n"
        "assert loaded() == [], loaded()\n"
        "import torch\n"
        "layer = torch.nn.TransformerEncoderLayer(16, 2, batch_first=True)\n"
        "assert gpt_fast.accelerate(layer).replaced\n"
        "gpt_fast.restore(layer)\n"
        "assert 'gpt_fast.integrations.accelerate' in loaded()\n"
        "assert 'accelerate' in dir(gpt_fast)\n"
        "try:\n    gpt_fast.acelerate\nexcept AttributeError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "module 'gpt_fast' has no attribute 'acelerate'\n"
