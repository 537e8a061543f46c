"""`gpt-fast compare`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .terminal import AsJson, Device, counting_bar, print_json, print_table, require_train_extra, resolve_device


def compare(
    source: Annotated[Path, typer.Option("--from", help="Run folder of any model.")],
    batch_size: Annotated[int, typer.Option(help="Rows in the batch.")] = 8,
    repeats: Annotated[int, typer.Option(help="Timed training steps of each; the median is shown.")] = 9,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Compares a model on its fused kernels with the same model on the pure-PyTorch reference.

    One batch, the same weights and dropout masks: the largest differences of logits and gradients, and the speed of
    training steps, the two taking turns. [bold]gpt-fast doctor[/bold] shows which operations have a kernel here; one
    served by the reference does not differ from it.

    [bold]Example[/bold]

    gpt-fast compare --from runs/lm
    """
    require_train_extra()
    for option, value in (("--batch-size", batch_size), ("--repeats", repeats)):
        if value < 1:
            raise ValueError(f"{option} {value}: wanted at least 1")
    device = resolve_device(device)
    from gpt_fast.training.compare import compare as measure

    with counting_bar("timing") as show:
        result = measure(source, device, batch_size, repeats, show)
    if as_json:
        print_json(result)
        return
    by_kernel: dict[str, list[str]] = {}
    for op, kernel in result["kernels"].items():
        by_kernel.setdefault(kernel, []).append(op)
    rows = [(f"run by {kernel}", ", ".join(names)) for kernel, names in sorted(by_kernel.items())]
    for name in ("logits", "gradients"):
        apart = result[name]
        rows.append((name, f"differ by at most {apart['largest']:.1e}, {apart['relative']:.1e} of their scale"))
    for name, label in (("fused", "with kernels"), ("reference", "reference")):
        low, high = result[f"{name}_spread"]
        rows.append((label, f"{result[f'{name}_tokens_per_second']:,.0f} tokens/s ({low:,.0f} to {high:,.0f})"))
    rows.append(("speed-up", f"{result['speedup']:.2f} ×"))
    B, T = result["batch"]
    print_table(f"{source} on {result['device']}, training steps of {B} × {T} tokens", rows)
