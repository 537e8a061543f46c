"""Options do what their help says.

Wrong options are reported before any data is read. Defaults fit the model. Bars keep their count and the time left.
"""

import io

import pytest
from rich.console import Console

from gpt_fast.training.loop import Progress
from gpt_fast_cli import terminal
from tests.command_line import succeed

pytestmark = pytest.mark.usefixtures("one_thread")

BEFORE_DATA = [
    ("--steps 0", "--steps 0: expected at least 1"),
    (
        "--batch-size 6 --accumulate 4",
        "--batch-size 6: cannot be divided evenly among 4 parts; expected a multiple of 4",
    ),
    (
        "--accumulate 1000000000",
        "--batch-size 16: cannot be divided evenly among 1000000000 parts; expected a multiple",
    ),
    ("--seq-len 1", "--seq-len 1: expected at least 2"),
    ("--seq-len 30 --window-warmup 0.5", "--window-warmup 0.5: windows have 30 positions; expected a multiple of 4"),
    ("--dim 1000000000", "--dim 1000000000: expected at most 268,435,456"),
    ("--seed 9223372036854775808", "--seed 9223372036854775808: expected less than 9,223,372,036,854,775,808"),
    ("--preset=", "--preset '': expected one of notes, gpt1, gpt2, gpt2-medium, gpt2-large, gpt2-xl"),
    ("--preset gtp2", "gpt2-large, gpt2-xl; did you mean 'gpt2'?"),
    ("--tokenizer=", "--tokenizer '': no such file; expected bpe, byte, char or the path of a tokenizer.json"),
    ("--tokenizer bytes", "--tokenizer 'bytes': no such file; expected bpe, byte, char or the path"),
    ("--tokenizer bytes", "; did you mean 'byte'?"),
    ("--dim 30", "--dim 30: 30 dimensions are not divisible by 4 heads; expected a multiple of the heads"),
    ("--heads 5", "--heads 5: 128 dimensions are not divisible by 5 heads"),
    ("--warmup 1000000000", "--warmup 1000000000: --steps is 1000; expected at most as many"),
    ("--objectiv mlm", "--objectiv: no such option; did you mean '--objective'?"),
]


@pytest.mark.parametrize(("options", "message"), BEFORE_DATA)
def test_pretrain_tells_before_it_reads_data(cli, tmp_path, options, message):
    result = cli("pretrain", "--out", tmp_path / "run", "--data", tmp_path / "none", *options.split())
    assert result.code == 2
    assert message in result.err and "none" not in result.err and len(result.err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--epochs 0", "--epochs 0: expected at least 1"),
        ("--task clasification", "--task 'clasification': expected one of classification, entailment"),
        ("--task clasification", "; did you mean 'classification'?"),
        ("--task=", "--task '': expected one of classification, entailment"),
        ("--metric acuracy", "acuracy: classification does not measure it; expected accuracy or macro_f1"),
        ("--metric acuracy", "; did you mean 'accuracy'?"),
        ("--text-column=", "--text-column '': expected the name of a column"),
        ("--task multiple-choice --pair-column a,,b", "--pair-column 'a,,b': expected the name of a column"),
        ("--lora-rank 1000000000", "dimensions; expected at most as many"),
    ],
)
def test_finetune_tells_before_it_reads_data(cli, data, tmp_path, options, message):
    result = cli("finetune", "--from", data.lm, "--data", tmp_path / "none", "--out", tmp_path / "r", *options.split())
    assert result.code == 2
    assert message in result.err and "none" not in result.err and len(result.err.splitlines()) == 1
    assert not (tmp_path / "r").exists()


def test_a_default_that_was_not_given_is_not_compared(cli, data, tmp_path):
    """A run with other values than the defaults resumes without options. A given option must equal the run's."""
    begin = ["finetune", "--from", data.lm, "--out", tmp_path / "run", "--data", data.table]
    given = ["--batch-size", 8, "--lr", 1e-3, "--patience", 9, "--layer-decay", 0.5, "--metric", "macro_f1"]
    succeed(cli(*begin, *given, "--epochs", 1))
    assert "resuming after update" in succeed(cli(*begin, "--epochs", 2, "--resume")).err
    refused = cli(*begin, "--epochs", 3, "--resume", "--layer-decay", 1.0)
    assert refused.code == 2 and "--layer-decay 1.0: the run in" in refused.err and "began with 0.5" in refused.err


# --- generate ---


def test_a_run_folder_needs_no_option(cli, data):
    rest = ["--prompt", "the red", "--temperature", 0, "--max-new-tokens", 5]
    one, other = succeed(cli("generate", data.lm, *rest)), succeed(cli("generate", "--from", data.lm, *rest))
    assert one.out == other.out and one.out.startswith("the red")
    for wrong in (["generate"], ["generate", data.lm, "--from", data.lm]):
        result = cli(*wrong)
        assert result.code == 2 and "; expected one, as gpt-fast generate RUN or by --from RUN" in result.err


