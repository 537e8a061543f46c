"""Which implementation serves which op, as the dispatcher has it: a table of README.md."""

from gpt_fast import ops, reference


def table() -> str:
    """One row for an op. A kernel that is not there yet is an empty cell: the reference serves in its place."""
    lines = [
        "| op | reference, any device | C++, CPU | Triton, CUDA |",
        "| --- | :---: | :---: | :---: |",
    ]
    for op in ops.NAMES:
        cells = (hasattr(reference, op), ops.serving(op, "cpu") == "cpp", ops.serving(op, "cuda") == "triton")
        lines.append(f"| `{op}` | {' | '.join('yes' if there else '' for there in cells)} |")
    return "\n".join(lines) + "\n"
