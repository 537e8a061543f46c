"""Which implementation serves which op, as the dispatcher has it, for README.md: python -m benchmarks.support"""

import re
from pathlib import Path

from gpt_fast import ops, reference

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(r"(<!-- support: made by `make report` -->\n).*?(<!-- /support -->)", re.DOTALL)


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


def rewritten(text: str) -> str:
    """The text with the table between its two marks replaced."""
    new, count = _BLOCK.subn(lambda match: match[1] + table() + match[2], text)
    if count != 1:
        raise ValueError(f"README.md: found {count} blocks of the support table, wanted 1")
    return new


def main() -> None:
    readme = ROOT / "README.md"
    readme.write_text(rewritten(readme.read_text("utf-8")), encoding="utf-8")
    print(readme)


if __name__ == "__main__":
    main()