def test_the_prompt_is_read_from_a_pipe(cli, data):
    rest = ["--temperature", 0, "--max-new-tokens", 5]
    piped = succeed(cli("generate", data.lm, *rest, stdin="the red\n"))
    assert piped.out == succeed(cli("generate", data.lm, *rest, "--prompt", "the red")).out
    assert piped.out == succeed(cli("generate", data.lm, *rest, "--prompt", "the red", stdin="not this")).out
    wrong = cli("generate", data.lm, stdin="\udcff")
    assert wrong.code == 2 and "standard input: not UTF-8 from byte 0 on; expected text" in wrong.err


def test_the_default_length_fits_the_model(cli, data):
    """The model has 32 positions, so it generates fewer than the usual 100 tokens."""
    import json

    prompt = "the red fox runs"
    result = succeed(cli("generate", data.lm, "--prompt", prompt, "--seed", 1, "--json"))
    assert 1 <= json.loads(result.out)["new_tokens"] <= 32 - len(prompt)
    asked = cli("generate", data.lm, "--prompt", prompt, "--max-new-tokens", 100)
    assert asked.code == 2 and "has 32 positions; expected at most 16, or --sliding" in asked.err
    full = cli("generate", data.lm, "--prompt", "x" * 32)
    assert (
        full.code == 2
        and "--prompt: has 32 tokens, and" in full.err
        and "expected fewer tokens, or --sliding" in full.err
    )
    slid = succeed(cli("generate", data.lm, "--prompt", "x" * 40, "--sliding", "--seed", 1, "--json"))
    assert json.loads(slid.out)["new_tokens"] >= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--num-samples 0", "--num-samples 0: expected 1 or more"),
        ("--num-samples 1000000000", "--num-samples 1000000000: needs "),
        ("--max-new-tokens -1", "--max-new-tokens -1: expected 0 or more"),
        ("--max-new-tokens 1000000000", "--max-new-tokens 1000000000: the prompt has 1 tokens, and "),
        ("--max-new-tokens 1000000000000 --sliding", "--max-new-tokens 1000000000000: needs "),
        ("--temperature -1", "--temperature -1.0: expected 0 (greedy) or more"),
        ("--top-k 0", "--top-k 0: expected an integer of 1 or more"),
        ("--top-p 2", "--top-p 2.0: expected more than 0 and at most 1"),
        ("--seed 99999999999999999999", "--seed 99999999999999999999: expected an integer from -2^63"),
        ("--weights int9", "--weights 'int9': expected one of float32, bfloat16, int8, int8-a16; did you mean 'int8'?"),
    ],
)
def test_what_generate_refuses(cli, data, options, message):
    result = cli("generate", data.lm, "--prompt", "a", *options.split())
    assert result.code == 2 and message in result.err


# --- bars ---


def bar_at(monkeypatch, width: int, **options) -> str:
    """Return what the bars write on a terminal of `width` columns."""
    written = io.StringIO()
    console = Console(file=written, width=width, **options)
    monkeypatch.setattr(terminal, "err", console)
    with terminal.training_bar("pre-training") as show:
        for step in (1, 999):
            show(Progress(step, 1000, 12.345, 123456.0, None, 0.5))
    with terminal.counting_bar("preparing text") as count:
        count(999, 1000)
    return written.getvalue()


def test_a_narrow_bar_keeps_its_count_and_the_time_left(monkeypatch):
    for width in (40, 200):
        lines = bar_at(monkeypatch, width, force_terminal=True, no_color=True, legacy_windows=False).split("\n")
        last = [line for line in lines if "pre-training" in line][-1]
        assert "999/1000" in last and "left" in last and ":" in last.split("999/1000")[1]
        assert ("tokens/s" in last) == (width == 200)
        assert any("preparing text" in line and "999/1000" in line for line in lines)


def test_no_bar_without_a_terminal(monkeypatch):
    assert bar_at(monkeypatch, 80, force_terminal=False) == ""
    monkeypatch.setenv("TERM", "dumb")
    assert bar_at(monkeypatch, 80, force_terminal=True) == ""


