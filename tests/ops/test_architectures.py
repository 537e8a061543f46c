"""Test that everything that depends on GPU architectures follows the one table of them, kernels/architectures.py.

The tests add an invented architecture to the table.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

from benchmarks import catalogue
from kernels import architectures, descriptors, gemm, launch_configs
from tools import codegen, record_launches

ROOT = Path(__file__).resolve().parent.parent.parent
KNOWN = {row.capability for row in architectures.ARCHITECTURES}
LAUNCHED = [name for name, topic in catalogue.ops().items() if topic.launches]
INVENTED = architectures.Architecture(95, 90, shared=4096, descriptors=False, wgmma=True, targeted=True, nvcc=("sm",))


@pytest.fixture
def with_invented(monkeypatch):
    monkeypatch.setattr(architectures, "ARCHITECTURES", (*architectures.ARCHITECTURES, INVENTED))


@pytest.fixture
def tree(tmp_path):
    """Copy the files that the build reads, with the invented architecture in the table."""
    text = (ROOT / "kernels" / "architectures.py").read_text("utf-8")
    row = f"    {INVENTED!r},\n)\nOLDEST"
    for folder in ("kernels", "gpt_fast/kernels", "csrc/cuda"):
        (tmp_path / folder).mkdir(parents=True)
    for folder in ("kernels", "gpt_fast/kernels"):
        (tmp_path / folder / "architectures.py").write_text(text.replace(")\nOLDEST", row), "utf-8")
    for name in ("setup.py", "Makefile", "gpt_fast/_levels.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "csrc" / "cuda" / "kernel.cu").touch()
    return tmp_path


def test_a_card_older_than_the_kernels_is_named():
    with pytest.raises(ValueError, match=r"the compute capability is 7\.5; expected 8\.0 or newer"):
        architectures.serving(75)


@pytest.mark.parametrize("op", launch_configs.TABLES)
def test_every_launch_configuration_is_for_a_known_architecture(op):
    assert {row.architecture for row in launch_configs.TABLES[op]} <= KNOWN | {architectures.INTERPRETER}


def test_the_budget_covers_every_architecture():
    """The recorded budgets name every architecture for every op.

    `make codegen` fails on a launch without a budget, so it compiles each op for each architecture.
    """
    kernels = json.loads((codegen.RESULTS / "codegen-3.6.json").read_text("utf-8"))["kernels"]
    for op in LAUNCHED:
        targets = {target for key, by_target in kernels.items() if key.startswith(f"{op} ") for target in by_target}
        assert targets == set(codegen.BY_TARGET)


@pytest.mark.parametrize("capability", [80, 120])
def test_the_tests_on_the_stand_in_are_collected_for_every_architecture(capability):
    """Modules for sm_90 alone are left out, and no other module may import them."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "tests/fakecuda"]
    environment = os.environ | {"FAKECUDA_CAPABILITY": str(capability)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "test_ops.py::test_an_op_launches_on_its_tensors_device" in done.stdout


def test_the_gate_compiles_for_every_architecture(with_invented, monkeypatch, tmp_path):
    if triton.knobs.runtime.interpret:
        pytest.skip("the interpreter's kernels cannot be recorded")
    monkeypatch.setattr(sys, "argv", ["record_launches", str(tmp_path / "launches.json")])
    monkeypatch.setattr(record_launches, "ARCHITECTURES", architectures.ARCHITECTURES)
    record_launches.main()
    launches = json.loads((tmp_path / "launches.json").read_text("utf-8"))
    unsaid = {launch["key"] for launch in launches if launch["options"].get("enable_fp_fusion") is not True}
    assert unsaid == set(), "Triton 3.9 warns where a launch does not say it, and will change its default"
    for op in LAUNCHED:
        found = {launch["target"] for launch in launches if launch["key"].startswith(f"{op} ")}
        assert found == KNOWN | {INVENTED.capability}
    described = {launch["target"] for launch in launches if "tensordesc" in str(launch["signature"])}
    assert described == {row.capability for row in architectures.ARCHITECTURES if row.descriptors}


def test_the_gate_holds_an_architecture_to_its_row(monkeypatch):
    monkeypatch.setitem(codegen.BY_TARGET, "sm_95", INVENTED)
    figure = {"registers": 1, "spilled": 0, "shared": 4097, "instructions": 1, "needs_wgmma": 1, "wgmma": 0}
    complaints = codegen.violations("op fwd", "sm_95", figure, codegen.budget_of(figure))
    assert complaints == [
        "op fwd sm_95: 4097 bytes of shared memory, the chip has 4096",
        "op fwd sm_95: a 16-bit matrix product without wgmma",
    ]
    spills = {"attention fwd D=64 bfloat16": {"sm_95": figure | {"spilled": 8, "loops": []}}}
    assert codegen.broken_statements(spills) == [
        "attention fwd D=64 bfloat16 sm_95: spills 8 bytes, expected at most 0"
    ]


@pytest.mark.parametrize("row", architectures.ARCHITECTURES, ids=lambda row: f"sm_{row.capability}")
def test_every_kernel_fits_the_shared_memory_of_every_architecture(row):
    """The budgets fit, and `make codegen` checks the compiled kernels against them.

    Attention with head sizes from 129 to 256 once did not fit sm_86.
    """
    kernels = json.loads((codegen.RESULTS / "codegen-3.6.json").read_text("utf-8"))["kernels"]
    target = f"sm_{row.capability}"
    shared = {key: by_target[target]["shared"] for key, by_target in kernels.items() if target in by_target}
    assert {key: size for key, size in shared.items() if size > row.shared} == {}


@pytest.mark.parametrize(
    ("capability", "described"), [(80, False), (89, False), (90, True), (95, False), (100, True), (120, False)]
)
def test_descriptors_are_for_architectures_that_have_them(capability, described, with_invented):
    """An architecture that has no row gets the row of the newest older architecture."""
    x = torch.zeros(64, 64, dtype=torch.bfloat16)
    assert descriptors.describable(x, capability) == described
    assert gemm.operand(x, 32, 32, capability)[1] == int(described)


@pytest.mark.parametrize(
    ("x", "mode"),
    [
        pytest.param(torch.zeros(8, 24, dtype=torch.float16), 1, id="rows"),
        pytest.param(torch.zeros(24, 8, dtype=torch.float16).t(), 2, id="transposed"),
        pytest.param(torch.zeros(1, 20, dtype=torch.float16), 1, id="one_row_of_any_stride"),
        pytest.param(torch.zeros(8, 20, dtype=torch.float16), 0, id="unaligned_rows"),
        pytest.param(torch.zeros(8, 25, dtype=torch.float16)[:, 1:], 0, id="unaligned_start"),
        pytest.param(torch.zeros(1, 24, dtype=torch.float16).expand(8, 24), 0, id="expanded"),
        pytest.param(torch.zeros(8, 48, dtype=torch.float16)[:, ::2], 0, id="gaps_between_columns"),
        pytest.param(torch.zeros(8, 24), 0, id="float32"),
        pytest.param(torch.zeros(0, 24, dtype=torch.float16), 0, id="empty"),
    ],
)
def test_which_tensors_have_a_descriptor(x, mode):
    source, got = gemm.operand(x, 16, 16, 90)
    assert got == mode
    assert mode == 0 or all(stride * x.element_size() % 16 == 0 for stride in source.strides[:-1])


def test_setup_compiles_cuda_for_the_architectures_of_the_table(tree):
    code = "import runpy; print(*runpy.run_path('setup.py')['NVCC_FLAGS'])"
    environment = os.environ | {"GPT_FAST_NO_CPP": "1"}
    command = [sys.executable, "-c", f"import setuptools; setuptools.setup = lambda **_: None; {code}"]
    done = subprocess.run(command, cwd=tree, env=environment, check=True, capture_output=True, text=True)
    extra = "-gencode=arch=compute_95,code=sm_95"
    assert done.stdout.split() == [*architectures.NVCC_FLAGS, extra]


def test_make_codegen_runs_nvcc_for_the_architectures_of_the_table(tree):
    """All other programs that `make codegen` runs are replaced by scripts that do nothing."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    scripts = {
        ".venv/bin/python": f'#!/bin/sh\n[ "$2" != kernels.architectures ] || exec {sys.executable} "$@"\n',
        ".venv-codegen/bin/python": "#!/bin/sh\n",
        "bin/nvcc": f'#!/bin/sh\necho "$@" >> {tree}/nvcc.log\n',
    }
    for name, text in scripts.items():
        path = tree / name
        path.parent.mkdir(parents=True)
        path.write_text(text, "utf-8")
        path.chmod(0o755)
    environment = os.environ | {"PATH": f"{tree}/bin:{os.environ['PATH']}"}
    up_to_date = ["-o", ".venv/.stamp-package", "-o", ".venv-codegen/.stamp"]
    subprocess.run(["make", "codegen", *up_to_date], cwd=tree, env=environment, check=True, capture_output=True)
    log = (tree / "nvcc.log").read_text("utf-8")
    for capability in KNOWN | {INVENTED.capability}:
        assert f"-arch=sm_{capability} csrc/cuda/kernel.cu" in log
