"""`gpt-fast` as users run it: results, files, stdout and stderr."""

import importlib.util
import json
import re
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from gpt_fast import GPTConfig
from gpt_fast.data import tables
from gpt_fast.generation.steps import WEIGHTS
from gpt_fast.training import warmup
from tests.command_line import SMALL, succeed

COMMANDS = {
    "pretrain": "--data --out --objective --tokenizer --preset --layers --heads --dim --seq-len --dropout --steps "
    "--batch-size --lr --seed --overwrite --device --json --from --pack --accumulate --warmup --weight-decay "
    "--max-grad-norm --precision --compile --checkpoint-activations --max-skips --strategy --config --log-every "
    "--checkpoint-every --keep-checkpoints --tensorboard --profile --resume --beta1 --beta2 --final-lr "
    "--raw-dtype --text-column --optimizer --muon-lr --schedule --decay --z-loss --graph",
    "prepare": "--data --valid --out --tokenizer --vocab-size --text-column --processes --overwrite --json",
    "finetune": "--from --train --valid --out --text-column --pair-column --label-column --task --numbers --scratch "
    "--labels --skip-label --answers --columns --skip-ragged --convertible "
    "--optimizer --muon-lr --schedule --decay --z-loss "
    "--epochs --batch-size --lr --lm-weight --rows --strategy --config --resume --overwrite --json",
    "evaluate": "--from --data --raw-dtype --text-column --pair-column --label-column --skip-label --columns "
    "--skip-ragged --confusion --stride --form --json",
    "predict": "--from --text --pair --data --out --overwrite --text-column --pair-column --columns --skip-ragged "
    "--max-new-tokens --raw --json",
    "plot": "--metric --out",
    "generate": "--from --prompt --question --max-new-tokens --num-samples --temperature --top-k --top-p "
    "--repetition-penalty --stop --seed --sliding --weights --raw --json",
    "compare": "--from --runs --loss --metric --json",
    "convert": "--from --out --to --head --tokenizer --characters --heads --activation --json",
    "doctor": "--json",
    "warmup": "--from --preset --batch-size --precision --json",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_help(cli, command):
    result = succeed(cli(command, "--help"))
    for option in COMMANDS[command].split():
        assert re.search(rf"{option}\b", result.out), option
    assert command == "doctor" or "gpt-fast " + command in result.out  # an example


def test_no_arguments_shows_the_commands(cli):
    assert all(command in cli().out for command in COMMANDS)


def test_doctor(cli):
    findings = json.loads(succeed(cli("doctor", "--json")).out)
    assert findings["versions"]["torch"]
    assert findings["ops"]["layer_norm"]["cpu"] in ("cpp", "triton", "reference")
    shown = succeed(cli("doctor")).out
    assert all(op in shown for op in findings["ops"])
    assert (findings["extension"] is None) == any("make install" in line for line in findings["advice"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_warmup_without_triton(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="gpt-fast warmup: Triton is not installed; expected it for CUDA kernels"):
        warmup.warm(GPTConfig.preset("gpt2"))


def test_warmup_without_a_gpu(cli, data):
    """The error is the same for a preset and for a run. Wrong options are reported before it."""
    for options in (["--preset", "gpt2"], ["--from", data.lm]):
        result = cli("warmup", *options)
        assert result.code == 2
        assert "gpt-fast warmup: this PyTorch sees no CUDA device; expected one, as only it runs Triton" in result.err
    assert "expected --from RUN or --preset NAME, one of them" in cli("warmup").err
    assert "--preset 'gpt3': expected one of" in cli("warmup", "--preset", "gpt3").err


def test_pretrain_writes_a_run(data):
    assert sorted(path.name for path in data.lm.iterdir()) == [
        "checkpoints", "config.json", "loss.png", "metrics.jsonl", "model.safetensors", "run.json", "settings.yaml",
        "tokenizer.json",
    ]  # fmt: skip
    lines = [json.loads(line) for line in (data.lm / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 4
    assert lines[-1]["valid_loss"] > 0


def test_pretrain_prints_its_loss_beside_the_unigram_entropy(cli, data, tmp_path):
    """Stdout has a table, or with --json nothing but JSON. --data takes several paths."""
    command = ["pretrain", "--data", data.text, data.table, "--out", tmp_path / "run", *SMALL, "--steps", 2]
    shown = succeed(cli(*command, "--tokenizer", "char"))
    assert re.search(r"validation loss +\d+\.\d+ nats per token\n +unigram entropy +\d+\.\d+ nats per token", shown.out)
    assert "update     2: train loss" in shown.err
    record = json.loads(succeed(cli(*command, "--tokenizer", "byte", "--overwrite", "--json")).out)
    assert record["data"] == f"{data.text}, {data.table}"
    assert record["valid_loss"] > record["unigram_entropy"] > 0  # two updates do not learn much
    assert json.loads((tmp_path / "run" / "run.json").read_text())["tokenizer"] == "byte"


def test_pretrain_takes_another_runs_tokenizer(cli, data, tmp_path):
    tokenizer = data.mlm / "tokenizer.json"
    succeed(
        cli("pretrain", "--data", data.text, "--tokenizer", tokenizer, *SMALL, "--steps", 1, "--out", tmp_path / "run")
    )
    written = [json.loads(path.read_text())["model"] for path in (tokenizer, tmp_path / "run" / "tokenizer.json")]
    assert written[0] == written[1]


def test_presets_and_sizes(cli, data, tmp_path):
    """Sizes beside a preset replace the preset's own. The rest stays: GPT-1 is post-norm with dropout."""
    out = tmp_path / "run"
    succeed(cli("pretrain", "--preset", "gpt1", "--data", data.text, *SMALL, "--steps", 1, "--out", out))
    config = json.loads((out / "config.json").read_text())
    assert (config["num_layers"], config["pre_norm"], config["attention_dropout"]) == (1, False, 0.1)


def test_finetune_and_evaluate_agree(cli, data, tmp_path):
    shutil.copy(data.table, tmp_path / "t.csv")
    out = tmp_path / "run"
    tables = ["--train", data.table, "--valid", tmp_path / "t.csv"]
    run = succeed(cli("finetune", "--from", data.lm, *tables, "--out", out, "--json"))
    assert "only 6 updates on 60 rows" in run.err
    trained = json.loads(run.out)
    assert trained["labels"] == ["cold", "warm"]
    result = json.loads(succeed(cli("evaluate", "--from", out, "--data", tmp_path / "t.csv", "--json")).out)
    assert result["accuracy"] == trained["valid_accuracy"]
    assert result["majority_accuracy"] == trained["majority_accuracy"] == pytest.approx(2 / 3)
    shown = succeed(cli("evaluate", "--from", out, "--data", tmp_path / "t.csv")).out
    assert f"accuracy       {result['accuracy']:.1%}, always the commonest label: 66.7%" in shown


def test_how_a_table_was_read_is_told(cli, data, tmp_path):
    """A .tsv without quoting or header gets one line each about quotes, skipped rows and the rule for labels.

    Evaluation skips the rows that training skipped, and predictions stand beside the rows that were read.
    """
    lines = [f'{1 + i % 2}.0\t"text {i}\n' for i in range(20)]
    (tmp_path / "t.tsv").write_text("".join([*lines, "-1\tno label\n", "2\n"]))
    table = ["--columns", "label,text", "--skip-ragged"]
    options = ["--train", tmp_path / "t.tsv", "--valid", tmp_path / "t.tsv", "--skip-label", "-1", "--epochs", 1]
    run = succeed(cli("finetune", "--from", data.lm, *options, *table, "--out", tmp_path / "run", "--json"))
    assert json.loads(run.out)["labels"] == ["1", "2"]
    told = run.err.splitlines()
    assert f"{tmp_path}/t.tsv: skipped 1 rows with another number of fields: line 22" in told
    assert f"{tmp_path}/t.tsv: skipped 1 rows by their label: line 21" in told
    assert "labels: integers 1..2, sorted by value" in told
    assert any(line.startswith(f"{tmp_path}/t.tsv: read without quoting, 22 rows") for line in told)
    use = ["--from", tmp_path / "run", "--data", tmp_path / "t.tsv", *table]
    result = succeed(cli("evaluate", *use, "--json"))
    assert json.loads(result.out)["examples"] == 20
    assert "skipped 1 rows by their label: line 21" in result.err
    succeed(cli("predict", *use, "--out", tmp_path / "out.jsonl"))
    written = [row for _, row in tables.read_rows(tmp_path / "out.jsonl")]
    assert [row["text"] for row in written] == [*(f'"text {i}' for i in range(20)), "no label"]
    assert {row["prediction"] for row in written} <= {"1", "2"}


def test_predict_a_text(cli, data):
    command = ["predict", "--from", data.classifier, "--text", "the red fox"]
    result = json.loads(succeed(cli(*command, "--json")).out)
    (found,) = result["predictions"]
    assert set(found["probabilities"]) == {"cold", "warm"}
    assert found["probability"] == max(found["probabilities"].values()) == found["probabilities"][found["prediction"]]
    lines = succeed(cli(*command)).out.splitlines()
    assert lines[0] == found["prediction"]
    assert [line.split() for line in lines[1:]] == [[n, f"{p:.1%}"] for n, p in found["probabilities"].items()]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_predict_a_table(cli, data, tmp_path, suffix):
    """Every column stays and two are added. A row alone has the probabilities that it has among others."""
    texts = ['the "red" fox', "the blue, blue fox", "a fox\nof two lines", "the red fox runs " * 9]
    rows = [{"number": str(i), "text": text} for i, text in enumerate(texts)]
    table, out = tmp_path / f"rows{suffix}", tmp_path / "new" / f"out{suffix}"
    tables.write_rows(table, rows)
    command = ["predict", "--from", data.classifier, "--data", table]
    result = json.loads(succeed(cli(*command, "--json")).out)
    told = succeed(cli(*command, "--out", out)).err
    assert "4 rows" in told
    written = [row for _, row in tables.read_rows(out)]
    assert list(written[0]) == ["number", "text", "prediction", "probability"]
    for row, answered, found in zip(rows, written, result["predictions"], strict=True):
        assert row.items() <= answered.items()
        assert answered["prediction"] == found["prediction"]
        assert float(answered["probability"]) == found["probability"]
        alone = json.loads(succeed(cli(*command[:3], "--text", row["text"], "--json")).out)["predictions"][0]
        assert alone["probabilities"] == pytest.approx(found["probabilities"], rel=1e-4)
    lines = succeed(cli(*command)).out.splitlines()
    assert [line.split("\t")[0] for line in lines] == [found["prediction"] for found in result["predictions"]]
    assert lines[2].endswith("a fox of two lines")
    again = cli("predict", "--from", data.classifier, "--data", out, "--out", tmp_path / f"twice{suffix}")
    assert again.code == 2
    assert f"line {1 if suffix == '.jsonl' else 2}: has a column 'prediction'" in again.err


@pytest.mark.parametrize("name", ["lm", "mlm"])
def test_evaluate_a_language_model(cli, data, name):
    run = getattr(data, name)
    result = json.loads(succeed(cli("evaluate", "--from", run, "--data", data.text, "--json")).out)
    assert result["loss"] > 0
    assert result["unigram_entropy"] > 0
    assert "nats per token" in succeed(cli("evaluate", "--from", run, "--data", data.text)).out


def test_generate(cli, data):
    command = ["generate", "--from", data.lm, "--prompt", "the red", "--max-new-tokens", 20]
    greedy = [succeed(cli(*command, "--temperature", 0)).out for _ in range(2)]
    assert greedy[0] == greedy[1]
    assert greedy[0].startswith("the red")
    result = json.loads(succeed(cli(*command, "--temperature", 0, "--json")).out)
    assert result["prompt"] + result["text"] + "\n" == greedy[0]
    drawn = [succeed(cli(*command, "--seed", seed, "--top-k", 50, "--top-p", 0.9)).out for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_generate_several_samples_at_once(cli, data):
    command = ["generate", "--from", data.lm, "--prompt", "the red", "--max-new-tokens", 12, "--num-samples", 3]
    shown = succeed(cli(*command, "--seed", 1)).out
    assert shown.count("the red") == 3
    assert "--- 3\nthe red" in shown
    result = json.loads(succeed(cli(*command, "--seed", 1, "--json")).out)
    texts = [sample["text"] for sample in result["samples"]]
    assert len(set(texts)) > 1
    assert all("the red" + text in shown for text in texts)


def test_generate_stops_before_a_text(cli, data):
    """Nothing of the stop text is written, however tokens divide it. Text that may yet become it is held back."""
    command = ["generate", "--from", data.lm, "--prompt", "the red", "--max-new-tokens", 20, "--temperature", 0]
    text = json.loads(succeed(cli(*command, "--json")).out)["text"]
    stop = text[3:6]
    wanted = text[: text.index(stop)]
    assert succeed(cli(*command, "--stop", stop)).out == f"the red{wanted}\n"
    result = json.loads(succeed(cli(*command, "--stop", "never", "--stop", stop, "--json")).out)
    assert result["text"] == wanted
    assert result["new_tokens"] < 20
    assert succeed(cli(*command, "--stop", text + "x")).out == f"the red{text}\n"


@pytest.mark.parametrize("weights", WEIGHTS)
def test_generate_with_other_weights(cli, data, weights):
    command = ["generate", "--from", data.lm, "--prompt", "the red", "--max-new-tokens", 5, "--repetition-penalty", 1.3]
    assert succeed(cli(*command, "--weights", weights, "--temperature", 0)).out.startswith("the red")


def test_generate_answers_a_question(cli, data, tmp_path):
    """A run that is fine-tuned to answer questions needs --question, and other runs refuse it."""
    table = tmp_path / "qa.csv"
    rows = [f"the {colour} fox,what colour,{colour}" for colour in ("red", "blue", "green", "black")]
    table.write_text("context,question,answer\n" + "\n".join(rows) + "\n")
    run = tmp_path / "qa"
    tables = ["--train", table, "--valid", table, "--epochs", 1]
    succeed(cli("finetune", "--from", data.lm, "--task", "question-answering", *tables, "--out", run))
    command = ["generate", "--from", run, "--prompt", "the red fox", "--max-new-tokens", 5, "--temperature", 0]
    assert succeed(cli(*command, "--question", "what colour")).out.startswith("the red fox")
    failed = cli(*command)
    assert failed.code == 2
    assert "expected --question" in failed.err
    failed = cli("generate", "--from", data.lm, "--prompt", "a", "--question", "what")
    assert "expected no --question" in failed.err


def test_generate_slides_past_the_last_position(cli, data):
    command = ["generate", "--from", data.lm, "--prompt", "the red fox " * 5, "--sliding", "--max-new-tokens", 9]
    assert json.loads(succeed(cli(*command, "--json")).out)["new_tokens"] <= 9


def test_compare(cli, data):
    result = json.loads(succeed(cli("compare", "--from", data.classifier, "--repeats", 1, "--json")).out)
    assert result["logits"]["relative"] < 1e-4
    assert result["gradients"]["relative"] < 1e-3
    assert "tokens/s" in succeed(cli("compare", "--from", data.lm, "--repeats", 1)).out


def test_the_standard_library_is_there_for_those_without_data(cli, tmp_path):
    """pretrain, finetune and evaluate run without data."""
    lm, task = tmp_path / "lm", tmp_path / "task"
    record = json.loads(succeed(cli("pretrain", "--out", lm, *SMALL, "--steps", 1, "--json")).out)
    assert record["data"] == "standard library"
    assert record["train_tokens"] > 1_000_000
    trained = ["finetune", "--from", lm, "--out", task, "--epochs", 1, "--lm-weight", 0, "--json"]
    record = json.loads(succeed(cli(*trained)).out)
    result = json.loads(succeed(cli("evaluate", "--from", task, "--json")).out)
    assert result["accuracy"] == record["valid_accuracy"]
    assert 0.08 < result["majority_accuracy"] < 0.2


# --- settings as files, pictures ---


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_settings_from_a_file(cli, data, tmp_path, suffix):
    """Names have - or _, and the command line wins. The saved, complete settings make the same run again."""
    path = tmp_path / f"settings.{suffix}"
    values = {"data": [str(data.text)], "tokenizer": "byte", "steps": 9, "layers": 1, "heads": 2, "dim": 16}
    values |= {"seq_len": 32, "batch-size": 4, "dropout": 0.1, "device": "cpu"}
    path.write_text(json.dumps(values) if suffix == "json" else yaml.safe_dump(values))
    succeed(cli("pretrain", "--config", path, "--steps", 3, "--out", tmp_path / "a"))
    saved = yaml.safe_load((tmp_path / "a" / "settings.yaml").read_text())
    assert (saved["steps"], saved["dropout"], saved["lr"], saved["warmup"]) == (3, 0.1, 2e-3, 1)
    succeed(cli("pretrain", "--config", tmp_path / "a" / "settings.yaml", "--out", tmp_path / "b"))
    assert (tmp_path / "b" / "settings.yaml").read_text() == (tmp_path / "a" / "settings.yaml").read_text()
    losses = [json.loads((tmp_path / name / "run.json").read_text())["train_loss"] for name in "ab"]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("stepz: 3\n", "s.yaml: PretrainSettings has no 'stepz'; did you mean 'steps'?"),
        ("xyz: 3\n", "s.yaml: PretrainSettings has no 'xyz'; it has accumulate, batch-size"),
        ("steps: many\n", "s.yaml: steps has 'many'; expected a whole number"),
        ("batch_size: 0\n", "s.yaml: batch-size has 0; expected at least 1"),
        ("objective: xlm\n", "s.yaml: objective has 'xlm'; expected 'clm' or 'mlm'"),
        ("data: books\n", "s.yaml: data has 'books'; expected a list"),
        ("steps: [", "not YAML"),
        ("- steps\n", "s.yaml: has a list; expected names of options with values"),
    ],
)
def test_settings_files_that_cannot_be(cli, tmp_path, content, message):
    (tmp_path / "s.yaml").write_text(content)
    result = cli("pretrain", "--config", tmp_path / "s.yaml", "--out", tmp_path / "run")
    assert result.code == 2
    assert "Traceback" not in result.err
    assert message in " ".join(result.err.replace("│", " ").split())
    assert not (tmp_path / "run").exists()


def is_png(path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def test_plot(cli, data, tmp_path):
    """One of the runs is still training, and its last line is half written."""
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "metrics.jsonl").write_text('{"step": 1, "train_loss": 5.0}\n{"step": 2, "train_lo')
    out = tmp_path / "curves.png"
    succeed(cli("plot", data.lm, data.mlm, unfinished, "--metric", "train_loss", "--out", out))
    assert is_png(out)


def test_confusion_matrix(cli, data, tmp_path):
    assert is_png(data.classifier / "confusion.png")
    path = tmp_path / "pictures" / "c.png"
    run = succeed(cli("evaluate", "--from", data.classifier, "--data", data.table, "--confusion", path))
    assert is_png(path) and str(path) in run.err


def test_tensorboard_and_mfu(cli, data, tmp_path):
    succeed(
        cli("pretrain", "--data", data.text, "--tokenizer", "byte", *SMALL, "--steps", 2, "--tensorboard",
            "--out", tmp_path / "run")
    )  # fmt: skip
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["mfu"] < 1 for line in lines)


def test_profile(cli, data, tmp_path):
    """The trace holds the ops by name, the run prints its path, and `--overwrite` replaces the folder."""
    out = tmp_path / "run"
    command = ["pretrain", "--data", data.text, "--tokenizer", "byte", *SMALL, "--steps", 4, "--profile", "--out", out]
    told = succeed(cli(*command)).err
    assert "profile.json" in told and "ui.perfetto.dev" in told
    names = {event.get("name") for event in json.loads((out / "profile.json").read_text("utf-8"))["traceEvents"]}
    ops = ("embedding", "layer_norm", "linear", "mlp", "add_layer_norm")
    assert {f"gpt_fast::{op}_{way}" for op in ops for way in ("forward", "backward")} <= names
    assert {"gpt_fast::linear_cross_entropy_forward", "gpt_fast::attention_qkv_backward", "ProfilerStep#3"} <= names
    (out / "profile.json").write_text("{}")
    succeed(cli(*command, "--overwrite"))
    assert (out / "profile.json").stat().st_size > 2


# --- one objective after the other ---


@pytest.mark.parametrize(("first", "objective"), [("lm", "mlm"), ("mlm", "clm"), ("lm", "clm")])
def test_going_on_with_another_objective(cli, data, tmp_path, first, objective):
    """Trunk, output layer, sizes and tokenizer are those of the run in --from."""
    source, out = getattr(data, first), tmp_path / "run"
    command = ["pretrain", "--from", source, "--data", data.text, "--objective", objective, "--steps", 1]
    succeed(cli(*command, "--batch-size", 4, "--lr", 1e-9, "--out", out))
    succeed(cli(*command, "--from", out, "--batch-size", 4, "--out", tmp_path / "again"))
    assert json.loads((tmp_path / "again" / "run.json").read_text())["lr"] == 1e-9
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6)
    head = {"clm": "GPTForCausalLM", "mlm": "GPTForMaskedLM"}[objective]
    assert json.loads((out / "config.json").read_text())["head"] == head
    tokenizers = [json.loads((folder / "tokenizer.json").read_text())["model"] for folder in (source, out)]
    assert tokenizers[0] == tokenizers[1]
