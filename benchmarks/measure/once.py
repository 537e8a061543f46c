"""Run every op once, both ways, on the GPU, for compute-sanitizer: `python -m benchmarks.measure.once --small`.

Without --small it runs every case of the suite.
"""

import sys

import torch

from benchmarks import catalogue
from benchmarks.measure.calls import all_passes, make_inputs
from benchmarks.topic import BF16


def main() -> None:
    """Run gpt_fast's implementation of every op on the GPU, once for each case.

    A case has sizes, a dtype and a dropout probability. A run is the op's passes, mostly forward and backward. Print
    each case, and the reason if it was skipped. The cases are the suite's or, with --small on the command line, a few
    small shapes in bfloat16. Exit with a message if there is no GPU.
    """
    if not torch.cuda.is_available():
        sys.exit("benchmarks.measure.once: no CUDA device")
    for op, topic in catalogue.ops().items():
        ours = topic.peers[0]
        small = "--small" in sys.argv[1:]
        for case in topic.small_cases("cuda", BF16) if small else catalogue.cases(topic, "cuda"):
            reason = ours.missing(case)
            if reason is None:
                all_passes(ours.build(case), make_inputs(topic, case)[0], topic.passes)()
                torch.cuda.synchronize()
            print(op, case.name, reason or "")


if __name__ == "__main__":
    main()
