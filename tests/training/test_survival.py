"""Trainings that are killed, stopped, damaged and starved, as users meet them: through `gpt-fast`."""

import json
import random
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.command_line import SMALL, succeed

STEPS, EVERY = 24, 5


@pytest.fixture(scope="module")
def command(data) -> list[object]:
    return [
        "pretrain", "--data", data.text, "--tokenizer", "byte", *SMALL, "--dropout", 0.2, "--steps", STEPS,
        "--checkpoint-every", EVERY, "--log-every", 1,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(cli, command, tmp_path_factory) -> Path:
    """The run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    succeed(cli(*command, "--out", out))
    return out


def same(run: Path, whole: Path) -> None:
    """The same weights bit for bit, and the same curve."""
    weights, wanted = (load_file(folder / "model.safetensors") for folder in (run, whole))
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    for name in ("config.json", "tokenizer.json", "settings.yaml"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    curves = [
        [(line["step"], line["train_loss"], line.get("valid_loss")) for line in map(json.loads, file)]
        for file in ((folder / "metrics.jsonl").read_text().splitlines() for folder in (run, whole))
    ]
    assert curves[0] == curves[1]


def test_killed_between_and_inside_checkpoints(cli, command, whole, tmp_path):
    """SIGKILL after 8 updates, then in the middle of writing the checkpoint of update 15, then after 19."""
    out = tmp_path / "run"
    for watched in (
        (out / "metrics.jsonl", 8),
        (out / "checkpoints" / ".step-000000015.partial", 0),
        (out / "metrics.jsonl", 19),
    ):
        assert cli(*command, "--out", out, "--resume", watched=watched).code == -signal.SIGKILL
        assert not (out / "run.json").exists()
    succeed(cli(*command, "--out", out, "--resume"))
    same(out, whole)


@pytest.mark.slow
def test_ten_random_kills(cli, command, whole, tmp_path):
    """Each at a random line of progress and a random moment after it, or in the middle of a checkpoint's write."""
    draw = random.Random(0)
    out = tmp_path / "run"
    inside = 0
    for kill in range(10):
        if kill % 3 == 2:
            watched = (out / "checkpoints" / ".step-*.partial*", 0)
        else:
            watched = (out / "metrics.jsonl", draw.randrange(1, STEPS - 1))
        result = cli(*command, "--out", out, "--resume", watched=watched, later=draw.random() * 0.02)
        assert result.code in (-signal.SIGKILL, 0), result.err
        inside += any(out.glob("checkpoints/.*"))
    succeed(cli(*command, "--out", out, "--resume"))
    same(out, whole)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_end(cli, command, whole, tmp_path, signum):
    """Between two checkpoints: one more is written at that very update."""
    out = tmp_path / "run"
    stopped = cli(*command, "--out", out, watched=(out / "metrics.jsonl", 7), signal=signum)
    assert stopped.code == 128 + signum
    assert "Traceback" not in stopped.err
    assert "go on with --resume" in stopped.err.splitlines()[-1]
    step = int((out / "checkpoints" / "latest").read_text().split("-")[1])
    assert step >= 7
    assert f"stopped after update {step}" in stopped.err
    assert f"going on after update {step} of {STEPS}" in succeed(cli(*command, "--out", out, "--resume")).err
    same(out, whole)


def test_resume_without_a_checkpoint_starts_and_of_a_finished_run_does_nothing(cli, command, whole, tmp_path):
    out = tmp_path / "run"
    succeed(cli(*command, "--out", out, "--resume"))
    same(out, whole)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert "finished" in succeed(cli(*command, "--out", out, "--resume")).err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.fixture
def stopped(cli, command, tmp_path) -> Path:
    """A run killed after its second checkpoint."""
    out = tmp_path / "run"
    assert cli(*command, "--out", out, watched=(out / "metrics.jsonl", 12)).code == -signal.SIGKILL
    return out


def shards(out: Path) -> list[Path]:
    return sorted(out.glob("checkpoints/step-*/*.safetensors"))


def test_a_damaged_checkpoint_is_passed_over(cli, command, whole, stopped):
    newest = shards(stopped)[-1]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    resumed = succeed(cli(*command, "--out", stopped, "--resume"))
    assert f"{newest.name}: damaged" in resumed.err
    assert "going on after update 5 of" in resumed.err
    same(stopped, whole)


def test_no_checkpoint_that_is_whole(cli, command, stopped):
    for shard in shards(stopped):
        shard.write_bytes(shard.read_bytes()[:-50])
    result = cli(*command, "--out", stopped, "--resume")
    assert result.code == 2
    assert "no checkpoint is whole" in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--lr", 1.0], "--lr 1.0: the run in"),
        (["--steps", 50], "--steps 50: the run in"),
        (["--objective", "mlm"], "--objective mlm: the run in"),
    ],
)
def test_resume_with_other_settings(cli, command, stopped, changed, message):
    result = cli(*command, *changed, "--out", stopped, "--resume")
    assert result.code == 2
    assert message in result.err


