"""Runs every op once, forward and backward, on the GPU, for compute-sanitizer: python -m benchmarks.once --small"""

import sys

import torch

from benchmarks.cases import TOPICS, cases
from benchmarks.peers import OURS, PEERS
from benchmarks.runner import make_inputs, once


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("benchmarks.once: no CUDA device")
    for op, peers in PEERS.items():
        topic, ours = TOPICS[op], next(peer for peer in peers if peer.name == OURS)
        small = topic.small_cases("cuda", torch.bfloat16) if "--small" in sys.argv[1:] else cases(topic, "cuda")
        for case in small:
            reason = ours.missing(case)
            if reason is None:
                once(ours.build(case), make_inputs(topic, case)[0], topic.passes)()
                torch.cuda.synchronize()
            print(op, case.name, reason or "")


if __name__ == "__main__":
    main()
