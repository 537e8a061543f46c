"""Test the threads of the C++ decode step: on a busy machine, after a fork, and shared by several sessions.

The result must have the same bits in each case, and the threads must end.
"""

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

from gpt_fast import DecodeSession, GPTConfig, GPTForCausalLM, build_info
from gpt_fast.generation.steps import WEIGHTS
from tests.conftest import INTERPRETED

pytestmark = pytest.mark.skipif(
    build_info() is None or INTERPRETED, reason="the threads are those of the C++ step: it needs the extension"
)
# Large enough that every phase is worth two threads, small enough for some hundred steps a second.
SIZES = {"num_layers": 2, "hidden_dim": 256, "num_heads": 4, "num_tokens": 997, "seq_len": 400}


@pytest.fixture(scope="module")
def model() -> GPTForCausalLM:
    torch.manual_seed(0)
    return GPTForCausalLM(GPTConfig.preset("gpt2", **SIZES)).eval()


def logits_of_steps(model: GPTForCausalLM, steps: int = 100, **options) -> torch.Tensor:
    """Return the logits [steps, 3, V] of a prompt and the steps after it."""
    generator = torch.Generator().manual_seed(1)
    session = DecodeSession(model, batch=3, **options)
    tokens = torch.randint(0, 997, (3, 40 + steps), generator=generator)
    found = [session.prefill(tokens[:, :40])]
    found += [session.step(tokens[:, 40 + i]) for i in range(steps - 1)]
    return torch.stack(found)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_busy_machine_changes_no_bit(model, two_threads, weights):
    """Two processes that never wait suspend the threads in the middle of their pieces."""
    torch.set_num_threads(1)
    alone = logits_of_steps(model, weights=weights)
    torch.set_num_threads(2)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        for _ in range(3):
            assert torch.equal(logits_of_steps(model, weights=weights), alone)
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_two_sessions_in_two_threads(model, two_threads):
    expected, found = logits_of_steps(model), {}

    def work(name: int) -> None:
        found[name] = logits_of_steps(model)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[name], expected) for name in range(3))


def test_after_a_fork(model, two_threads):
    """A forked child has none of its parent's threads, so the decode step must start its own.

    The child uses the session that its parent made: packing weights needs OpenMP, which does not work after a fork.
    """
    session = DecodeSession(model, batch=3)
    token = torch.zeros(3, dtype=torch.int64)
    first, second = session.step(token), session.step(token)
    session.reset()
    assert torch.equal(session.step(token), first)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        same = torch.equal(session.step(token), second)
        del session
        os._exit(0 if same else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert torch.equal(session.step(token), second)


def test_a_prompt_gives_the_bits_of_steps(model, two_threads):
    for weights in WEIGHTS:
        tokens = torch.randint(0, 997, (2, 37), generator=torch.Generator().manual_seed(2))
        at_once, stepped = (
            DecodeSession(model, batch=2, weights=weights),
            DecodeSession(model, batch=2, weights=weights),
        )
        logits = at_once.prefill(tokens, torch.tensor([37, 23]))
        for i in range(37):
            after = stepped.step(tokens[:, i])
            for row, length in enumerate((37, 23)):
                if i + 1 == length:
                    assert torch.equal(logits[row], after[row]), weights
        in_parts = DecodeSession(model, batch=2, weights=weights)
        in_parts.prefill(tokens[:, :20])
        assert torch.equal(in_parts.prefill(tokens[:, 20:], torch.tensor([17, 3])), logits)


def test_more_pieces_than_are_shared_at_a_time(model, two_threads):
    """Drawing the tokens of 4,200 rows is 4,200 pieces of work, more than the threads share at a time."""
    session = DecodeSession(model, batch=4200, length=2)
    tokens = torch.arange(4200) % 997
    logits = session.step(tokens)
    assert torch.equal(logits[:997], logits[997:1994])
    few = DecodeSession(model, batch=3, length=2)
    assert torch.equal(few.step(tokens[4000:4003]), logits[4000:4003])
