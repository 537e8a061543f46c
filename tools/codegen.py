"""The codegen gate: compile every recorded launch for its architecture without a GPU, and hold it to a budget.

    python -m tools.codegen LAUNCHES [--update] [--targeted]

LAUNCHES is what tools.record_launches wrote. Fails when a kernel exceeds the chip's shared memory, when it needs
more registers, spills or shared memory than its budget, when its instructions grow by more than 5 %,
when dropout costs one of attention's loops more than 5 % more instructions than its budget, and when a statement does
not hold. On an architecture with wgmma, products in 16 bits are done by it. On a targeted one, attention at a head size
of 64 spills nothing, at 128 nothing without dropout and at most 128 bytes with it; up to 128, dropout adds no access to
shared memory and no shuffle to any of attention's loops. kernels/architectures.py says which are which. On every
architecture a kernel spills at most 128 bytes, except heads over 128 and rows over 8,192. In the code of Triton 3.6
dropout leaves attention 0.65 of its speed forward and 0.71 backward, by the bounds of tools/loop_bounds.py. --update
makes this build the budget, statements aside. Each minor version of Triton has its own budget,
results/codegen-3.6.json, and its own table, results/codegen-3.6.md, which is written either way. --targeted compiles
for the targeted architectures alone.
"""

import argparse
import importlib
import json
import math
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

from kernels.architectures import ARCHITECTURES
from tools import loop_bounds

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
BY_TARGET = {f"sm_{row.capability}": row for row in ARCHITECTURES}
COLUMNS = ("registers", "spilled", "shared", "instructions", "mma", "ldg", "stg", "lds", "sts", "shfl")
GROWTH = {"registers": 1.0, "spilled": 1.0, "shared": 1.0, "instructions": 1.05}
SPILLS = 128  # bytes that a kernel for sizes up to SMALL may spill
SMALL = {"D": 128, "N": 8192}
KINDS = {"lds": ("LDS", "LDSM"), "sts": ("STS", "STSM"), "shfl": ("SHFL",), "local": ("LDL", "STL")}
PASSES = {"forward": ("fwd",), "backward": ("bwd_dq", "bwd_dkdv")}  # attention's kernels
PRODUCTS = {"forward": 2, "backward": 5}  # of attention, as its FLOPs are counted
DROPOUT_SPEED = {"forward": 0.65, "backward": 0.71}  # target: at least this much of attention's speed without dropout
LENGTHS = (1024, 4096, 16384)
TRITON = "3.6"  # of the GPU machines; targets of speed are judged by the code of this release


Figure = dict[str, Any]  # of one kernel on one target


def stand_in_torch() -> None:
    """Replace the module torch in this process by a stub, because compiling the kernel files does not need more of it.

    The stub has only `Tensor`, `dtype` and `device`, which are all `object`.
    """
    torch = types.ModuleType("torch")
    torch.Tensor = torch.dtype = torch.device = object  # type: ignore[attr-defined]
    sys.modules["torch"] = torch


def loops(instructions: list[loop_bounds.Instruction], warps: int, bounded: bool) -> list[dict[str, Any]]:
    """Return a dict for each innermost loop around matrix products in a kernel's instructions.

    The keys are "instructions", the number of all instructions, and "lds", "sts", "shfl" and "local" (local memory),
    the numbers of each kind. With `bounded`, a loop that uses wgmma also has "pipes": {unit of the chip: cycles that
    one iteration needs of it}. `warps` is the kernel's number of warps, which only these cycles depend on.
    """
    found = []
    for body in loop_bounds.product_loops(instructions):
        opcodes = [instruction.opcode for instruction in body]
        loop: dict[str, Any] = {"instructions": len(body)}
        loop |= {kind: sum(map(opcodes.count, names)) for kind, names in KINDS.items()}
        if bounded and "HGMMA" in opcodes:
            loop["pipes"] = loop_bounds.bound(body, warps)
        found.append(loop)
    return found