def test_no_colour_where_it_is_not_wanted(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    written = io.StringIO()
    monkeypatch.setattr(terminal, "err", Console(file=written, stderr=True, force_terminal=True))
    terminal.print_error("wrong")
    assert written.getvalue() == "gpt-fast: wrong\n"


# --- errors name their file ---


def test_a_text_that_is_too_short_is_named(cli, data, tmp_path):
    """The message names the file, and the part of it that is too short."""
    short = tmp_path / "short.txt"
    short.write_text("a fox\nand a crow\nruns\n" * 2)
    sizes = ["--tokenizer", "byte", "--layers", 1, "--heads", 2, "--dim", 16, "--seq-len", 30, "--steps", 2]
    result = cli("pretrain", "--data", short, *sizes, "--out", tmp_path / "run")
    assert result.code == 2
    assert f"{short}, the part to validate on: has " in result.err
    assert "tokens, fewer than a window of 30; expected more text or fewer positions" in result.err
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    result = cli("evaluate", "--from", data.lm, "--data", empty)
    assert result.code == 2 and str(empty) in result.err


# --- every command ---


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("pretrain --out r --data=", "--data '': expected a path"),
        ("pretrain --out=", "--out '': expected a path"),
        ("pretrain --out r --text-column=", "--text-column '': expected the name of a column"),
        ("pretrain --out r --tokenizer bqe", "--tokenizer 'bqe': no such file; expected bpe, byte, char"),
        ("pretrain --out r --steps 99999999999999999999", "expected less than 9,223,372,036,854,775,808"),
        ("pretrain --out r --log-every 1.5", "--log-every '1.5': expected a whole number"),
        ("prepare --out r --data=", "--data '': expected a path"),
        ("prepare --out r --data none --tokenizer byt", "or the path of a tokenizer.json; did you mean 'byte'?"),
        ("prepare --out r --data none --vocab-size 0", "--vocab-size 0: expected 261 to 268,435,456"),
        ("prepare --out r --data none --processes 1000000000", "--processes 1000000000: expected 1 to 1,024"),
        ("finetune --from {lm} --out r --train none.csv --seeds 1000000000", "expected at most 10,000"),
        ("finetune --from {lm} --out r --train none.csv --folds 99999999999999999999", "expected at most 10,000"),
        ("finetune --from {lm} --out r --train none.csv --freeze=", "--freeze '': expected trunk or embeddings or N"),
        ("evaluate --from {lm} --data=", "--data '': expected a path"),
        ("evaluate --from {lm} --columns=", "--columns '': expected the name of a column"),
        ("evaluate --from {lm} --device=", "--device '': expected auto or cpu or cuda"),
        ("predict --from {classifier} --data none.csv --max-new-tokens -1", "-1: expected 1 or more"),
        ("compare --from {lm} --metric valid_loss", "--metric valid_loss: of one run; expected --runs beside it"),
        ("compare --from {lm} --batch-size 99999999999999999999", "expected 1 to 1,000,000"),
        ("compare --from {lm} --runs=", "--runs '': expected a path"),
        ("plot {lm} --out=", "--out '': expected a path"),
        ("generate  --prompt a", "no run folder; expected one"),
        ("convert --from {lm} --out r --to hf", "--to hf: expected one of gpt-fast, transformers, nanogpt"),
    ],
)
def test_values_that_mean_nothing(cli, data, command, message):
    """Each value is refused in one line. An empty path, for example, does not mean the current folder."""
    result = cli(*(word.format(**data._asdict()) for word in command.split()))
    assert result.code == 2 and message in result.err, result.err
    assert len(result.err.splitlines()) == 1 and "none" not in result.err.replace("none of", "")


def test_a_blank_path_in_a_file_of_settings(cli, tmp_path):
    (tmp_path / "s.yaml").write_text("data: ['']\n")
    result = cli("pretrain", "--config", tmp_path / "s.yaml", "--out", tmp_path / "run")
    assert result.code == 2 and "data has ['']; expected a path" in result.err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("preset: gpt9", "--preset 'gpt9': expected one of "),
        ("graph: true\ndevice: cpu", "--graph: --device is cpu; expected cuda"),
        ("dim: 30\nheads: 7", "--heads 7: 30 dimensions are not divisible by 7 heads"),
    ],
)
def test_a_setting_of_a_file_is_named_with_the_file(cli, tmp_path, text, message):
    """This includes checks that follow the reading of the file. The same value as an option names no file."""
    (tmp_path / "s.yaml").write_text(text)
    result = cli("pretrain", "--config", tmp_path / "s.yaml", "--out", tmp_path / "run")
    assert (result.code, result.out) == (2, "")
    assert f"gpt-fast: --config {tmp_path / 's.yaml'}: {message}" in result.err
    given = [word for line in text.splitlines() for word in (f"--{line.split(': ')[0]}", line.split(": ")[1])]
    given = [word for word in given if word != "true"]
    result = cli("pretrain", "--config", tmp_path / "s.yaml", *given, "--out", tmp_path / "run")
    assert result.code == 2
    assert f"gpt-fast: {message}" in result.err
