"""The table of README.md that shows which implementation serves which op, as PyTorch's dispatcher has it."""

from gpt_fast import ops, reference


def table() -> str:
    """Return a Markdown table: for each op, "yes" where the reference, a C++ kernel or a Triton kernel serves the op.

    An empty cell means that there is no kernel, and that the reference runs instead.
    """
    lines = [
        "| op | reference, any device | C++, CPU | Triton, CUDA |",
        "| --- | :---: | :---: | :---: |",
    ]
    for op in ops.NAMES:
        cells = (hasattr(reference, op), ops.serving(op, "cpu") == "cpp", ops.serving(op, "cuda") == "triton")
        lines.append(f"| `{op}` | {' | '.join('yes' if there else '' for there in cells)} |")
    return "\n".join(lines) + "\n"
