"""The command `gpt-fast doctor`."""

from __future__ import annotations

import os
import platform
import shutil
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from .terminal import AsJson, print_json, print_table, require_train_extra

PACKAGES = {
    "torch": "",
    "triton": "",
    "numpy": "",
    "safetensors": "train",
    "tokenizers": "train",
    "torchmetrics": "train",
    "matplotlib": "train",
    "pydantic": "train",
    "typer": "train",
    "rich": "train",
    "PyYAML": "train",
    "transformers": "hf",
    "datasets": "hf",
}


def doctor(
    run: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="Run folder to verify instead, by reading every file in it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show versions, devices and the kernel of each operation, and how to install what is missing.

    With a run folder, show instead whether its weights, tokenizer and checkpoints are what was written, and what dead
    runs left beside it. The exit code is then 1 if something is damaged, else 0.

    [bold]Examples[/bold]

    gpt-fast doctor

    gpt-fast doctor runs/lm
    """
    if run is not None:
        _show_run(run, as_json)
        return
    findings = examine()
    if as_json:
        print_json(findings)
        return
    versions = {name: found or "not installed" for name, found in findings["versions"].items()}
    print_table("versions", list(versions.items()))
    devices = [(device["type"], device["name"]) for device in findings["devices"]]
    print_table("devices", devices)
    extension = findings["extension"] or {"isa": "none", "reason": "it is not built", "torch": "-"}
    print_table("C++ extension", [(name, extension[name]) for name in ("isa", "reason", "torch")])
    served = [
        (op, ", ".join(f"{kernel} on {device}" for device, kernel in by.items())) for op, by in findings["ops"].items()
    ]
    print_table("what serves each operation", served)
    print_table("to mend", [("-", line) for line in findings["advice"]] or [("-", "nothing is missing")])


def _show_run(folder: Path, as_json: bool) -> None:
    """Verify the files of the run in `folder`, and print what `examine_run` finds: a table, or JSON if `as_json`.

    Raise `typer.Exit` with code 1 if a file is damaged, `FileNotFoundError` if there is no such folder, and
    `ValueError` if packages of the extra `train` are missing.
    """
    require_train_extra()
    from gpt_fast.training.runs.examine import examine_run

    findings = examine_run(folder)
    if as_json:
        print_json(findings)
    else:
        rows = [("state", findings["state"]), *findings["checkpoints"].items()]
        rows += [("left over", f"{path}: a dead run's; remove it, or move back what is in it") for path in
                 findings["leftovers"]]  # fmt: skip
        rows += [("damaged", line) for line in findings["problems"]] or [("files", "as they were written")]
        print_table(findings["folder"], rows)
    if findings["problems"]:
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """Return what `doctor` prints about this machine, as a dict for JSON.

    `versions` maps packages to their versions, or None where one is not installed. `devices` lists the CPU and the
    GPUs, each with `type` ("cpu" or "cuda") and `name`. `extension` describes the build of the C++ extension for this
    CPU: `isa`, `reason` (why this build was chosen) and the keys of `gpt_fast.build_info()`. It is None if none is
    built. `ops` maps each operation to a dict from device type to what runs it there: "cpp", "triton" or "reference".
    `advice` lists sentences on what to install or to mend.
    """
    import torch

    from gpt_fast import _extension, ops

    versions: dict[str, str | None] = {"gpt-fast": _version("gpt-fast"), "python": platform.python_version()}
    versions |= {name: _version(name) for name in PACKAGES}
    chosen = _extension.choice()
    info = chosen and {"isa": chosen.isa, "reason": chosen.reason, **chosen.record}
    with warnings.catch_warnings(record=True) as warned:  # PyTorch's only word on a driver that is too old
        warnings.simplefilter("always")
        cuda = torch.cuda.is_available()
    threads = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    devices = [{"type": "cpu", "name": threads}]
    if cuda:
        devices += [{"type": "cuda", "name": torch.cuda.get_device_name(i)} for i in range(torch.cuda.device_count())]
    kinds = [kind for kind in ("cpu", "cuda") if kind == "cpu" or cuda]

    advice = []
    if info is None:
        advice.append("the C++ extension is not built, so the CPU runs the reference: make install, in a checkout")
    for extra in ("train", "hf"):
        missing = [name for name, of in PACKAGES.items() if of == extra and versions[name] is None]
        if missing:
            advice.append(f"{', '.join(missing)} not installed: pip install gpt-fast[{extra}]")
    if cuda and versions["triton"] is None:
        advice.append("Triton is not installed, so the GPU cannot run its kernels: pip install triton")
    if cuda and not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        advice.append(
            "no C compiler is found, and Triton builds its launcher with one: install gcc (Debian and Ubuntu: apt "
            "install gcc) or set CC"
        )
    if torch.version.cuda and info is not None and info.get("no_cuda"):
        advice.append(
            f"the C++ extension has no CUDA C++ kernels, so Triton serves alone: {info['no_cuda']}; "
            "GPT_FAST_CUDA=1 make install, with CUDA_HOME at a toolkit, builds them"
        )
    if not cuda and warned:
        advice.append(f"PyTorch cannot use the GPU: {str(warned[0].message).partition('. ')[0]}")
    elif not cuda and torch.version.cuda:
        advice.append("this PyTorch is built for CUDA but sees no device: look at nvidia-smi and CUDA_VISIBLE_DEVICES")
    return {
        "versions": versions,
        "devices": devices,
        "extension": info,
        "ops": {op: {kind: ops.serving(op, kind) for kind in kinds} for op in ops.NAMES},
        "advice": advice,
    }


def _version(package: str) -> str | None:
    """Return the version of an installed package, or None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
