"""Commands refuse a damaged or hostile file in one line, or give the result of the intact file."""

import json
from pathlib import Path

import pytest

from tests.command_line import Cli, Data, succeed
from tests.damage import Case, check


def generating(run: Path, data: Data) -> list:
    return ["generate", "--from", run, "--prompt", "the red", "--max-new-tokens", 4, "--temperature", 0]


def converting(run: Path, data: Data) -> list:
    return ["convert", "--from", run, "--out", run.parent / "new"]


CASES = {
    "configuration": Case("lm", "config.json", generating),
    "record": Case("lm", "run.json", generating),
    "tokenizer": Case("lm", "tokenizer.json", generating),
    "weights": Case("lm", "model.safetensors", generating),
    "classifier": Case("classifier", "run.json", lambda run, data: ["predict", "--from", run, "--text", "the red fox"]),
    "metrics": Case("lm", "metrics.jsonl", lambda run, data: ["plot", run, "--out", run.parent / "picture.png"]),
    "given settings": Case(
        "lm",
        "settings.yaml",
        lambda run, data: [
            "pretrain", "--config", run / "settings.yaml", "--data", data.text, "--out", run.parent / "new",
            "--steps", 2,
        ],
    ),
    "tokens": Case(
        "tokens", "valid.bin", lambda run, data: ["evaluate", "--from", data.lm, "--data", run / "valid.bin"]
    ),
    "transformers configuration": Case("theirs", "config.json", converting),
    "transformers weights": Case("theirs", "model.safetensors", converting),
    "checkpoint of nanoGPT": Case(
        "nanogpt", "ckpt.pt", lambda run, data: ["convert", "--from", run / "ckpt.pt", "--out", run.parent / "new"]
    ),
    "prepared": Case(
        "tokens",
        "data.json",
        lambda run, data: ["prepare", "--data", data.text, "--out", run, "--tokenizer", "byte", "--processes", 1],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(cli: Cli, data: Data, tmp_path_factory) -> dict[str, Path]:
    """Return the folders whose files are damaged: runs, token files, models of other libraries."""
    folder = tmp_path_factory.mktemp("runs")
    command = ["prepare", "--data", data.text, "--tokenizer", "byte", "--processes", 1]
    succeed(cli(*command, "--out", folder / "tokens"))
    plain = ["--layers", 1, "--heads", 2, "--dim", 16, "--seq-len", 32, "--steps", 1]
    succeed(cli("pretrain", "--data", data.text, "--tokenizer", "byte", "--out", folder / "plain", *plain))
    succeed(cli("convert", "--from", folder / "plain", "--out", folder / "theirs"))
    config = json.loads((folder / "plain" / "config.json").read_text())
    (folder / "plain" / "config.json").write_text(json.dumps(config | {"activation": "gelu"}))  # nanoGPT's activation
    (folder / "nanogpt").mkdir()
    succeed(cli("convert", "--from", folder / "plain", "--to", "nanogpt", "--out", folder / "nanogpt" / "ckpt.pt"))
    return {"lm": data.lm, "classifier": data.classifier} | {
        name: folder / name for name in ("tokens", "theirs", "nanogpt")
    }


@pytest.mark.parametrize("name", CASES)
def test_damaged(cli: Cli, data: Data, runs: dict[str, Path], tmp_path: Path, name: str):
    check(cli, data, runs[CASES[name].run], tmp_path, name, CASES[name])
