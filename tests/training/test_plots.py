"""Pictures of runs: any text in them is shown as it is, and a picture that fails costs nothing but the picture."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.utils.tensorboard
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.mathtext import MathTextParser
from safetensors.torch import load_file

from gpt_fast.training import evaluate, finetune, plots, pretrain
from gpt_fast.training.runs.folder import read_record, write_extra
from tests.command_line import SENTENCES, succeed

pytestmark = pytest.mark.usefixtures("one_thread")

ODD = {
    "mathematics_that_does_not_parse": "$x^{$",
    "mathematics": r"$\frac{1}{2}$",
    "two_dollars": "$$",
    "escaped_dollar": r"\$5",
    "underscore": "_",
    "hidden_from_legends": "_run",
    "empty": "",
    "spaces": "  ",
    "lines": "one\n\ntwo\r\n",
    "tab": "a\tb",
    "control": "bell\x07 null\x00",
    "right_to_left": "مرحبا",
    "no_glyphs": "日本語 한국어 हिन्दी 😀",
    "half_a_surrogate_pair": "\ud800",
    "one_long_word": "x" * 5000,
    "many_words": "word " * 5000,
    "braces_and_percent": "{0} %s %",
}
CURVE = [{"step": step, "train_loss": 2.0 / step, "valid_loss": 3.0 / step, "valid_accuracy": 0.5} for step in (1, 2)]


def ignore(*_: object) -> None:
    """Stand in for a display."""


def fail(*_: object, **__: object) -> None:
    raise RuntimeError("no ink\nleft")


PICTURES: dict[str, Callable[[list[str], Path], None]] = {
    "language_model": lambda texts, path: plots.plot_language_model(CURVE, 3.0, texts[0], path),
    "task": lambda texts, path: plots.plot_task(CURVE, "valid_accuracy", 0.3, "accuracy", texts[0], path),
    "confusion": lambda texts, path: plots.plot_confusion([[1] * len(texts)] * len(texts), texts, texts[0], path),
    "runs": lambda texts, path: plots.plot_runs([(text, CURVE) for text in texts], "valid_loss", path),
}
CASES = [pytest.param("language_model", [text], id=name) for name, text in ODD.items()]
CASES += [pytest.param(name, [*ODD.values()], id=name) for name in PICTURES if name != "language_model"]


@pytest.mark.parametrize(("picture", "texts"), CASES)
def test_any_text_can_be_drawn(picture, texts, tmp_path, monkeypatch) -> None:
    """No text is read as mathematics, and no warning is given: a box stands for a letter that the font lacks.

    One picture has each text as its title, the others have all texts as labels.
    """
    monkeypatch.setattr(MathTextParser, "parse", fail)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PICTURES[picture](texts, tmp_path / "made" / "a.png")
    assert (tmp_path / "made" / "a.png").read_bytes().startswith(b"\x89PNG")


def test_legend_names_every_run(tmp_path, monkeypatch) -> None:
    """Matplotlib leaves labels that begin with an underscore out of a legend."""
    drawn = []
    monkeypatch.setattr(FigureCanvasAgg, "print_png", lambda canvas, file: drawn.append(canvas.figure))
    plots.plot_runs([(name, CURVE) for name in ("_a", "$b$", "c")], "valid_loss", tmp_path / "a.png")
    texts = [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()]
    assert texts == ["_a, last 1.50", "$b$, last 1.50", "c, last 1.50"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("abc", "abc"), ("a  b\nc", "a b c"), ("abcdefghijkl", "abcd…hijkl"), ("a\x00b", "a\ufffdb"), ("", "")],
)
def test_shown(text, expected) -> None:
    """Both ends of a long text stay, for runs that differ in the last part of their path."""
    assert plots.shown(text, 10) == expected


def test_a_picture_that_fails_leaves_no_part_of_it(tmp_path, monkeypatch) -> None:
    """The file that was there before stays as it was."""
    (tmp_path / "a.png").write_bytes(b"before")
    monkeypatch.setattr(FigureCanvasAgg, "print_png", lambda canvas, file: (file.write(b"half"), fail()))
    with pytest.raises(RuntimeError, match="no ink"):
        PICTURES["runs"](["run"], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == b"before"


def test_a_failure_is_told_with_its_file_and_its_reason(tmp_path) -> None:
    path = tmp_path / "loss.png"
    assert write_extra(path, ignore)
    with pytest.warns(UserWarning, match="not written") as told:
        assert not write_extra(path, fail)
    assert [str(warning.message) for warning in told] == [f"{path}: not written (RuntimeError: no ink left)"]
    with pytest.raises(KeyboardInterrupt):
        write_extra(path, lambda path: (_ for _ in ()).throw(KeyboardInterrupt))


# --- trainings whose pictures fail ---

LABELS = ["$x^{$", "$$", "_", "\u00a4", "\ufffd", "x" * 300]
TRAININGS = ("pretrain", "finetune")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Return a folder with a text, a table with odd labels, and a model to fine-tune."""
    folder = tmp_path_factory.mktemp("plots")
    (folder / "text.txt").write_text(SENTENCES)
    rows = [{"text": line, "label": LABELS[i % len(LABELS)]} for i, line in enumerate(SENTENCES.splitlines()[:60])]
    (folder / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("pretrain", folder, folder / "lm")
    return folder


def run(command: str, files: Path, out: Path, **options) -> dict:
    """Train on `files` for a few updates, into `out`."""
    if command == "pretrain":
        sizes = {"layers": 1, "heads": 2, "dim": 16, "seq_len": 32, "batch_size": 4, "steps": 2}
        settings = pretrain.PretrainSettings(out=out, data=(files / "text.txt",), tokenizer="byte", **sizes, **options)
        return pretrain.pretrain(settings, ignore, ignore)
    settings = finetune.FinetuneSettings(source=files / "lm", out=out, train=files / "table.jsonl", epochs=1, **options)
    return finetune.finetune(settings, ignore, ignore)


def check_whole(out: Path, record: dict) -> None:
    """Assert that `out` has the weights and the record of a finished run."""
    assert read_record(out) == json.loads(json.dumps(record))
    assert set(evaluate.load_run(out, "cpu").state_dict()) >= set(load_file(out / "model.safetensors"))
    assert not (out / "best").exists()


@pytest.mark.parametrize("name", ["table", "$t^{$"])
def test_fine_tuning_with_odd_labels(cli, files, tmp_path, name) -> None:
    """The commands print odd labels and draw them. The table's name is in the titles of the pictures."""
    table, out = tmp_path / f"{name}.jsonl", tmp_path / "run"
    table.write_bytes((files / "table.jsonl").read_bytes())
    command = ["finetune", "--from", files / "lm", "--train", table, "--epochs", 1, "--out", out, "--json"]
    result = succeed(cli(*command))
    assert "not written" not in result.err
    assert json.loads(result.out)["labels"] == read_record(out)["labels"] == sorted(LABELS)
    for picture in ("loss.png", "confusion.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    result = succeed(cli("evaluate", "--from", out, "--data", table, "--confusion", tmp_path / "$c^{$.png"))
    assert (tmp_path / "$c^{$.png").exists() and "$c^{$.png" in result.err
    succeed(cli("predict", "--from", out, "--text", "the red fox"))
    succeed(cli("predict", "--from", out, "--data", table, "--out", tmp_path / "answered.jsonl"))
    answers = [json.loads(line) for line in (tmp_path / "answered.jsonl").read_text().splitlines()]
    assert [answer["label"] for answer in answers[: len(LABELS)]] == LABELS
    succeed(cli("plot", out, "--metric", "train_loss", "--out", tmp_path / "curves.png"))


@pytest.mark.parametrize("command", TRAININGS)
def test_a_training_whose_pictures_fail_is_whole(files, tmp_path, monkeypatch, command) -> None:
    out = tmp_path / "run"
    monkeypatch.setattr(FigureCanvasAgg, "print_png", fail)
    with pytest.warns(UserWarning, match="not written") as told:
        record = run(command, files, out)
    pictures = ["loss.png"] if command == "pretrain" else ["loss.png", "confusion.png"]
    told = [str(warning.message) for warning in told if "not written" in str(warning.message)]
    assert told == [f"{out / picture}: not written (RuntimeError: no ink left)" for picture in pictures]
    check_whole(out, record)


@pytest.mark.parametrize("command", TRAININGS)
def test_a_training_that_is_stopped_while_it_draws_is_whole(files, tmp_path, monkeypatch, command) -> None:
    """Weights and record come before pictures."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FigureCanvasAgg, "print_png", stop)
    with pytest.raises(KeyboardInterrupt):
        run(command, files, tmp_path / "run")
    check_whole(tmp_path / "run", read_record(tmp_path / "run"))


@pytest.mark.parametrize("command", TRAININGS)
@pytest.mark.parametrize("method", ["__init__", "add_scalar", "close"])
def test_a_training_whose_tensorboard_fails_is_whole(files, tmp_path, monkeypatch, command, method) -> None:
    out = tmp_path / "run"
    monkeypatch.setattr(torch.utils.tensorboard.SummaryWriter, method, fail)
    with pytest.warns(UserWarning, match="not written") as told:
        record = run(command, files, out, tensorboard=True, log_every=1)
    told = [str(warning.message) for warning in told if "not written" in str(warning.message)]
    assert told == [f"{out / 'tensorboard'}: not written (RuntimeError: no ink left)"]  # once, not for every line
    check_whole(out, record)
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2


def test_an_evaluation_whose_picture_fails_has_its_figures(files, data, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(FigureCanvasAgg, "print_png", fail)
    path = tmp_path / "c.png"
    with pytest.warns(UserWarning, match="not written"):
        result = evaluate.evaluate(data.classifier, data.table, None, None, "cpu", confusion=path)
    assert 0 <= result["accuracy"] <= 1 and "confusion" not in result


def test_commands_whose_pictures_cannot_be_written_succeed(cli, data, tmp_path) -> None:
    """The picture's path is a folder. Only `plot` fails, because it makes nothing else."""
    path = tmp_path / "c.png"
    path.mkdir()
    result = succeed(cli("evaluate", "--from", data.classifier, "--data", data.table, "--confusion", path, "--json"))
    assert json.loads(result.out)["accuracy"] >= 0
    assert f"{path}: not written (IsADirectoryError" in result.err
    result = cli("plot", data.lm, "--metric", "train_loss", "--out", path)
    assert result.code == 2 and str(path) in result.err and "Traceback" not in result.err