def measure(cubin: bytes, folder: Path, warps: int, bounded: bool) -> Figure:
    """Return the figures of a compiled kernel, which are read off its machine code.

    "registers" are those of a thread, and "spilled" is the bytes of its stack. "instructions", "mma", "wgmma", "ldg",
    "stg", "lds", "sts" and "shfl" are numbers of instructions. "loops" is the list that `loops` returns, with a dict
    for each innermost loop around matrix products.

    `cubin` is the kernel's binary, `folder` holds the program cuobjdump, and `warps` is the kernel's number of warps.
    With `bounded`, the dicts of loops that use wgmma also have "pipes", the estimated cycles for each unit of the chip.
    Raise `subprocess.CalledProcessError` if cuobjdump fails.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = [str(folder / "cuobjdump")]
        usage = subprocess.run([*tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
        sass = subprocess.run([*tool, "-sass", file.name], check=True, capture_output=True, text=True).stdout
    instructions = loop_bounds.parse(sass)
    counts = Counter(instruction.opcode for instruction in instructions)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),  # type: ignore[index]
        "spilled": int(re.search(r"STACK:(\d+)", usage)[1]),  # type: ignore[index]
        "instructions": sum(counts.values()) - counts["NOP"],
        "loops": loops(instructions, warps, bounded),
        "mma": sum(count for name, count in counts.items() if name.endswith("MMA")),
        "wgmma": counts["HGMMA"],
        "ldg": counts["LDG"],
        "stg": counts["STG"],
        **{kind: sum(counts[name] for name in names) for kind, names in KINDS.items() if kind != "local"},
    }


def compile_launch(launch: dict[str, Any]) -> Figure:
    """Compile one launch that tools.record_launches recorded, for its target. Return figures of the kernel.

    `launch` has "module", "kernel", "target", "signature", "constants", "divisible" and "options". The module torch is
    replaced by a stub in this process.

    The result has "registers", "spilled" (bytes), "shared" (bytes of shared memory), and numbers of instructions:
    "instructions", "mma", "wgmma", "ldg", "stg", "lds", "sts" and "shfl". "loops" is the list that `loops` returns,
    with a dict for each innermost loop around matrix products. "tile" is [BLOCK_M, BLOCK_N], for attention alone.
    "needs_wgmma" is 1 if the target has wgmma and the kernel has a 16-bit product of 64 rows or more, else 0.
    """
    stand_in_torch()
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    kernel = getattr(importlib.import_module(launch["module"]), launch["kernel"])
    position = {name: index for index, name in enumerate(kernel.arg_names)}
    aligned = {(position[name],): [["tt.divisibility", 16]] for name in launch["divisible"]}
    source = ASTSource(kernel, launch["signature"], launch["constants"], aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", launch["target"], 32), options=launch["options"])
    ttir, architecture = compiled.asm["ttir"], BY_TARGET[f"sm_{launch['target']}"]
    figure = measure(compiled.asm["cubin"], folder, compiled.metadata.num_warps, architecture.targeted)
    figure["shared"] = compiled.metadata.shared
    if launch["module"] == "kernels.attention":
        figure["tile"] = [launch["constants"][name] for name in ("BLOCK_M", "BLOCK_N")]
    # wgmma has 64 rows: products in smaller tiles cannot use it.
    rows = [int(found) for found in re.findall(r"tt\.dot .* tensor<(\d+)x\d+x(?:bf16|f16)> \*", ttir)]
    figure["needs_wgmma"] = int(architecture.wgmma and max(rows, default=0) >= 64)
    return figure


def without_dropout(figures: dict[str, dict[str, Figure]], key: str, target: str) -> Figure | None:
    """Return the figures of the same attention kernel without dropout on the same target, or None.

    `key` is a launch's name, such as "attention fwd D=64 bfloat16 dropout", and `target` is such as "sm_90". The result
    is None if `key` is no attention kernel with dropout, or if the kernel was not compiled without dropout. `figures`
    maps launch's name → target → figures of the compiled kernel.
    """
    if not key.startswith("attention ") or not key.endswith(" dropout"):
        return None
    return figures.get(key.removesuffix(" dropout"), {}).get(target)


def dropout_instructions(figure: Figure, without: Figure) -> list[int]:
    """Return how many instructions dropout adds to each loop of an attention kernel, one number a loop.

    `figure` and `without` are the kernel's figures with dropout and without it. Only "loops" is read from them, a list
    of dicts with "instructions". Raise `ValueError` if the two lists differ in length.
    """
    pairs = zip(figure["loops"], without["loops"], strict=True)
    return [mine["instructions"] - other["instructions"] for mine, other in pairs]


def add_dropout(figures: dict[str, dict[str, Figure]]) -> None:
    """Add "dropout", how many instructions dropout adds to each loop, to figures of attention kernels with dropout.

    The figures are changed in place. "dropout" is a list with a number for each loop. It is not added if the same
    kernel without dropout was not compiled, or has another number of loops. `figures` maps launch's name → target such
    as "sm_90" → figures of the compiled kernel.
    """
    for key, by_target in figures.items():
        for target, figure in by_target.items():
            without = without_dropout(figures, key, target)
            if without is not None and len(without["loops"]) == len(figure["loops"]):
                figure["dropout"] = dropout_instructions(figure, without)


def budget_of(figure: Figure) -> dict[str, Any]:
    """Return the budget that a kernel's figures make: "registers", "spilled", "shared", "instructions", "dropout".

    The values are copied from `figure`, the kernel's figures. "dropout" lists how many instructions dropout adds to
    each loop. It is left out if `figure` has no "dropout".
    """
    return {name: figure[name] for name in (*GROWTH, "dropout") if name in figure}


def dropout_violations(where: str, figure: Figure, budget: dict[str, Any]) -> list[str]:
    """Return a message for each loop in which dropout adds more instructions than the budget allows.

    "dropout" in `figure` and in `budget` lists how many instructions dropout adds to each loop. A missing list counts
    as empty. More than 1.05 times the budget's number is too much. If the lists differ in length, there is one message
    that says so. `where` is the kernel's name in messages.
    """
    cost, allowed = figure.get("dropout", []), budget.get("dropout", [])
    if len(cost) != len(allowed):
        return [f"{where}: dropout is compared in {len(cost)} loops, the budget has {len(allowed)}"]
    return [
        f"{where}: dropout adds {mine} instructions to loop {number}, budget {limit}"
        for number, (mine, limit) in enumerate(zip(cost, allowed, strict=True), 1)
        if mine > limit * GROWTH["instructions"]
    ]


def violations(key: str, target: str, figure: Figure, budget: dict[str, Any] | None) -> list[str]:
    """Return a message for each way in which a kernel breaks its budget or a requirement of the chip.

    `key` is the launch's name, and `target` is such as "sm_90". `figure` has the kernel's figures. `budget` has
    "registers", "spilled", "shared", "instructions" and perhaps "dropout". If `budget` is None, a message says so.

    A kernel may have no more registers, spilled bytes and shared memory than its budget. It may have up to 5 % more
    instructions, and dropout may add up to 5 % more to a loop. Whatever its budget, it must not use more shared memory
    than the chip has. If "needs_wgmma" in `figure` is 1, it must use wgmma instructions.
    """
    where = f"{key} {target}"
    found = []
    limit = BY_TARGET[target].shared
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
        found += dropout_violations(where, figure, budget)
    return found


def spill_limit(key: str) -> int | None:
    """Return how many bytes an attention kernel may spill on an architecture with speed targets, or None for no limit.

    `key` is the launch's name. There is no limit for other ops, for float32 and for candidates. Candidates are launch
    configurations that no GPU has measured yet, with " candidate " in `key`. Otherwise the head size decides. At 64 the
    limit is 0. At 128 it is 0 without dropout and SPILLS (128) with it. Other head sizes have no limit.
    """
    if not key.startswith("attention ") or "float32" in key or " candidate " in key:
        return None
    if "D=64 " in key:
        return 0
    if "D=128 " in key:
        return SPILLS if "dropout" in key else 0
    return None


def is_small(key: str) -> bool:
    """Return False for a kernel whose head size is over 128, or whose rows have more than 8,192 values, else True.

    Larger sizes do not fit in registers. `key` is the launch's name, which contains the head size, such as " D=64", or
    the length of a row, such as " N=768". A name without either counts as small.
    """
    size = re.search(r" (D|N)=(\d+)", key)
    return size is None or int(size[2]) <= SMALL[size[1]]


def attention_loops(figures: dict[str, dict[str, Figure]], target: str, step: str, label: str) -> list[Figure] | None:
    """Return the figures of attention's kernels of a pass as a list, one kernel forward and two backward, or None.

    The result is None if a kernel is missing on `target`, such as "sm_90". It is also None if a kernel does not have
    exactly two loops, both with "pipes" (estimated cycles for each unit of the chip). `step` is "forward" or
    "backward", and `label` is the rest of the launches' names, such as "D=64 bfloat16". `figures` maps launch's name →
    target → figures of the compiled kernel.
    """
    found = []
    for kernel in PASSES[step]:
        figure = figures.get(f"attention {kernel} {label}", {}).get(target)
        if figure is None or len(figure["loops"]) != 2 or any("pipes" not in loop for loop in figure["loops"]):
            return None
        found.append(figure)
    return found


def dropout_speed(figures: dict[str, dict[str, Figure]], target: str, step: str, label: str) -> float | None:
    """Return the predicted speed of attention with dropout divided by that without it, or None.

    Each kernel of the pass has a loop over tiles that need no mask. The estimated cycles of one iteration, divided by
    the number of elements in a tile, are added up over the kernels. The speed is taken as the inverse of that sum. The
    result is None if a kernel is missing or its cycles cannot be estimated.

    `step` is "forward" or "backward", `label` is such as "D=64 bfloat16", without " dropout", and `target` is such as
    "sm_90". `figures` maps launch's name → target → figures of the compiled kernel.
    """
    cycles = []
    for name in (label, f"{label} dropout"):
        kernels = attention_loops(figures, target, step, name)
        if kernels is None:
            return None
        cycles.append(
            sum(loop_bounds.cycles(figure["loops"][-1]["pipes"]) / math.prod(figure["tile"]) for figure in kernels)
        )
    return cycles[0] / cycles[1]


def attention_labels(figures: dict[str, dict[str, Figure]], step: str) -> list[str]:
    """Return the labels of attention's launches of a pass: their names from the head size on, such as "D=64 bfloat16".

    `step` is "forward" or "backward"; one kernel of the pass gives the names. Labels with dropout end in " dropout".
    `figures` maps launch's name → target such as "sm_90" → figures of the compiled kernel.
    """
    prefix = f"attention {PASSES[step][0]} "
    return [key.removeprefix(prefix) for key in figures if key.startswith(prefix)]


def slow_dropout(figures: dict[str, dict[str, Figure]]) -> list[str]:
    """Return a message for each pass of attention, label and architecture whose speed drops too much with dropout.

    `dropout_speed` predicts the share of the speed that is left. It must be at least the pass's entry in DROPOUT_SPEED.
    Labels without a prediction are skipped. So are candidates, launch configurations that no GPU has measured yet. Only
    architectures that are `targeted` in kernels/architectures.py are checked. A label is such as "D=64 bfloat16".
    `figures` maps launch's name → target such as "sm_90" → figures of the compiled kernel.
    """
    found = []
    for step, least in DROPOUT_SPEED.items():
        shipped = [label for label in attention_labels(figures, step) if " candidate " not in label]
        for label in shipped:
            for target in (target for target, architecture in BY_TARGET.items() if architecture.targeted):
                share = dropout_speed(figures, target, step, label)
                if share is not None and share < least:
                    found.append(
                        f"attention {label} {target}: dropout leaves {step} {share:.3f} of its speed; "
                        f"expected at least {least}"
                    )
    return found


def broken_statements(figures: dict[str, dict[str, Figure]], triton: str = TRITON) -> list[str]:
    """Return a message for each fixed limit that a kernel breaks. Fixed limits do not depend on the kernel's budget.

    A kernel may spill at most 128 bytes, unless its head size is over 128 or its rows have more than 8,192 values.
    On architectures with speed targets, attention has further limits: on spills, and on accesses to shared memory that
    dropout adds. They are not checked for a kernel that breaks the first limit. For the Triton release TRITON,
    attention must also keep a share of its predicted speed with dropout.

    `triton` is the minor version that compiled the kernels, such as "3.6". `figures` maps launch's name → target such
    as "sm_90" → figures of the compiled kernel.
    """
    found = slow_dropout(figures) if triton == TRITON else []
    for key, by_target in figures.items():
        for target, figure in by_target.items():
            if is_small(key) and figure["spilled"] > SPILLS:
                found.append(f"{key} {target}: spills {figure['spilled']} bytes, expected at most {SPILLS}")
            elif BY_TARGET[target].targeted:
                found += _broken_on(figures, key, target)
    return found


def _broken_on(figures: dict[str, dict[str, Figure]], key: str, target: str) -> list[str]:
    """Return a message for each fixed limit that a kernel breaks on an architecture with speed targets.

    `key` is the launch's name, `target` is such as "sm_90", and `figures` maps launch's name → target → figures of the
    compiled kernel. Spilled bytes must not exceed `spill_limit(key)`. In an attention kernel with head size up to 128,
    dropout must not add an access to shared memory or a shuffle to a loop. A message also says if the kernel without
    dropout is missing or has another number of loops.
    """
    found = []
    figure = figures[key][target]
    limit = spill_limit(key)
    if limit is not None and figure["spilled"] > limit:
        found.append(f"{key} {target}: spills {figure['spilled']} bytes, expected at most {limit}")
    without = without_dropout(figures, key, target)
    if without is None and key.startswith("attention ") and key.endswith(" dropout"):
        found.append(f"{key} {target}: no kernel without dropout is compiled to compare it with")
    if without is not None:
        if len(without["loops"]) != len(figure["loops"]):
            found.append(f"{key} {target}: {len(figure['loops'])} loops, {len(without['loops'])} without dropout")
        for number, (mine, other) in enumerate(zip(figure["loops"], without["loops"], strict=False), 1):
            found += [
                f"{key} {target}: loop {number} has {mine[kind]} {kind}, {other[kind]} without dropout"
                for kind in ("lds", "sts", "shfl")
                if is_small(key) and mine[kind] > other[kind]
            ]
    return found


def loop_table(figures: dict[str, dict[str, Figure]], target: str) -> list[str]:
    """Return the lines of a Markdown table of the loops around matrix products on a target, such as "sm_90".

    A row is a loop: its numbers of instructions, the number that dropout adds, and the estimated cycles for each unit
    of the chip. The cycles are empty if the loop has no "pipes". Attention has two loops: over tiles with a mask, then
    over tiles without. Kernels without figures on the target are left out. `figures` maps launch's name → target →
    figures of the compiled kernel.
    """
    columns = ("instructions", "added by dropout", *KINDS, *loop_bounds.PIPES, "cycles")
    lines = [
        "",
        f"### Loops, {target}",
        "",
        "Cycles of a multiprocessor for one turn of one program, by pipe. `cycles` is the slower of `tensor` and",
        "`shared` plus the busiest of the others. tools/loop_bounds.py says what is counted.",
        "",
        f"| kernel | loop | {' | '.join(columns)} |",
        "| --- |" + " ---: |" * (len(columns) + 1),
    ]
    for key, by_target in figures.items():
        figure = by_target.get(target)
        if figure is None:
            continue
        added = figure.get("dropout", [""] * len(figure["loops"]))
        for number, (loop, dropout) in enumerate(zip(figure["loops"], added, strict=True), 1):
            pipes = loop.get("pipes")
            cells = [number, loop["instructions"], dropout, *(loop[name] for name in KINDS)]
            cells += [*pipes.values(), loop_bounds.cycles(pipes)] if pipes else [""] * (len(loop_bounds.PIPES) + 1)
            lines.append(f"| {key} | {' | '.join(map(str, cells))} |")
    return lines


def speed_table(figures: dict[str, dict[str, Figure]], target: str) -> list[str]:
    """Return the lines of a Markdown table of attention's predicted TFLOP/s on a target, such as "sm_90".

    A row is a pass with head size, dtype and dropout, such as "backward D=64 bfloat16 dropout". Its rates are for all
    kernels of the pass together, one for each sequence length in LENGTHS. In rows with dropout, the last cell is the
    share of the speed that attention keeps with dropout. A row is left out if a kernel of the pass is missing or its
    cycles cannot be estimated. `figures` maps launch's name → target → figures of the compiled kernel.
    """
    lines = [
        "",
        f"### Attention's predicted rates, {target}",
        "",
        "Causal, TFLOP/s of an H100 SXM by the cycles above; `dropout leaves` compares the loops without a mask.",
        "",
        f"| kernel | {' | '.join(f'T = {T:,}' for T in LENGTHS)} | dropout leaves |",
        "| --- |" + " ---: |" * (len(LENGTHS) + 1),
    ]
    for step in PASSES:
        for label in attention_labels(figures, step):
            kernels = attention_loops(figures, target, step, label)
            if kernels is not None:
                share = dropout_speed(figures, target, step, label.removesuffix(" dropout"))
                left = f"{share:.2f}" if share is not None and label.endswith(" dropout") else ""
                cells = [f"{predicted_rate(kernels, step, label, T):.0f}" for T in LENGTHS]
                lines.append(f"| {step} {label} | {' | '.join(cells)} | {left} |")
    return lines


def predicted_rate(kernels: list[Figure], step: str, label: str, T: int) -> float:
    """Return the TFLOP/s of causal attention with T tokens in a pass, predicted for an H100 SXM: an upper bound.

    It assumes that the busiest unit of a multiprocessor limits each loop and that latencies cost nothing. `kernels` are
    the figures of the pass's kernels: one forward, or dq and dkdv backward. Each has "tile" (rows and columns of the
    score matrix that a program computes at a time) and two "loops", the masked one first. A loop's "pipes" are the
    cycles of each unit for one iteration. `step` is "forward" or "backward", and `label` has the head size, as in
    "D=64 bfloat16".
    """
    total = 0.0
    for name, figure in zip(PASSES[step], kernels, strict=True):
        masked, unmasked = (loop_bounds.cycles(loop["pipes"]) for loop in figure["loops"])
        own, walked = reversed(figure["tile"]) if name == "bwd_dkdv" else figure["tile"]
        total += loop_bounds.causal_cycles(masked, unmasked, own, walked, T)
    size = re.search(r"D=(\d+)", label)
    return loop_bounds.rate(PRODUCTS[step], int(size[1]), T, total)  # type: ignore[index]


def minor(version: str) -> str:
    """Return the first two numbers of a version, such as "3.6" for "3.6.0"."""
    return ".".join(version.split(".")[:2])


def table(figures: dict[str, dict[str, Figure]], version: str) -> str:
    """Return the Markdown page of all figures, with a table for each GPU architecture in them.

    If speed targets are set for an architecture, it also gets tables of loops and of attention's predicted rates.
    `version` is Triton's version. `figures` maps launch's name → architecture such as "sm_90" → figures of the compiled
    kernel.
    """
    lines = [
        "# Generated code",
        "",
        f"What Triton {version} makes of every kernel and shipped configuration. `spilled` is bytes of local memory a",
        "thread, `shared` is bytes a program, the rest counts instructions; `lds` and `sts` include LDSM and STSM.",
        f"Nothing here was run. Written by `make codegen`; the budgets are in codegen-{minor(version)}.json.",
    ]
    compiled = {target for by_target in figures.values() for target in by_target}
    for target, architecture in BY_TARGET.items():
        if target not in compiled:
            continue
        lines += [
            "",
            f"## {target}",
            "",
            f"| kernel | {' | '.join(COLUMNS)} |",
            "| --- |" + " ---: |" * len(COLUMNS),
        ]
        for key, by_target in figures.items():
            if target not in by_target:
                continue  # compiled there under another name
            figure = by_target[target]
            lines.append(f"| {key} | {' | '.join(str(figure[name]) for name in COLUMNS)} |")
        if architecture.targeted:
            lines += loop_table(figures, target) + speed_table(figures, target)
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compile recorded launches of kernels, write a page about the machine code, and check it against a budget.

    The first argument of the command line is the JSON file that tools.record_launches wrote. The page is
    benchmarks/results/codegen-<minor version of Triton>.md: registers, spilled bytes, shared memory and instructions of
    each kernel. The JSON file beside the page is the budget. With --update, this build's figures replace the whole
    budget before the check. With --targeted, only architectures with speed targets are compiled for and checked. The
    new page, and with --update the new budget, then have no other architectures.

    --jobs is the number of processes. A line is printed for each violation of the budget or of a fixed limit, then
    the number of violations. Exit with code 1 if there is one, else 0. Exit with an error if the budget is missing or
    of another version of Triton.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("launches", type=Path)
    parser.add_argument("--update", action="store_true", help="make this build the budget")
    parser.add_argument("--targeted", action="store_true", help="only architectures that have speed targets")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="processes that compile")
    arguments = parser.parse_args()
    stand_in_torch()
    import triton

    launches = json.loads(arguments.launches.read_text("utf-8"))
    if arguments.targeted:
        launches = [launch for launch in launches if BY_TARGET[f"sm_{launch['target']}"].targeted]
    with ProcessPoolExecutor(arguments.jobs) as pool:
        measured = list(pool.map(compile_launch, launches))
    figures: dict[str, dict[str, Figure]] = {}
    for launch, figure in zip(launches, measured, strict=True):
        figures.setdefault(launch["key"], {})[f"sm_{launch['target']}"] = figure
    add_dropout(figures)
    name = f"codegen-{minor(triton.__version__)}"
    (RESULTS / f"{name}.md").write_text(table(figures, triton.__version__), encoding="utf-8")

    budgets = RESULTS / f"{name}.json"
    if arguments.update:
        kept = {key: {target: budget_of(f) for target, f in by.items()} for key, by in figures.items()}
        budgets.write_text(json.dumps({"triton": triton.__version__, "kernels": kept}, indent=1) + "\n", "utf-8")
    recorded: dict[str, Any] = (
        json.loads(budgets.read_text("utf-8")) if budgets.exists() else {"triton": "none", "kernels": {}}
    )
    if recorded["triton"] != triton.__version__:
        sys.exit(f"codegen: budgets are for Triton {recorded['triton']}, this is {triton.__version__}: --update")
    allowed = recorded["kernels"]
    found = [f"{key}: in the budget but not launched" for key in sorted(set(allowed) - set(figures))]
    found += broken_statements(figures, minor(triton.__version__))
    for key, by_target in figures.items():
        for target, figure in by_target.items():
            found += violations(key, target, figure, allowed.get(key, {}).get(target))
    print("\n".join(found) if found else "", end="\n" if found else "")
    print(f"codegen: {len(launches)} compiled kernels, {len(found)} violations")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
