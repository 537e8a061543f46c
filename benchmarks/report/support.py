"""The table of README.md that shows which implementation serves which op, as PyTorch's dispatcher has it."""

from gpt_fast import ops, reference


def table() -> str:
    """Return a Markdown table of the ops: "yes" where the op has a reference, a C++ kernel and a Triton kernel.

    An empty cell means that there is no such kernel, so the reference runs on that device.
    """
    lines = [
        "| op | reference, any device | C++, CPU | Triton, CUDA |",
        "| --- | :---: | :---: | :---: |",
    ]
    for op in ops.NAMES:
        cells = (hasattr(reference, op), ops.serving(op, "cpu") == "cpp", ops.serving(op, "cuda") == "triton")
        lines.append(f"| `{op}` | {' | '.join('yes' if there else '' for there in cells)} |")
    return "\n".join(lines) + "\n"
