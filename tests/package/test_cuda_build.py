"""Test when setup.py builds the CUDA C++ kernels, and which reason it gives if it cannot."""

import runpy
import warnings
from pathlib import Path

import pytest
import setuptools
import torch

from gpt_fast import _extension
from gpt_fast_cli import doctor

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def setup_py() -> dict:
    """Return the functions of setup.py without building anything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT_FAST_NO_CPP", "1")
        patch.setattr(setuptools, "setup", lambda **arguments: None)
        return runpy.run_path(str(ROOT / "setup.py"))


def toolkit(folder: Path, release: str | None = "13.0", headers: bool = True) -> str:
    """Make a CUDA toolkit whose nvcc prints the given release and does nothing else. Return its folder."""
    said = f"Cuda compilation tools, release {release}, V{release}.88" if release else "nvcc: not found"
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho '{said}'\n")
    nvcc.chmod(0o755)
    if headers:
        (folder / "include").mkdir()
        (folder / "include" / "cuda_runtime.h").touch()
    return str(folder)


def test_a_toolkit_of_the_same_major_version_builds(setup_py: dict, tmp_path: Path) -> None:
    assert setup_py["why_no_cuda"]("13.0", toolkit(tmp_path / "same")) is None
    assert setup_py["why_no_cuda"]("13.2", toolkit(tmp_path / "older")) is None


@pytest.mark.parametrize(
    ("cuda", "release", "headers", "reason"),
    [
        pytest.param(None, "13.0", True, "this PyTorch is built without CUDA", id="a PyTorch for the CPU"),
        pytest.param(
            "13.0", "12.4", True, "is of CUDA 12.4; expected CUDA 13, as this PyTorch has", id="another major"
        ),
        pytest.param("12.8", "13.0", True, "is of CUDA 13.0; expected CUDA 12, as this PyTorch has", id="a newer one"),
        pytest.param("13.0", "13.0", False, "include/cuda_runtime.h is not; expected CUDA_HOME", id="a wrapper"),
        pytest.param("13.0", None, True, "does not say its release: nvcc: not found", id="a broken wrapper"),
    ],
)
def test_what_cannot_be_built_is_named_in_one_line(
    setup_py: dict, tmp_path: Path, cuda: str | None, release: str | None, headers: bool, reason: str
) -> None:
    found = setup_py["why_no_cuda"](cuda, toolkit(tmp_path / "toolkit", release, headers))
    assert reason in found
    assert "\n" not in found


@pytest.mark.parametrize("folder", [None, "/nowhere"])
def test_no_toolkit(setup_py: dict, folder: str | None) -> None:
    assert setup_py["why_no_cuda"]("13.0", folder).startswith(f"no nvcc in {folder or 'CUDA_HOME'}")


def test_the_variable_chooses(
    setup_py: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    chosen, whole, old = setup_py["chosen_cuda"], toolkit(tmp_path / "whole"), toolkit(tmp_path / "old", "12.4")
    monkeypatch.delenv("GPT_FAST_CUDA", raising=False)
    assert chosen("13.0", whole) is None
    assert "12.4" in chosen("13.0", old)  # no error, so the kernels for the CPU are built
    assert capsys.readouterr().out.count("\n") == 1
    assert chosen(None, None) is not None
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("GPT_FAST_CUDA", "0")
    assert chosen("13.0", whole) == "GPT_FAST_CUDA=0"
    monkeypatch.setenv("GPT_FAST_CUDA", "1")
    assert chosen("13.0", whole) is None
    with pytest.raises(SystemExit, match="GPT_FAST_CUDA=1, but .* is of CUDA 12.4"):
        chosen("13.0", old)
    monkeypatch.setenv("GPT_FAST_CUDA", "yes")
    with pytest.raises(SystemExit, match="GPT_FAST_CUDA is yes; expected 0 or 1"):
        chosen("13.0", whole)


def test_doctor_reports_an_extension_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    record = {"no_cuda": "/usr/bin/nvcc is of CUDA 12.4"}
    monkeypatch.setattr(_extension, "choice", lambda: _extension.Choice(_extension.NATIVE, record, "tested"))
    assert any("nvcc is of CUDA 12.4; GPT_FAST_CUDA=1" in line for line in doctor.examine()["advice"])
    record["no_cuda"] = None
    assert not any("CUDA C++" in line for line in doctor.examine()["advice"])


def test_doctor_names_a_driver_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_available() -> bool:
        warnings.warn("The NVIDIA driver on your system is too old (found version 12000). Please update", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    lines = [line for line in doctor.examine()["advice"] if "GPU" in line]
    assert lines == ["PyTorch cannot use the GPU: The NVIDIA driver on your system is too old (found version 12000)"]
