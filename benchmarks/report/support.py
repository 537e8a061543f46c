"""The table of README.md that shows which implementation serves which op, as PyTorch's dispatcher has it."""

from gpt_fast import ops, reference


def table() -> str:
    """Return a Markdown table with a row for each op: "yes" if it has a reference, a C++ kernel, a Triton kernel.

    An empty cell means that PyTorch's dispatcher now has no such kernel of the op; the reference runs on that device.
    The text ends in a newline.
    """
    lines = [
        "| op | reference, any device | C++, CPU | Triton, CUDA |",
        "| --- | :---: | :---: | :---: |",
    ]
    for op in ops.NAMES:
        cells = (hasattr(reference, op), ops.serving(op, "cpu") == "cpp", ops.serving(op, "cuda") == "triton")
        lines.append(f"| `{op}` | {' | '.join('yes' if there else '' for there in cells)} |")
    return "\n".join(lines) + "\n"
