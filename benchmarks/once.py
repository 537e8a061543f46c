"""Runs every op once, forward and backward, on the GPU, for compute-sanitizer: python -m benchmarks.once --small"""

import sys

import torch

import gpt_fast
from benchmarks.cases import cases


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("benchmarks.once: no CUDA device")
    for case in cases("cuda", small="--small" in sys.argv[1:]):
        case.prepare(getattr(gpt_fast.ops, case.op.name))()
        torch.cuda.synchronize()
        print(case.name)


if __name__ == "__main__":
    main()