def test_what_is_not_given_again_is_as_it_was(cli, command, whole, tmp_path):
    """A rate that only the first command names is the rate that the second goes on with."""
    out, other = tmp_path / "run", tmp_path / "other"
    given = ["--lr", 5e-3, "--beta2", 0.9, "--warmup", 3]
    succeed(cli(*command, *given, "--out", other))
    assert cli(*command, *given, "--out", out, watched=(out / "metrics.jsonl", 12)).code == -signal.SIGKILL
    succeed(cli(*command, "--out", out, "--resume"))
    same(out, other)
    assert not torch.equal(*(load_file(run / "model.safetensors")["trunk.token_emb.weight"] for run in (out, whole)))


def test_resume_with_other_data(cli, command, data, stopped, tmp_path):
    """The same name, another text."""
    settings = stopped / "settings.yaml"
    other = tmp_path / "other.txt"
    other.write_text(data.text.read_text().replace("red", "sad"))
    settings.write_text(settings.read_text().replace(str(data.text), str(other)))
    result = cli(*command[:2], other, *command[3:], "--out", stopped, "--resume")
    assert result.code == 2
    assert "began on other data" in result.err


def test_a_full_disk(cli, command, tmp_path):
    """No file can grow beyond 40 kB, a checkpoint's would: an error that says so, and nothing left."""
    result = cli(*command, "--out", tmp_path / "run", file_size=40_000)
    assert result.code == 2
    assert "checkpoint cannot be written" in result.err
    assert "Traceback" not in result.err
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_later(cli, command, whole, stopped):
    """What was saved before stays, and the run goes on from it where there is room."""
    before = sorted(stopped.glob("checkpoints/*"))
    result = cli(*command, "--out", stopped, "--resume", file_size=40_000)
    assert result.code == 2
    assert "checkpoint cannot be written" in result.err
    assert sorted(stopped.glob("checkpoints/*")) == before
    succeed(cli(*command, "--out", stopped, "--resume"))
    same(stopped, whole)


def test_fine_tuning_killed_and_resumed(cli, data, tmp_path):
    """The best weights so far survive, too."""
    command = [
        "finetune", "--from", data.lm, "--train", data.table, "--epochs", 6, "--batch-size", 8, "--checkpoint-every", 7,
        "--log-every", 1,
    ]  # fmt: skip
    whole, out = tmp_path / "whole", tmp_path / "run"
    succeed(cli(*command, "--out", whole))
    for lines in (9, 30):
        killed = cli(*command, "--out", out, "--resume", watched=(out / "metrics.jsonl", lines))
        assert killed.code == -signal.SIGKILL
    succeed(cli(*command, "--out", out, "--resume"))
    same(out, whole)
    records = [json.loads((folder / "run.json").read_text()) for folder in (out, whole)]
    for record in records:
        record.pop("seconds")
    assert records[0] == records[1]
