"""The table of README.md that shows which implementation serves which op, as PyTorch's dispatcher has it."""

from gpt_fast import ops, reference


def table() -> str:
    """Return a Markdown table of the implementations that each op has in this installation, with a row for each op.

    The columns are the op's name, the reference (any device), the C++ kernel (CPU) and the Triton kernel (CUDA). A cell
    is "yes" if the op has that implementation, else empty. On a device for which an op has no kernel, the reference
    runs. The text ends in a newline.
    """
    lines = [
        "| op | reference, any device | C++, CPU | Triton, CUDA |",
        "| --- | :---: | :---: | :---: |",
    ]
    for op in ops.NAMES:
        cells = (hasattr(reference, op), ops.serving(op, "cpu") == "cpp", ops.serving(op, "cuda") == "triton")
        lines.append(f"| `{op}` | {' | '.join('yes' if there else '' for there in cells)} |")
    return "\n".join(lines) + "\n"
