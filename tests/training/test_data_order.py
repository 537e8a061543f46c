"""The order of the data: a function of seed and update alone, whatever number of processes and parts share it."""

import json
from functools import partial

import numpy as np
import pytest
import torch

from gpt_fast.data.example_batches import Example
from gpt_fast.data.masking import mask_tokens
from gpt_fast.data.stream import TokenStream
from gpt_fast.interrupts import Interrupted, Stop
from gpt_fast.training import finetune, lm_data, pretrain
from gpt_fast_settings.finetune import FinetuneSettings
from gpt_fast_settings.pretrain import PretrainSettings

pytestmark = pytest.mark.usefixtures("one_thread")

STREAM = TokenStream([np.arange(3, 1000, dtype=np.int32), np.arange(1000, 1011, dtype=np.int32)])
MASK = partial(mask_tokens, mask_token=2, ordinary=torch.arange(3, 1011))


def ignore(*_: object) -> None:
    """Stand in for a display."""


def joined(batches) -> tuple[list, list]:
    """Return the tokens and the labels of `batches`, row by row."""
    return tuple([row for batch in batches for row in getattr(batch, name).tolist()] for name in ("tokens", "labels"))


@pytest.mark.parametrize("mask", [None, MASK], ids=["clm", "mlm"])
@pytest.mark.parametrize("warmup", [0, 8])
@pytest.mark.parametrize(("ranks", "parts"), [(1, 4), (2, 1), (2, 2), (4, 1), (4, 3)])
def test_an_update_has_the_same_windows_on_any_number_of_ranks(mask, warmup, ranks, parts):
    """Their masks, and the pieces that windows are cut into during warm-up, are the same too."""
    make = partial(lm_data.WindowSource, STREAM, 16, 12, 5, mask, warmup=warmup)
    alone = make()
    for step in range(10):
        sources = [make(parts=parts, rank=rank, ranks=ranks) for rank in range(ranks)]
        shared = [source(step) for source in sources]
        assert all(len(each) == parts for each in shared)
        assert joined([batch for each in shared for batch in each]) == joined(alone(step))


def test_a_pass_reads_every_token_once():
    """A pass leaves out only tokens at the ends, and every pass has another order."""
    source = lm_data.WindowSource(STREAM, 16, 4, 5)
    per_pass = len(STREAM) // 16 - 1
    rows = [tuple(row) for step in range(3 * per_pass) for row in joined(source(step))[0]]
    passes = [rows[i * per_pass : (i + 1) * per_pass] for i in range(12)]
    for each in passes:
        tokens = [token for row in each for token in row]
        assert len(set(tokens)) == len(tokens) == 16 * per_pass
    assert len({tuple(each) for each in passes}) == 12


def test_windows_are_cut_into_four_pieces_then_two_then_none():
    """Pieces have the tokens of whole windows. The first token of a piece has no label."""
    plain, cut = (lm_data.WindowSource(STREAM, 16, 4, 5, warmup=warmup) for warmup in (0, 6))
    for step in range(8):
        (whole,), (pieces,) = plain(step), cut(step)
        count = 4 if step < 3 else 2 if step < 6 else 1
        assert pieces.tokens.shape == (4 * count, 16 // count)
        assert torch.equal(pieces.tokens.view(4, 16), whole.tokens)
        assert (pieces.labels[:, 0] == -100).all() and torch.equal(pieces.labels[:, 1:], pieces.tokens[:, 1:])
        assert pieces.weight == 4 * (16 - count)


def test_an_epoch_has_every_row_once():
    rows = [Example([[i]], target=i % 2) for i in range(23)]
    source = finetune.RowSource(rows, 5, 0, 9)
    epochs = [
        [token for step in range(5 * epoch, 5 * epoch + 5) for (token,) in joined(source(step))[0]]
        for epoch in range(4)
    ]
    for epoch in epochs:
        assert sorted(epoch) == list(range(23))
    assert len(set(map(tuple, epochs))) == 4
    assert [token for step in range(5) for (token,) in joined(finetune.RowSource(rows, 5, 0, 9)(step))[0]] == epochs[0]


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_a_resumed_run_sees_no_sample_twice_and_skips_none(monkeypatch, tmp_path, command):
    """Stopped twice and resumed, a run reads what an uninterrupted one reads."""
    (tmp_path / "t.txt").write_text("".join(f"the fox runs {i % 7} times\n" for i in range(200)))
    rows = [{"text": f"fox {i}", "label": i % 2} for i in range(50)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = {"tokenizer": "byte", "layers": 1, "heads": 2, "dim": 16, "seq_len": 16, "batch_size": 4}
    make = partial(PretrainSettings, data=(tmp_path / "t.txt",), steps=12, **sizes)
    train, source = pretrain.pretrain, lm_data.WindowSource
    if command == "finetune":
        pretrain.pretrain(make(out=tmp_path / "lm"), ignore, ignore)
        make = partial(FinetuneSettings, source=tmp_path / "lm", train=tmp_path / "t.jsonl", batch_size=4, epochs=1)
        train, source = finetune.finetune, finetune.RowSource
    seen: list = []
    original = source.__call__

    def recorded(self, step):
        batches = original(self, step)
        seen.append(joined(batches)[0])
        return batches

    monkeypatch.setattr(source, "__call__", recorded)
    train(make(out=tmp_path / "whole"), ignore, ignore)
    whole, seen[:] = list(seen), []
    assert len(whole) == 12
    for last in (3, 8):
        stop = Stop()

        def show(now, stop=stop, last=last):
            if now.step == last:
                stop.signum = 15

        with pytest.raises(Interrupted):
            train(make(out=tmp_path / "run", resume=True), show, ignore, stop)
    train(make(out=tmp_path / "run", resume=True), ignore, ignore)
    assert seen == whole
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "run")]
    assert files[0] == files[1]
