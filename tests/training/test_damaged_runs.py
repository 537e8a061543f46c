"""A stopped run with a damaged or hostile file is refused in one line, or resumed to the same result."""

from pathlib import Path

import pytest

from tests.command_line import SMALL, Cli, Data
from tests.damage import Case, check


def resuming(run: Path, data: Data) -> list:
    return ["pretrain", "--out", run, "--resume", "--data", data.text, "--tokenizer", "byte", *SMALL]


CASES = {
    "settings": Case("stopped", "settings.yaml", resuming),
    "manifest": Case("stopped", "checkpoints/step-000000003/checkpoint.json", resuming),
    "shard": Case("stopped", "checkpoints/step-000000003/shard-00001-model-00001-of-00001.safetensors", resuming),
    "newest": Case("stopped", "checkpoints/latest", resuming),
}  # fmt: skip


@pytest.fixture(scope="module")
def stopped(cli: Cli, data: Data, tmp_path_factory) -> Path:
    """Return a run that was killed after three of four updates."""
    run = tmp_path_factory.mktemp("runs") / "stopped"
    begun = [*resuming(run, data), "--steps", 4, "--checkpoint-every", 1]
    assert cli(*begun, watched=(run / "checkpoints" / "step-000000003", 0)).code == -9
    (run / "checkpoints" / "latest").write_text("step-000000003\n")  # the kill may come before this is written
    return run


@pytest.mark.parametrize("name", CASES)
def test_damaged(cli: Cli, data: Data, stopped: Path, tmp_path: Path, name: str):
    check(cli, data, stopped, tmp_path, name, CASES[name])
