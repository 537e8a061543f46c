"""`gpt-fast` as its users meet it: results, files, and what is on stdout and stderr."""

import json
import re
import shutil

import pytest

from tests.command_line import SMALL, succeed

pytest_plugins = ("tests.command_line",)

COMMANDS = {
    "pretrain": "--data --out --objective --tokenizer --preset --layers --heads --dim --seq-len --dropout --steps "
    "--batch-size --lr --seed --overwrite --device --json --from --pack --accumulate --warmup --weight-decay "
    "--max-grad-norm --precision --compile --checkpoint-activations --max-skips --strategy --config --log-every "
    "--checkpoint-every --keep-checkpoints --tensorboard --resume",
    "prepare": "--data --valid --out --tokenizer --vocab-size --text-column --processes --overwrite --json",
    "finetune": "--from --train --valid --out --text-column --label-column --task --overwrite --json",
    "evaluate": "--from --data --json",
    "generate": "--from --prompt --max-new-tokens --temperature --top-k --top-p --seed --json",
    "compare": "--from --json",
    "doctor": "--json",
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


def test_pretrain_writes_a_run(data):
    assert sorted(path.name for path in data.lm.iterdir()) == [
        "config.json", "loss.png", "metrics.jsonl", "model.safetensors", "run.json", "settings.yaml", "tokenizer.json",
    ]  # fmt: skip
    lines = [json.loads(line) for line in (data.lm / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 4
    assert lines[-1]["valid_loss"] > 0


def test_pretrain_prints_its_loss_beside_the_unigram_entropy(cli, data, tmp_path):
    """As a table, and as JSON with nothing else on stdout; several paths behind one --data; --overwrite."""
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
    """Sizes beside a preset replace its own; the rest stays: GPT-1 is post-norm with dropout."""
    out = tmp_path / "run"
    succeed(cli("pretrain", "--preset", "gpt1", "--data", data.text, *SMALL, "--steps", 1, "--out", out))
    config = json.loads((out / "config.json").read_text())
    assert (config["num_layers"], config["pre_norm"], config["attention_dropout"]) == (1, False, 0.1)


def test_finetune_and_evaluate_agree(cli, data, tmp_path):
    shutil.copy(data.table, tmp_path / "t.csv")
    out = tmp_path / "run"
    tables = ["--train", data.table, "--valid", tmp_path / "t.csv"]
    trained = json.loads(succeed(cli("finetune", "--from", data.lm, *tables, "--out", out, "--json")).out)
    assert trained["labels"] == ["cold", "warm"]
    result = json.loads(succeed(cli("evaluate", "--from", out, "--data", tmp_path / "t.csv", "--json")).out)
    assert result["accuracy"] == trained["valid_accuracy"]
    assert result["majority_accuracy"] == trained["majority_accuracy"] == pytest.approx(2 / 3)
    shown = succeed(cli("evaluate", "--from", out, "--data", tmp_path / "t.csv")).out
    assert f"accuracy       {result['accuracy']:.1%}, always the commonest label: 66.7%" in shown


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


def test_generate_slides_past_the_last_position(cli, data):
    command = ["generate", "--from", data.lm, "--prompt", "the red fox " * 5, "--sliding", "--max-new-tokens", 9]
    assert json.loads(succeed(cli(*command, "--json")).out)["new_tokens"] <= 9


def test_compare(cli, data):
    result = json.loads(succeed(cli("compare", "--from", data.classifier, "--repeats", 1, "--json")).out)
    assert result["logits"]["relative"] < 1e-4
    assert result["gradients"]["relative"] < 1e-3
    assert "tokens/s" in succeed(cli("compare", "--from", data.lm, "--repeats", 1)).out


def test_the_standard_library_is_there_for_those_without_data(cli, tmp_path):
    """The three commands without any data."""
    lm, task = tmp_path / "lm", tmp_path / "task"
    record = json.loads(succeed(cli("pretrain", "--out", lm, *SMALL, "--steps", 1, "--json")).out)
    assert record["data"] == "standard library"
    assert record["train_tokens"] > 1_000_000
    trained = ["finetune", "--from", lm, "--out", task, "--epochs", 1, "--lm-weight", 0, "--json"]
    record = json.loads(succeed(cli(*trained)).out)
    result = json.loads(succeed(cli("evaluate", "--from", task, "--json")).out)
    assert result["accuracy"] == record["valid_accuracy"]
    assert 0.08 < result["majority_accuracy"] < 0.2
