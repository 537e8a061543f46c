"""The codegen gate: compile every recorded launch for sm_80, sm_90, sm_100 without a GPU, and hold it to a budget.

    python -m benchmarks.codegen LAUNCHES [--update]

LAUNCHES is what benchmarks.codegen_record wrote. Fails when a kernel exceeds the chip's shared memory, when it needs
more registers, spills or shared memory than results/codegen.json allows, when its instructions grow by more than 5 %,
or when a 16-bit matrix product on sm_90 is not done by wgmma. --update makes this build the budget. The budgets hold
for one version of Triton, the GPU machines'. Writes results/codegen.md either way.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
COLUMNS = ("registers", "spills", "shared", "instructions", "loop", "mma", "ldg", "stg", "lds", "sts", "shfl")
GROWTH = {"registers": 1.0, "spills": 1.0, "shared": 1.0, "instructions": 1.05}
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")


def stand_in_torch() -> None:
    """The kernel files name torch for their launchers' sake; compiling a kernel does not need it."""
    torch = types.ModuleType("torch")
    torch.Tensor = torch.dtype = torch.device = object  # type: ignore[attr-defined]
    sys.modules["torch"] = torch


def longest_loop(instructions: list[tuple[int, str, str]]) -> int:
    """Instructions of the longest stretch that a branch jumps back over."""
    longest = 0
    for index, (address, name, operands) in enumerate(instructions):
        target = re.search(r"0x([0-9a-f]+)", operands)
        if name.startswith("BRA") and target and int(target[1], 16) < address:
            longest = max(longest, sum(int(target[1], 16) <= a for a, _, _ in instructions[: index + 1]))
    return longest


def measure(cubin: bytes, folder: Path) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = [str(folder / "cuobjdump")]
        usage = subprocess.run([*tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
        sass = subprocess.run([*tool, "-sass", file.name], check=True, capture_output=True, text=True).stdout
    instructions = [(int(a, 16), name, rest) for a, name, rest in INSTRUCTION.findall(sass)]
    counts = Counter(name.split(".")[0] for _, name, _ in instructions)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),  # type: ignore[index]
        "spills": counts["LDL"] + counts["STL"],
        "instructions": sum(counts.values()) - counts["NOP"],
        "loop": longest_loop(instructions),
        "mma": sum(count for name, count in counts.items() if name.endswith("MMA")),
        "wgmma": counts["HGMMA"],
        **{name.lower(): counts[name] for name in ("LDG", "STG", "LDS", "STS", "SHFL")},
    }


def compile_launch(launch: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Figures by target for one recorded launch."""
    stand_in_torch()
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    kernel = getattr(importlib.import_module(launch["module"]), launch["kernel"])
    position = {name: index for index, name in enumerate(kernel.arg_names)}
    aligned = {(position[name],): [["tt.divisibility", 16]] for name in launch["divisible"]}
    figures = {}
    for target in SHARED_LIMIT:
        source = ASTSource(kernel, launch["signature"], launch["constants"], aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=launch["options"])
        figure = measure(compiled.asm["cubin"], folder) | {"shared": compiled.metadata.shared}
        ttir = compiled.asm["ttir"]
        figure["needs_wgmma"] = int(target == 90 and bool(re.search(r"tt\.dot .*(bf16|f16)>.*->", ttir)))
        figures[f"sm_{target}"] = figure
    return figures


def violations(key: str, target: str, figure: dict[str, int], budget: dict[str, int] | None) -> list[str]:
    where = f"{key} {target}"
    found = []
    limit = SHARED_LIMIT[int(target.removeprefix("sm_"))]
    if figure["shared"] > limit:
        found.append(f"{where}: {figure['shared']} bytes of shared memory, the chip has {limit}")
    if figure["needs_wgmma"] and not figure["wgmma"]:
        found.append(f"{where}: a 16-bit matrix product without wgmma")
    if budget is None:
        found.append(f"{where}: has no budget")
    else:
        found += [
            f"{where}: {figure[name]} {name}, budget {budget[name]}"
            for name, growth in GROWTH.items()
            if figure[name] > budget[name] * growth
        ]
    return found


def table(figures: dict[str, dict[str, dict[str, int]]], version: str) -> str:
    lines = [
        "# Generated code",
        "",
        f"What Triton {version} makes of every kernel and shipped configuration. `spills` counts loads and stores of",
        "local memory, `shared` is bytes a program, `loop` the instructions of the longest loop, the rest counts",
        "instructions. Written by `make codegen`; the budgets are in codegen.json.",
    ]
    for target in SHARED_LIMIT:
        lines += [
            "",
            f"## sm_{target}",
            "",
            f"| kernel | {' | '.join(COLUMNS)} |",
            "| --- |" + " ---: |" * len(COLUMNS),
        ]
        for key, by_target in figures.items():
            figure = by_target[f"sm_{target}"]
            lines.append(f"| {key} | {' | '.join(str(figure[name]) for name in COLUMNS)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("launches", type=Path)
    parser.add_argument("--update", action="store_true", help="make this build the budget")
    arguments = parser.parse_args()
    stand_in_torch()
    import triton

    launches = json.loads(arguments.launches.read_text("utf-8"))
    with ProcessPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        measured = list(pool.map(compile_launch, launches))
    figures = {launch["key"]: figure for launch, figure in zip(launches, measured, strict=True)}
    (RESULTS / "codegen.md").write_text(table(figures, triton.__version__), encoding="utf-8")

    budgets = RESULTS / "codegen.json"
    if arguments.update:
        kept = {k: {t: {name: f[name] for name in GROWTH} for t, f in by.items()} for k, by in figures.items()}
        budgets.write_text(json.dumps({"triton": triton.__version__, "kernels": kept}, indent=1) + "\n", "utf-8")
    recorded: dict[str, Any] = (
        json.loads(budgets.read_text("utf-8")) if budgets.exists() else {"triton": "none", "kernels": {}}
    )
    if recorded["triton"] != triton.__version__:
        sys.exit(f"codegen: budgets are for Triton {recorded['triton']}, this is {triton.__version__}: --update")
    allowed = recorded["kernels"]
    found = [f"{key}: in the budget but not launched" for key in sorted(set(allowed) - set(figures))]
    for key, by_target in figures.items():
        for target, figure in by_target.items():
            found += violations(key, target, figure, allowed.get(key, {}).get(target))
    print("\n".join(found) if found else "", end="\n" if found else "")
    print(f"codegen: {len(figures)} kernel configurations x {len(SHARED_LIMIT)} targets, {len(found)} violations")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
