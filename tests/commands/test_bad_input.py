"""What `gpt-fast` refuses: exit code 2, one line that says what came and what is expected, nothing left on the disk."""

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command_line import ENVIRONMENT, SMALL, Result


def files(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def refuse(result: Result, *messages: str) -> None:
    """Exit code 2, nothing on stdout, and an error of one line that says what came and what is expected."""
    assert result.code == 2, result
    assert "Traceback" not in result.err
    assert result.out == ""
    lines = [line for line in result.err.splitlines() if line.startswith("gpt-fast: ")]
    lines = [line for line in lines if "reference serves" not in line]
    assert len(lines) == 1, result.err
    for message in messages:
        assert message in lines[0]


BAD_PRETRAIN = {
    "missing data": ("--data {tmp}/none.txt", ["none.txt: no such file"]),
    "empty data": ("--data {tmp}/empty.txt", ["empty.txt: empty", "expected UTF-8 text"]),
    "not utf-8": ("--data {tmp}/latin.txt", ["latin.txt: not UTF-8"]),
    "bytes without end": ("--data /dev/zero", ["/dev/zero: is a device; expected a file, a folder or a pipe"]),
    "a data set without a name": ("--data hf:", ["hf:: names no data set; expected hf:NAME or hf:NAME:SPLIT"]),
    "too little data": ("--data {tmp}/short.txt", ["fewer than a window of 32"]),
    "unknown preset": ("--preset gpt5", ["gpt5", "notes, gpt1, gpt2"]),
    "unknown objective": ("--objective xlm", ["--objective 'xlm': expected one of clm, mlm; did you mean 'mlm'?"]),
    "unknown tokenizer": ("--tokenizer bqe", ["bqe", "bpe, byte, char"]),
    "broken tokenizer": ("--tokenizer {tmp}/short.txt", ["short.txt: not a tokenizer.json"]),
    "dropout": ("--dropout 1.0", ["--dropout 1.0", "less than 1"]),
    "heads": ("--dim 50 --heads 4", ["50", "4", "divisible"]),
    "no layers": ("--layers 0", ["--layers 0", "at least 1"]),
    "layers beyond memory": ("--layers 100000000", ["needs 6,067.2 GB of memory", "smaller --dim"]),
    "a batch beyond memory": ("--batch-size 1000000000", ["of memory", "--batch-size"]),
    "a size beyond all": ("--dim 1000000000000000000", ["--dim 1000000000000000000", "at most 268,435,456"]),
    "no steps": ("--steps 0", ["--steps 0", "at least 1"]),
    "no batch": ("--batch-size 0", ["--batch-size 0", "at least 1"]),
    "parts": ("--accumulate 3", ["--batch-size 4", "divided evenly among 3 parts"]),
    "beta": ("--beta2 1", ["--beta2 1.0", "less than 1"]),
    "final rate": ("--final-lr 2", ["--final-lr 2.0", "at most 1"]),
    "precision": ("--precision int8", ["--precision 'int8': expected one of float32, bfloat16, float16"]),
    "no checkpoints": ("--checkpoint-every 0", ["--checkpoint-every 0", "at least 1"]),
    "strategy": ("--strategy zero", ["--strategy 'zero': expected one of ddp, fsdp"]),
    "missing settings": ("--config {tmp}/none.yaml", ["--config", "none.yaml: no such file"]),
    "settings that are none": ("--config {tmp}/short.txt", ["short.txt: has a str", "expected names of options"]),
    "overwrite and resume": ("--overwrite --resume", ["--overwrite and --resume", "one of them"]),
    "sizes beside a model": ("--from {lm} --layers 3", ["--layers 3", "leave one out"]),
    "device": ("--device tpu", ["--device 'tpu': expected one of auto, cpu, cuda"]),
    "out is a file": ("--out {tmp}/short.txt", ["short.txt: is a file"]),
    "out cannot be written": ("--out {tmp}/short.txt/run", ["short.txt/run: cannot write there"]),
    "out holds a run": ("--out {lm}", ["already holds a run", "--overwrite"]),
    "out holds something else": ("--out {tmp} --overwrite", ["holds what no run wrote"]),
}


@pytest.mark.parametrize("case", BAD_PRETRAIN)
def test_pretrain_refuses(cli, data, tmp_path, case):
    options, messages = BAD_PRETRAIN[case]
    for name, content in {"empty.txt": b"", "latin.txt": b"caf\xe9", "short.txt": b"a few words\n"}.items():
        (tmp_path / name).write_bytes(content)
    command = ["--data", data.text, "--tokenizer", "byte", "--out", tmp_path / "new" / "run", *SMALL]
    given = [option.format(tmp=tmp_path, lm=data.lm) for option in options.split()]
    if given[0] == "--data":
        command = command[2:]
    before = files(tmp_path) | files(data.folder)
    refuse(cli("pretrain", *command, *given), *messages)
    assert files(tmp_path) | files(data.folder) == before


def test_divergence_leaves_the_batch_that_began_it(cli, data, tmp_path):
    out = tmp_path / "run"
    command = ["pretrain", "--data", data.text, "--tokenizer", "byte", *SMALL, "--steps", 40, "--out", out]
    result = cli(*command, "--lr", 1e30)
    refuse(result, "the training loss is", "smaller --lr", f"{out}/bad-batch.safetensors")
    assert "update 3: skipped" in result.err
    assert sorted(path.name for path in out.iterdir()) == [
        "bad-batch.safetensors", "config.json", "metrics.jsonl", "settings.yaml", "tokenizer.json",
    ]  # fmt: skip


TABLES = {
    "empty.csv": b"",
    "latin.csv": b"text,label\ncaf\xe9,a\n",
    "column.csv": b"text,lable\na,b\n",
    "semicolons.csv": b"text;label\na;b\n",
    "ids.csv": b"text,label\n" + b"".join(b"a,%d\n" % i for i in range(20)),
    "ragged.csv": b"text,label\na,b\na,b,c\n",
    "one.csv": b"text,label\n" + b"a,b\n" * 20,
    "few.csv": b"text,label\na,b\nc,d\n",
    "new.csv": b"text,label\na,warm\nb,tepid\n",
    "words.csv": b"text,label\na,three\nb,4\n" * 6,
    "nameless.jsonl": b"{}\n",
    "broken.jsonl": b'{"text": "a", "label": "b"}\n{"text": \n',
    "latin.txt": b"caf\xe9\n",
    "twice.csv": b"text,label,label\na,b,c\n",
    "minus.csv": b"text,label\n" + b"a,0\nb,-1\nc,1\n" * 5,
    "quiz.csv": b"question,a,b,answer\nq,x,y,1\nq,x,y,2\n",
    "broken.parquet": b"PAR1",
    "table.txt": b"text,label\na,b\n",
}
BAD_FINETUNE = {
    "missing table": ("--train {tmp}/none.csv", ["none.csv: no such file"]),
    "empty table": ("--train {tmp}/empty.csv", ["empty.csv: empty"]),
    "not utf-8": ("--train {tmp}/latin.csv", ["latin.csv, line 2: not UTF-8 (byte 3"]),
    "no such column": (
        "--train {tmp}/column.csv",
        ["column.csv: no column 'label' (did you mean 'lable'?)", "'text', 'lable'", "--label-column names another"],
    ),
    "no such text column": (
        "--train {table} --text-column body",
        ["no column 'body'", "'text', 'label'", "--text-column names another"],
    ),
    "no columns": ("--train {tmp}/nameless.jsonl", ["nameless.jsonl: no column 'text'; it has none"]),
    "semicolons": ("--train {tmp}/semicolons.csv", ["semicolons.csv: no column 'text'", "separated by ';'", "commas"]),
    "labels that never repeat": (
        "--train {tmp}/ids.csv",
        ["ids.csv: column 'label' has 20 labels in 20 rows", "--valid"],
    ),
    "ragged": ("--train {tmp}/ragged.csv", ["ragged.csv, line 3: 3 fields under a header of 2"]),
    "one label": ("--train {tmp}/one.csv", ["one.csv: every row has the label 'b'"]),
    "few rows": ("--train {tmp}/few.csv", ["few.csv: 2 rows", "--valid"]),
    "unknown label": (
        "--train {table} --valid {tmp}/new.csv",
        ["new.csv, line 3: unknown label 'tepid'", "'cold', 'warm'"],
    ),
    "not json": ("--train {tmp}/broken.jsonl", ["broken.jsonl, line 2: not JSON"]),
    "two columns of one name": ("--train {tmp}/twice.csv", ["twice.csv: columns 2 and 3 are both called 'label'"]),
    "minus one": ("--train {tmp}/minus.csv --skip-label=5", ["column 'label' holds -1 in 5 rows", "--skip-label=-1"]),
    "answers from one": (
        "--train {tmp}/quiz.csv --task multiple-choice --pair-column a,b",
        ["quiz.csv, line 3: answer '2' of 2 counts from 1", "--answers 1"],
    ),
    "broken parquet": ("--train {tmp}/broken.parquet", ["broken.parquet: damaged, or no parquet table"]),
    "labels of a regression": ("--train {table} --task regression --labels a,b", ["--labels a,b: regression has no"]),
    "columns of a jsonl": ("--train {tmp}/broken.jsonl --columns a,b", ["--columns a,b: ", "names its columns itself"]),
    "not a table": (
        "--train {tmp}/table.txt",
        ["table.txt: ends in '.txt'; expected a table ending in .csv, .tsv, .jsonl"],
    ),
    "valid alone": ("--valid {table}", ["--valid", "without --train"]),
    "words for numbers": (
        "--train {tmp}/words.csv --task regression",
        ["words.csv, line 2: label 'three' is not a number"],
    ),
    "unknown task": ("--train {table} --task tagging", ["tagging", "classification, entailment, similarity"]),
    "pair where there is none": ("--train {table} --pair-column b", ["--pair-column b", "reads one text only"]),
    "pair that is missing": ("--train {table} --task entailment", ["no column 'premise'", "'text', 'label'"]),
    "one choice": (
        "--train {table} --task multiple-choice --text-column text --pair-column text --label-column label",
        ["1 choices; expected two or more"],
    ),
    "choice that is none": (
        "--train {table} --task multiple-choice --text-column text --pair-column text,text --label-column label",
        ["line 2: unknown label 'cold'", "A, B, 0 to 1"],
    ),
    "numbers of classes": ("--train {table} --numbers", ["--numbers", "expected similarity or regression"]),
    "no table for a task": ("--task similarity", ["no table comes with it", "--train FILE"]),
    "no epochs": ("--train {table} --epochs 0", ["--epochs 0", "at least 1"]),
    "negative rate": ("--train {table} --lr -1", ["--lr -1.0", "at least 0"]),
    "no rows": ("--train {table} --rows 0", ["--rows 0", "at least 1"]),
    "more rows than there are": ("--train {table} --rows 55", ["--rows 55", "table.csv has 54 to train on"]),
    "strategy": ("--train {table} --strategy zero", ["--strategy 'zero': expected one of ddp, fsdp"]),
    "negative lambda": ("--train {table} --lm-weight -1", ["--lm-weight -1", "at least 0"]),
    "out holds a run": ("--train {table} --out {classifier}", ["already holds a run"]),
    "missing run": ("--train {table} --from {tmp}/none", ["none: no such run folder"]),
    "mistyped run": ("--train {table} --from {classifier}s", ["no such run folder; did you mean", "classifier'?"]),
    "no run": ("--train {table} --from {tmp}", ["not a run of gpt-fast", "config.json"]),
}


@pytest.mark.parametrize("case", BAD_FINETUNE)
def test_finetune_refuses(cli, data, tmp_path, case):
    options, messages = BAD_FINETUNE[case]
    for name, content in TABLES.items():
        (tmp_path / name).write_bytes(content)
    given = [option.format(tmp=tmp_path, **data._asdict()) for option in options.split()]
    before = files(tmp_path) | files(data.folder)
    refuse(cli("finetune", "--from", data.lm, "--out", tmp_path / "new" / "run", *given), *messages)
    assert files(tmp_path) | files(data.folder) == before


def spoil_truncated(run: Path) -> None:
    weights = run / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def spoil_pickle(run: Path) -> None:
    import torch

    torch.save({"a": torch.zeros(3)}, run / "model.safetensors")


def spoil_foreign(run: Path) -> None:
    header = json.dumps({"their.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (run / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    record = json.loads((run / "run.json").read_text())
    record.pop("weights")  # whose size would tell first
    (run / "run.json").write_text(json.dumps(record))


def spoil_config(**changes: object) -> Callable[[Path], None]:
    def spoil(run: Path) -> None:
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(config | changes))

    return spoil


def spoil_tokenizer(run: Path) -> None:
    tokenizer = json.loads((run / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 261, "content": "<|more|>"})
    (run / "tokenizer.json").write_text(json.dumps(tokenizer))


BAD_RUNS = {
    "truncated": (spoil_truncated, ["model.safetensors", "truncated"]),
    "pickle": (spoil_pickle, ["model.safetensors", "safetensors"]),
    "foreign": (spoil_foreign, ["model.safetensors: lacks trunk.", "GPTForCausalLM"]),
    "other sizes": (spoil_config(hidden_dim=32), ["model.safetensors", "[64, 16]", "[64, 32]"]),
    "sizes that make no model": (spoil_config(num_heads=3), ["config.json", "divisible"]),
    "unknown head": (spoil_config(head="GPTForTagging"), ["config.json", "GPTForTagging", "GPTForCausalLM"]),
    "foreign config": (lambda run: (run / "config.json").write_text('{"model_type": "gpt2"}'), ["config.json"]),
    "no json": (lambda run: (run / "config.json").write_text("{"), ["config.json", "not JSON"]),
    "no tokenizer": (lambda run: (run / "tokenizer.json").unlink(), ["has a model and no tokenizer.json"]),
    "other tokenizer": (spoil_tokenizer, ["do not belong together", "262 tokens", "261"]),
}


@pytest.mark.parametrize("case", BAD_RUNS)
def test_damaged_runs(cli, data, tmp_path, case):
    spoil, messages = BAD_RUNS[case]
    run = tmp_path / "run"
    shutil.copytree(data.lm, run)
    spoil(run)
    refuse(cli("evaluate", "--from", run, "--data", data.text), *messages)


BAD_USES = {
    "evaluate: unknown label": ("evaluate --from {classifier} --data {tmp}/new.csv", ["line 3: unknown label 'tepid'"]),
    "evaluate: a table without text": (
        "evaluate --from {lm} --data {tmp}/semicolons.csv",
        ["semicolons.csv, line 2: no column 'text'; it has 'text;label'"],
    ),
    "evaluate: confusion, no png": (
        "evaluate --from {classifier} --data {table} --confusion {tmp}/c.jpg",
        ["c.jpg", "ends in .png"],
    ),
    "evaluate: no labels": (
        "evaluate --from {classifier} --data {tmp}/column.csv",
        ["no column 'label'", "gpt-fast predict answers rows without labels"],
    ),
    "evaluate: no data": ("evaluate --from {lm}", ["not trained on the standard library", "--data"]),
    "evaluate: confusion of a language model": (
        "evaluate --from {lm} --data {text} --confusion {tmp}/c.png",
        ["holds no classifier"],
    ),
    "evaluate: stride": ("evaluate --from {lm} --data {text} --stride 33", ["--stride 33", "32 positions"]),
    "evaluate: stride of a masked model": (
        "evaluate --from {mlm} --data {text} --stride 9",
        ["--stride 9", "GPTForMaskedLM"],
    ),
    "evaluate: stride of a classifier": ("evaluate --from {classifier} --data {table} --stride 9", ["--stride 9"]),
    "evaluate: unknown form": (
        "evaluate --from {lm} --data {table} --form squad",
        ["--form 'squad': expected one of lambada, hellaswag"],
    ),
    "evaluate: form without data": ("evaluate --from {lm} --form lambada", ["--form lambada: no --data"]),
    "evaluate: form of a classifier": (
        "evaluate --from {classifier} --data {table} --form lambada",
        ["--form lambada", "GPTForSequenceClassification"],
    ),
    "evaluate: form and stride": (
        "evaluate --from {lm} --data {table} --form lambada --stride 9",
        ["--stride 9", "--form lambada"],
    ),
    "evaluate: columns of a text": (
        "evaluate --from {lm} --data {text} --columns a,b",
        ["--columns a,b", "holds a language model", "expected the command without it"],
    ),
    "evaluate: ragged rows of a text": ("evaluate --from {lm} --data {text} --skip-ragged", ["--skip-ragged: "]),
    "evaluate: labels of a text": ("evaluate --from {lm} --data {text} --skip-label=-1", ["--skip-label -1: "]),
    "evaluate: pairs of a text": ("evaluate --from {lm} --data {text} --pair-column b", ["--pair-column b: "]),
    "evaluate: labels of last words": (
        "evaluate --from {lm} --data {table} --form lambada --label-column label",
        ["--label-column label: --form lambada does not read it"],
    ),
    "evaluate: a picture of last words": (
        "evaluate --from {lm} --data {table} --form lambada --confusion {tmp}/c.png",
        ["--confusion", "--form lambada does not read it"],
    ),
    "evaluate: pairs of one text": (
        "evaluate --from {classifier} --data {table} --pair-column label",
        ["--pair-column label: classification reads one text only"],
    ),
    "plot: no such field": ("plot {lm} --metric f1 --out {tmp}/p.png", ["no f1 in its metrics", "train_loss"]),
    "plot: no run": ("plot {tmp} --out {tmp}/p.png", ["no run folder"]),
    "plot: no png": ("plot {lm} --out {tmp}/p.jpg", ["p.jpg", "ends in .png"]),
    "evaluate: text for a classifier": (
        "evaluate --from {classifier} --data {text}",
        ["text.txt: ends in '.txt'; expected a table"],
    ),
    "evaluate: missing data": ("evaluate --from {lm} --data {tmp}/none", ["none: no such file"]),
    "evaluate: not utf-8": ("evaluate --from {lm} --data {tmp}/latin.txt", ["latin.txt: not UTF-8"]),
    "generate: prompt too long": (
        "generate --from {lm} --prompt {long}",
        ["--prompt: has 40 tokens", "32 positions; expected fewer tokens"],
    ),
    "generate: too many": (
        "generate --from {lm} --prompt a --max-new-tokens 99",
        ["--max-new-tokens 99", "expected at most 31, or --sliding"],
    ),
    "generate: temperature": (
        "generate --from {lm} --temperature -1 --max-new-tokens 3",
        ["--temperature -1.0: expected 0 (greedy) or more"],
    ),
    "generate: weights": (
        "generate --from {lm} --weights int4 --max-new-tokens 3",
        ["--weights 'int4': expected one of float32, bfloat16"],
    ),
    "generate: samples": ("generate --from {lm} --num-samples 0 --max-new-tokens 3", ["--num-samples 0"]),
    "generate: penalty": (
        "generate --from {lm} --repetition-penalty 0 --max-new-tokens 3",
        ["--repetition-penalty 0.0: expected more than 0"],
    ),
    "generate: top-k": ("generate --from {lm} --top-k 0 --max-new-tokens 3", ["--top-k 0: expected an integer"]),
    "generate: top-p": ("generate --from {lm} --top-p 1.5 --max-new-tokens 3", ["--top-p 1.5: expected"]),
    "generate: masked": ("generate --from {mlm} --prompt a", ["GPTForMaskedLM", "expected a GPTForCausalLM"]),
    "generate: classifier": ("generate --from {classifier} --prompt a", ["GPTForSequenceClassification"]),
    "predict: nothing": ("predict --from {classifier}", ["--text or --data"]),
    "predict: both": ("predict --from {classifier} --text a --data {tmp}/new.csv", ["--text or --data", "not both"]),
    "predict: an empty text": ("predict --from {classifier} --text=", ["--text: empty"]),
    "predict: an empty pair": ("predict --from {classifier} --text a --pair=", ["--pair: empty"]),
    "predict: a pair, of one text": ("predict --from {classifier} --text a --pair b", ["1 given", "expected 0"]),
    "predict: a pair beside a table": ("predict --from {classifier} --data {tmp}/new.csv --pair b", ["--pair-column"]),
    "predict: a file for one text": (
        "predict --from {classifier} --text a --out {tmp}/o.csv",
        ["--out", "o.csv: belongs to --data"],
    ),
    "predict: language model": ("predict --from {lm} --text a", ["GPTForCausalLM", "gpt-fast finetune"]),
    "predict: overwrites nothing": (
        "predict --from {classifier} --data {tmp}/new.csv --overwrite",
        ["--overwrite: no --out; expected the table to write, too"],
    ),
    "predict: ragged rows of one text": (
        "predict --from {classifier} --text a --skip-ragged",
        ["--skip-ragged: belongs to --data"],
    ),
    "predict: tokens of a label": (
        "predict --from {classifier} --text a --max-new-tokens 5",
        ["--max-new-tokens 5: classification writes no text"],
    ),
    "predict: pairs of one text": (
        "predict --from {classifier} --data {table} --pair-column label",
        ["--pair-column label: classification reads one text only"],
    ),
    "predict: no column": (
        "predict --from {classifier} --data {tmp}/new.csv --text-column words",
        ["new.csv: no column 'words'", "'text'"],
    ),
    "predict: text for a table": (
        "predict --from {classifier} --data {text}",
        ["text.txt: ends in '.txt'; expected a table"],
    ),
    "predict: no such table": ("predict --from {classifier} --data {tmp}/none.csv", ["none.csv: no such file"]),
    "predict: into no table": (
        "predict --from {classifier} --data {tmp}/new.csv --out {tmp}/o.txt",
        ["o.txt: ends in '.txt'; expected a table"],
    ),
    "predict: a folder for a table": ("predict --from {classifier} --data {tmp}", ["a folder; expected a table"]),
    "predict: a file for a run": ("predict --from {table} --text a", ["table.csv: a file, no run folder"]),
    "predict: into what is there": (
        "predict --from {classifier} --data {tmp}/new.csv --out {tmp}/latin.csv",
        ["latin.csv: exists", "--overwrite"],
    ),
    "compare: nothing": ("compare", ["expected --from with one run folder, or --runs with several"]),
    "compare: both": ("compare --from {lm} --runs {mlm}", ["expected --from with one run folder, or --runs"]),
    "compare: a loss of one run": ("compare --from {lm} --loss 3", ["--loss 3: of one run; expected --runs"]),
    "compare: no such run": ("compare --runs {lm} {tmp}/none", ["none: no such run folder"]),
    "compare: no such metric": ("compare --runs {lm} --metric f1", ["no f1 in its metrics"]),
    "compare: a loss that is none": ("compare --runs {lm} {mlm} --loss nan", ["--loss nan: expected a finite number"]),
    "compare: the batch of several runs": (
        "compare --runs {lm} {mlm} --batch-size 4",
        ["--batch-size 4: of timing one model; expected --from"],
    ),
    "resume: another command's run": (
        "pretrain --out {classifier} --resume",
        ["--resume: ", "is a run of gpt-fast finetune; expected one of gpt-fast pretrain"],
    ),
    "resume: a language model": (
        "finetune --from {lm} --out {mlm} --resume",
        ["is a run of gpt-fast pretrain; expected one of gpt-fast finetune"],
    ),
    "resume: a finished run at another rate": (
        "pretrain --out {lm} --resume --lr 9",
        ["--lr 9.0: the run in ", "began with 0.002"],
    ),
    "warmup: no batch": ("warmup --preset gpt2 --batch-size 0", ["--batch-size 0: expected 1 or more"]),
    "compare: repeats": ("compare --from {lm} --repeats 0", ["--repeats 0"]),
}


@pytest.mark.parametrize("case", BAD_USES)
def test_evaluate_generate_compare_refuse(cli, data, tmp_path, case):
    options, messages = BAD_USES[case]
    for name, content in TABLES.items():
        (tmp_path / name).write_bytes(content)
    given = [option.format(tmp=tmp_path, long="a" * 40, **data._asdict()) for option in options.split()]
    refuse(cli(*given), *messages)


def test_a_stray_argument(cli, tmp_path):
    refuse(cli("pretrain", "--out", tmp_path / "run", "text.txt"), "unexpected argument text.txt", "--data")


@pytest.mark.parametrize(
    ("command", "messages"),
    [
        ("pretrain --out x --layer 2", ["--layer: no such option; did you mean '--layers'?"]),
        ("pretrain --out x --steps many", ["--steps 'many': expected a whole number"]),
        ("pretend", ["pretend: no such command; did you mean 'pretrain'?"]),
        ("finetune --out x", ["--from"]),
        ("--nope", ["--nope: no such option; gpt-fast --help lists them"]),
        ("xyz", ["xyz: no such command; expected one of doctor, prepare, pretrain, finetune"]),
        ("pretrain --out x --steps", ["--steps: has no value; expected one"]),
        ("pretrain --out x --json=3", ["--json: has a value; expected none"]),
        ("doctor one two", ["unexpected argument", "expected"]),
        ("evaluate --data x.txt", ["--from: missing (Run folder of the model.)"]),
        ("evaluate --from x --stride half", ["--stride 'half': expected a whole number"]),
        ("compare --from x --loss low", ["--loss 'low': expected a number"]),
    ],
)
def test_unknown_options_and_commands(cli, command, messages):
    """One line that names the nearest option or command."""
    refuse(cli(*command.split()), *messages)


def test_traceback_on_request(cli, tmp_path):
    """For whoever mends the program: the place in the code where an error arose."""
    result = cli("--traceback", "evaluate", "--from", tmp_path / "none")
    assert "Traceback" in result.err
    assert "check_run" in result.err


def test_an_error_from_a_fresh_process(tmp_path):
    """The same as the forked ones, once through the interpreter's own start and exit."""
    done = subprocess.run(
        [sys.executable, "-m", "gpt_fast", "evaluate", "--from", str(tmp_path / "none")],
        env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    refuse(Result(done.returncode, done.stdout, done.stderr), "none: no such run folder")


@pytest.mark.parametrize(
    ("hidden", "message"),
    [("typer", "typer not installed; pip install gpt-fast[train]"), ("tokenizers", "needs tokenizers; pip install")],
)
def test_without_the_train_extra(hidden, message):
    """A package that is not installed, as `find_spec` sees it."""
    script = (
        "import importlib.util, sys\n"
        "real = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, *rest: None if name == '{hidden}' else real(name, *rest)\n"
        "sys.argv = ['gpt-fast', 'evaluate', '--from', 'x']\n"
        "from gpt_fast_cli.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    refuse(Result(done.returncode, done.stdout, done.stderr), message)
