"""Full disks: a command ends with code 2, and one line names the file and what is left."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpt_fast.data import tables
from tests.command_line import ENVIRONMENT, succeed

FULL = 3_000  # bytes that a file may have
FULL_DEVICE = Path("/dev/full")


def refused(result, *words: str) -> None:
    assert result.code == 2, result.err
    assert "Traceback" not in result.err
    line = result.err.strip().splitlines()[-1]
    for part in ("gpt-fast: ", *words):
        assert part in line, result.err


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("processes", [1, 2])
def test_prepare(cli, data, tmp_path, processes):
    """The error names the file and counts the parts that are done. The same command resumes where there is room."""
    command = [
        "prepare",
        "--data",
        data.text,
        "--tokenizer",
        "byte",
        "--processes",
        processes,
        "--out",
        tmp_path / "out",
    ]
    result = cli(*command, file_size=FULL)
    refused(
        result, f"{tmp_path}/out/.parts/", "not written (File too large)", "parts are done", "the same command resumes"
    )
    assert not list(tmp_path.rglob("*.partial"))
    succeed(cli(*command))


def test_prepare_joining(cli, data, tmp_path):
    """The parts fit, but the joined file does not."""
    texts = [tmp_path / f"{i}.txt" for i in range(4)]
    for path in texts:
        path.write_text("the fox runs\n" * 150)
    command = ["prepare", "--tokenizer", "byte", "--out", tmp_path / "out", "--data", *texts, "--valid", data.text]
    (tmp_path / "valid.txt").write_text("the fox runs\n" * 20)
    command[-1] = tmp_path / "valid.txt"
    result = cli(*command, file_size=12_000)
    refused(result, f"{tmp_path}/out/train.bin: not written (File too large)", "5 of 5 parts are done")
    succeed(cli(*command))


def test_a_pipe(cli, tmp_path):
    pipe = tmp_path / "pipe.txt"
    os.mkfifo(pipe)
    writer = subprocess.Popen([sys.executable, "-c", f"open({str(pipe)!r}, 'w').write('words ' * 1000)"], stderr=-3)
    result = cli("prepare", "--data", pipe, "--tokenizer", "byte", "--out", tmp_path / "out", file_size=FULL)
    writer.wait()
    refused(result, f"not written (File too large); nothing of {pipe} is left; TMPDIR names another folder")
    assert names(tmp_path) == ["pipe.txt"]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_predict(cli, data, tmp_path, suffix):
    """A table that was there before stays."""
    out = tmp_path / f"answered.{suffix}"
    command = ["predict", "--from", data.classifier, "--data", data.table, "--out", out]
    refused(cli(*command, file_size=500), f"{out}: not written (File too large); nothing of it is left")
    out.write_text("before")
    result = cli(*command, "--overwrite", file_size=500)
    refused(result, f"{out}: not written (File too large); the file before is as it was")
    assert (names(tmp_path), out.read_text()) == ([out.name], "before")


@pytest.mark.parametrize("size", [300, 20_000])
def test_convert(cli, data, tmp_path, size):
    """The configuration does not fit, or the weights do not."""
    out = tmp_path / "new" / "out"
    result = cli("convert", "--from", data.lm, "--out", out, file_size=size)
    refused(result, f"{out}: not written (File too large); nothing of it is left")
    assert names(tmp_path) == []


def test_convert_back(cli, data, tmp_path):
    succeed(cli("convert", "--from", data.lm, "--to", "transformers", "--out", tmp_path / "theirs"))
    result = cli("convert", "--from", tmp_path / "theirs", "--out", tmp_path / "ours", file_size=20_000)
    refused(result, f"{tmp_path}/ours", "File too large")
    assert not (tmp_path / "ours").exists()


def test_pictures(cli, data, tmp_path):
    """`plot` fails without its picture, while `evaluate` warns and prints all figures."""
    png = tmp_path / "a.png"
    result = cli("plot", data.lm, "--metric", "train_loss", "--out", png, file_size=FULL)
    refused(result, f"{png}: not written (File too large); nothing of it is left")
    command = ["evaluate", "--from", data.classifier, "--data", data.table, "--confusion", png, "--json"]
    result = succeed(cli(*command, file_size=FULL))
    assert f"{png}: not written" in result.err
    assert json.loads(result.out)["examples"] == 60
    assert names(tmp_path) == []


def test_tensorboard(cli, data, tmp_path):
    """A run that cannot write TensorBoard's files warns once and ends as usual."""
    text = tmp_path / "text.txt"
    text.write_text("the fox runs\n" * 50)
    tiny = [
        "--layers",
        1,
        "--heads",
        1,
        "--dim",
        4,
        "--seq-len",
        8,
        "--batch-size",
        2,
        "--device",
        "cpu",
        "--steps",
        150,
    ]
    command = ["pretrain", "--data", text, *tiny, "--tokenizer", "char", "--tensorboard", "--log-every", 1]
    result = succeed(cli(*command, "--out", tmp_path / "run", file_size=45_000))
    assert result.err.count("tensorboard: not written") == 1
    assert "run.json" in names(tmp_path / "run")


@pytest.mark.skipif(not FULL_DEVICE.exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize(
    "command", ["evaluate --json", "compare", "predict", "predict --json", "generate", "doctor", "plot"]
)
def test_standard_output(data, tmp_path, command):
    name, *flags = command.split()
    given = {
        "evaluate": ["--from", data.classifier, "--data", data.table],
        "compare": ["--from", data.lm, "--batch-size", 2, "--repeats", 1],
        "predict": ["--from", data.classifier, "--data", data.table],
        "generate": ["--from", data.lm, "--prompt", "the", "--max-new-tokens", 3],
        "doctor": [],
        "plot": [data.lm, "--metric", "train_loss", "--out", tmp_path / "a.png"],
    }[name]
    line = [sys.executable, "-m", "gpt_fast", name, *map(str, given), *flags]
    with FULL_DEVICE.open("w") as full:
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("gpt-fast: standard output: not written whole (No space left on device)"), done.stderr
    assert "Exception" not in done.stderr


def test_numbers_that_are_not_finite_are_null(tmp_path):
    """This holds for the answers of `predict` and for the columns that the table had before."""
    rows = [{"score": math.nan, "list": [math.inf, 1.5]}, {"prediction": -math.inf, "probability": math.nan}]
    tables.write_rows(tmp_path / "t.jsonl", rows)
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert lines == [{"score": None, "list": [None, 1.5]}, {"prediction": None, "probability": None}]


def test_a_diverged_classifier_predicts_null(cli, data, tmp_path):
    """With weights of NaN, stdout and the table are valid JSON."""
    import torch

    from gpt_fast import GPTForSequenceClassification

    run = tmp_path / "run"
    subprocess.run(["cp", "-r", str(data.classifier), str(run)], check=True)
    model = GPTForSequenceClassification.from_pretrained(run)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    model.save_pretrained(run)
    record = json.loads((run / "run.json").read_text())
    record.pop("weights", None)
    (run / "run.json").write_text(json.dumps(record))
    command = ["predict", "--from", run, "--data", data.table]
    told = json.loads(succeed(cli(*command, "--json")).out, parse_constant=pytest.fail)
    assert told["predictions"][0]["probability"] is None
    assert set(told["predictions"][0]["probabilities"].values()) == {None}
    succeed(cli(*command, "--out", tmp_path / "a.jsonl"))
    first = json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0], parse_constant=pytest.fail)
    assert first["probability"] is None
