"""Every op forward and backward on `cuda`: what it launches, and on which device."""

import os
from collections.abc import Callable

import pytest
import torch

from tests.fakecuda import calls

# As sm_90 every dtype, mask and edge; as another architecture one training and one decoding call of each op.
CASES = calls.EVERY if os.environ.get("FAKECUDA_CAPABILITY", "90") == "90" else calls.TRAINING | calls.DECODING


@pytest.mark.parametrize("name", CASES)
def test_an_op_launches_on_its_tensors_device(name: str, device: torch.device, watched: Callable) -> None:
    call = CASES[name](device)
    with watched() as seen:
        call()
    assert seen.of("triton"), "expected Triton's kernels"
