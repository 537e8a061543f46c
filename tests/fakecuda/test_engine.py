"""Test the training engine on `cuda`: updates in three precisions, with batches that are made on the host."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpt_fast.data.batches import Batch
from gpt_fast.training.engine.update import PRECISIONS
from gpt_fast.training.loop import Loop, LoopSettings
from gpt_fast.training.runs.folder import new_run
from tests.fakecuda.small import batches, engine_on

if os.environ.get("FAKECUDA_CAPABILITY", "90") != "90":
    pytest.skip("whole models run as sm_90", allow_module_level=True)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("options", [{}, {"checkpoint_activations": True}, {"compile": True}], ids=str)
def test_an_update_does_not_wait(precision: str, options: dict, device: torch.device, watched: Callable) -> None:
    """An update waits neither for the copy of a batch nor for a number that the host already knows."""
    engine = engine_on(device, precision=precision, **options)
    for _ in range(2):
        engine.update(batches(), 1e-4)
    with watched() as seen:
        engine.update(batches(), 1e-4)
    assert seen.of("triton")


def test_the_first_update_of_a_resumed_state_does_not_wait(device: torch.device, watched: Callable) -> None:
    engine = engine_on(device, precision="bfloat16")
    engine.update(batches(), 1e-4)
    engine.state()
    with watched():
        engine.update(batches(1), 1e-4)


def test_batches_are_copied_beside_the_kernels(device: torch.device, watched: Callable) -> None:
    """Batches are copied from pinned memory, on a stream that runs no kernel."""
    engine = engine_on(device)
    engine.update(batches(), 1e-4)
    with watched() as seen:
        engine.update(batches(), 1e-4)
    copies = [entry for entry in seen.of("copy") if entry.name.startswith("host")]
    assert {entry.name for entry in copies} == {"host to device, pinned"}
    assert not {entry.stream for entry in copies} & {entry.stream for entry in seen.of("triton")}


def test_a_loop_waits_where_it_logs_only(
    device: torch.device, watched: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host reads losses, skips and the gradient's norm only for a line of the log.

    It reads losses and skips once more after the first update.
    """
    monkeypatch.setattr(Loop, "_save_last", lambda self: None)  # a checkpoint reads everything
    engine, steps = engine_on(device, precision="bfloat16"), 8
    settings = LoopSettings(steps, 1e-4, lambda step: 1.0, log_every=4, valid_every=100)
    sent: list[int] = []
    ahead: list[int] = []

    def source(step: int) -> list[Batch]:
        sent.append(step)
        return batches(1)

    with new_run(tmp_path / "run") as run:
        loop = Loop(engine, source, dict, settings, run, lambda progress: ahead.append(len(sent) - progress.step))
        with watched(waits=True) as seen:
            loop.run()
    assert sent == list(range(steps))
    assert ahead == [1] * (steps - 1) + [0], "expected the next batch on its way before an update is waited for"
    reads = [entry for entry in seen.of("sync") if entry.name == "cudaStreamSynchronize"]
    assert len(reads) == 2 + 2 * 3
    assert {entry.name for entry in seen.of("copy") if "pageable" in entry.name} == {"device to host, pageable"}
