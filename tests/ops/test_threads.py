"""Test the threads of the C++ kernels: any number of them, kernels that run at the same time, and after a fork."""

import os
import signal
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt_fast import build_info, ops
from tests.conftest import INTERPRETED

pytestmark = pytest.mark.skipif(build_info() is None or INTERPRETED, reason="these are about the C++ kernels' threads")


def block(seed: int) -> list[Tensor]:
    """Return the gradients of a small block, which runs the loops of every kind of kernel."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    x, gain, shift, qkv = random(2, 96, 64), random(64), random(64), random(192, 64)
    fc, fc_bias, proj, proj_bias = random(256, 64), random(256), random(64, 256), random(64)
    head, targets = random(997, 64), torch.randint(0, 997, (2, 96), generator=generator)
    normed = ops.layer_norm(x, gain, shift, 1e-5)
    attended = ops.attention_qkv(ops.linear(normed, qkv), 4, causal=True)
    hidden = ops.mlp(attended + x, fc, fc_bias, proj, proj_bias, "gelu_tanh")
    ops.linear_cross_entropy(hidden, head, targets).backward()
    return [parameter.grad for parameter in (x, gain, shift, qkv, fc, fc_bias, proj, proj_bias, head)]  # type: ignore[misc]


def alike(got: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_the_block_is_right(two_threads):
    """With two threads `linear` agrees with PyTorch's function. The other tests only compare this library's results."""
    generator = torch.Generator().manual_seed(3)
    x, w = (torch.randn(shape, generator=generator) for shape in ((700, 64), (256, 64)))
    torch.testing.assert_close(ops.linear(x, w), F.linear(x, w))


def test_one_thread_and_two_give_the_same_bits(two_threads):
    both = block(0)
    torch.set_num_threads(1)
    assert alike(block(0), both)


def test_python_threads_at_once(two_threads):
    """One Python thread uses the kernels' threads and the others run alone. All get the same bits and none hangs."""
    expected, found = [block(seed) for seed in range(4)], {}

    def run(seed: int) -> None:
        found[seed] = [block(seed) for _ in range(3)]

    threads = [threading.Thread(target=run, args=(seed,), daemon=True) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert sorted(found) == [0, 1, 2, 3]
    assert all(alike(got, expected[seed]) for seed in found for got in found[seed])


def test_a_forked_child_has_threads_of_its_own(two_threads):
    """A forked child has none of its parent's threads. A kernel that waited for them, as OpenMP does, would hang."""
    expected = block(0)
    x, w = torch.randn(128, 64), torch.randn(192, 64)
    product = ops.linear(x, w).numpy().tobytes()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        torch.utils.deterministic.fill_uninitialized_memory = False  # PyTorch's fill runs in OpenMP and would hang
        os._exit(0 if ops.linear(x, w).numpy().tobytes() == product else 1)  # torch.equal would hang too
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert alike(block(0), expected)
