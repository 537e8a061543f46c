"""Trainings that are killed, stopped, damaged or out of disk space, through `gpt-fast` as users run it."""

import hashlib
import json
import random
import shlex
import shutil
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
    """Return a run that was never interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    succeed(cli(*command, "--out", out))
    return out


def same(run: Path, whole: Path) -> None:
    """Assert that both runs have the same weights bit for bit, and the same files and curve."""
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
    """The run is killed after 8 updates, while it writes the checkpoint of update 15, and after 19 updates."""
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


def test_muon_and_its_schedule_resume_bit_for_bit(cli, command, tmp_path):
    """The run is killed between checkpoints. Resuming needs none of its options again, and refuses other ones."""
    options = ["--optimizer", "muon", "--muon-lr", 1e-2, "--schedule", "wsd", "--decay", 0.5, "--z-loss", 1e-4]
    whole, out = tmp_path / "whole", tmp_path / "run"
    succeed(cli(*command, *options, "--out", whole))
    assert cli(*command, *options, "--out", out, watched=(out / "metrics.jsonl", 12)).code == -signal.SIGKILL
    other = cli("pretrain", "--out", out, "--resume", "--optimizer", "adamw")
    assert other.code == 2 and "--optimizer adamw: the run in" in other.err
    sharded = cli("pretrain", "--out", out, "--resume", "--strategy", "fsdp")
    assert sharded.code == 2 and "--optimizer muon: orthogonalises whole matrices" in sharded.err
    succeed(cli("pretrain", "--out", out, "--resume"))
    same(out, whole)


@pytest.mark.slow
def test_ten_random_kills(cli, command, whole, tmp_path):
    """Each kill comes a random moment after a random line of progress, or while a checkpoint is written."""
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
    """A signal between two checkpoints makes the run write one more at that update, and tell how to resume it."""
    out = tmp_path / "run"
    stopped = cli(*command, "--out", out, watched=(out / "metrics.jsonl", 7), signal=signum)
    assert stopped.code == 128 + signum
    assert "Traceback" not in stopped.err
    step = int((out / "checkpoints" / "latest").read_text().split("-")[1])
    assert step >= 7
    last = stopped.err.splitlines()[-1]
    assert f"stopped by {signal.Signals(signum).name} after update {step}, whose checkpoint is saved" in last
    told = shlex.split(last.partition("; resume: ")[2])
    assert told[:2] == ["gpt-fast", "pretrain"]
    assert f"resuming after update {step} of {STEPS}" in succeed(cli(*told[1:])).err
    same(out, whole)


def test_a_second_signal_tells_what_is_on_disk(cli, command, tmp_path):
    """After a second signal the run writes no more checkpoints. Its last line tells how to resume an earlier one."""
    out = tmp_path / "run"
    stopped = cli(
        *command, "--out", out, watched=(out / "checkpoints" / "step-000000005" / "checkpoint.json", 0),
        signal=signal.SIGTERM, again=signal.SIGTERM,
    )  # fmt: skip
    assert stopped.code == 128 + signal.SIGTERM
    assert "whose checkpoint is saved; resume: gpt-fast pretrain --out" in stopped.err.splitlines()[-1]
    assert "nothing is left" not in stopped.err


def run_of(out: Path) -> dict:
    return json.loads((out / "run.json").read_text())


def test_more_steps_of_a_finished_run(cli, data, whole, tmp_path):
    """The further updates give the same weights, killed and resumed or not. Fewer steps leave the run as it is."""
    runs = [tmp_path / name for name in ("through", "killed")]
    for out in runs:
        shutil.copytree(whole, out)
    succeed(cli("pretrain", "--out", runs[0], "--resume", "--steps", STEPS + 8))
    more = ["--resume", "--steps", STEPS + 8]
    killed = cli("pretrain", "--out", runs[1], *more, watched=(runs[1] / "metrics.jsonl", 27))
    assert killed.code == -signal.SIGKILL
    evaluated = succeed(cli("evaluate", "--from", runs[1], "--data", data.text))
    assert "a stopped run; its weights after update" in evaluated.err
    succeed(cli("pretrain", "--out", runs[1], "--resume"))
    same(runs[1], runs[0])
    assert [run_of(out)["steps"] for out in (*runs, whole)] == [STEPS + 8, STEPS + 8, STEPS]
    steps = [json.loads(line)["step"] for line in (runs[0] / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 9))
    assert "finished" in succeed(cli("pretrain", "--out", runs[0], "--resume")).err
    fewer = cli("pretrain", "--out", runs[0], "--resume", "--steps", STEPS)
    assert fewer.code == 0 and "finished" in fewer.err  # these updates are done already


def test_more_steps_need_a_checkpoint(cli, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints")
    result = cli("pretrain", "--out", out, "--resume", "--steps", STEPS + 8)
    assert result.code == 2
    assert f"is finished and has no checkpoint to resume; expected one, or gpt-fast pretrain --from {out}" in result.err
    assert (out / "run.json").exists()


def test_a_stopped_run_is_generated_from_evaluated_and_trained_from(cli, data, stopped, tmp_path):
    """Each command reads the weights of the last intact checkpoint."""
    arguments = ["--prompt", "the", "--seed", 0, "--max-new-tokens", 12]
    text = succeed(cli("generate", "--from", stopped, *arguments))
    assert "a stopped run; its weights after update 10" in text.err
    damage(shards(stopped)[-1])
    older = succeed(cli("generate", "--from", stopped, *arguments))
    assert "a stopped run; its weights after update 5" in older.err
    assert older.out != text.out
    succeed(cli("evaluate", "--from", stopped, "--data", data.text))
    succeed(cli("pretrain", "--from", stopped, "--data", data.text, "--out", tmp_path / "next", "--steps", 2))
    for shard in shards(stopped)[:-1]:
        damage(shard)
    result = cli("generate", "--from", stopped, *arguments)
    assert result.code == 2 and "no checkpoint is whole" in result.err


def test_equal_runs_write_equal_files(cli, command, whole, tmp_path):
    """model.safetensors is equal byte for byte, so its SHA-256 in run.json tells whether two runs are equal."""
    out = tmp_path / "run"
    succeed(cli(*command, "--out", out))
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert run_of(out)["weights"] == run_of(whole)["weights"]
    content = (out / "model.safetensors").read_bytes()
    assert run_of(out)["weights"] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_changed_weights_are_found(cli, whole, tmp_path):
    """`doctor` and --resume find a flipped bit. Every command that loads weights finds another size."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    assert "finished" in succeed(cli("doctor", out)).out
    damage(out / "model.safetensors")
    for arguments in (["doctor", out], ["pretrain", "--out", out, "--resume"]):
        result = cli(*arguments)
        assert result.code == (1 if arguments[0] == "doctor" else 2)
        assert "SHA-256 is not that in run.json" in (result.out + result.err).replace("\n", " ")
    with (out / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    result = cli("generate", "--from", out)
    assert result.code == 2 and "as run.json says" in result.err


def test_doctor_examines_a_run(cli, stopped):
    found = json.loads(succeed(cli("doctor", stopped, "--json")).out)
    assert found["state"] == "stopped; --resume begins after update 10"
    assert found["checkpoints"] == {"step-000000010": "whole", "step-000000005": "whole"}
    damage(shards(stopped)[-1])
    (stopped.parent / ".other.old-x" / "other").mkdir(parents=True)
    result = cli("doctor", stopped, "--json")
    found = json.loads(result.out)
    assert result.code == 1
    assert found["state"] == "stopped; --resume begins after update 5"
    assert found["checkpoints"]["step-000000010"] == "damaged"
    assert found["leftovers"] == [str(stopped.parent / ".other.old-x")]
    missing = cli("doctor", stopped / "no")
    assert missing.code == 2 and "no such run folder" in missing.err


def test_overwrite_killed_before_its_first_checkpoint(cli, command, whole, tmp_path):
    """The next command, whichever it is, restores the run that --overwrite replaced."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    killed = cli(*command, "--out", out, "--overwrite", watched=(tmp_path / ".run.old-*" / "run", 0))
    assert killed.code == -signal.SIGKILL
    assert not (out / "run.json").exists()
    result = succeed(cli(*command, "--out", out, "--resume"))
    assert "the run that --overwrite replaced is back" in result.err and "finished" in result.err
    same(out, whole)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    killed = cli(*command, "--out", out, "--overwrite", watched=(tmp_path / ".run.old-*" / "run", 0))
    assert "is back" in succeed(cli("generate", "--from", out, "--max-new-tokens", 2)).err
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
    """Return a run that was killed after its second checkpoint."""
    out = tmp_path / "run"
    assert cli(*command, "--out", out, watched=(out / "metrics.jsonl", 12)).code == -signal.SIGKILL
    return out


def damage(path: Path) -> None:
    """Flip a bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def shards(out: Path) -> list[Path]:
    return sorted(out.glob("checkpoints/step-*/*.safetensors"))


def test_a_damaged_checkpoint_is_passed_over(cli, command, whole, stopped):
    newest = shards(stopped)[-1]
    damage(newest)
    resumed = succeed(cli(*command, "--out", stopped, "--resume"))
    assert f"{newest.name}: damaged" in resumed.err
    assert "resuming after update 5 of" in resumed.err
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
        (["--steps", 20], "began with 24; expected 24 or more"),
        (["--objective", "mlm"], "--objective mlm: the run in"),
    ],
)
def test_resume_with_other_settings(cli, command, stopped, changed, message):
    result = cli(*command, *changed, "--out", stopped, "--resume")
    assert result.code == 2
    assert message in result.err


def test_what_is_not_given_again_is_as_it_was(cli, command, whole, tmp_path):
    """A resumed run keeps the options that only its first command names."""
    out, other = tmp_path / "run", tmp_path / "other"
    given = ["--lr", 5e-3, "--beta2", 0.9, "--warmup", 3]
    succeed(cli(*command, *given, "--out", other))
    assert cli(*command, *given, "--out", out, watched=(out / "metrics.jsonl", 12)).code == -signal.SIGKILL
    succeed(cli(*command, "--out", out, "--resume"))
    same(out, other)
    assert not torch.equal(*(load_file(run / "model.safetensors")["trunk.token_emb.weight"] for run in (out, whole)))


def test_resume_with_other_data(cli, command, data, stopped, tmp_path):
    """The data file has the name in settings.yaml, but another text than when the run began."""
    settings = stopped / "settings.yaml"
    other = tmp_path / "other.txt"
    other.write_text(data.text.read_text().replace("red", "sad"))
    settings.write_text(settings.read_text().replace(str(data.text), str(other)))
    result = cli(*command[:2], other, *command[3:], "--out", stopped, "--resume")
    assert result.code == 2
    assert "began on other data" in result.err


def test_a_full_disk(cli, command, tmp_path):
    """No file can grow beyond 40 kB, which a checkpoint needs. The command reports it and leaves nothing."""
    result = cli(*command, "--out", tmp_path / "run", file_size=40_000)
    assert result.code == 2
    assert "checkpoint cannot be written" in result.err
    assert "Traceback" not in result.err
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_later(cli, command, whole, stopped):
    """The earlier checkpoints stay, and the run resumes from them once there is room."""
    before = sorted(stopped.glob("checkpoints/*"))
    result = cli(*command, "--out", stopped, "--resume", file_size=40_000)
    assert result.code == 2
    assert "checkpoint cannot be written" in result.err
    assert sorted(stopped.glob("checkpoints/*")) == before
    succeed(cli(*command, "--out", stopped, "--resume"))
    same(stopped, whole)


def test_fine_tuning_killed_and_resumed(cli, data, tmp_path):
    """The best weights so far survive a kill, too."""
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
    records = [run_of(folder) for folder in (out, whole)]
    for record in records:
        record.pop("seconds")
    assert records[0] == records[1]
    # A stopped classifier can be evaluated, and a finished one trained for more epochs.
    other = tmp_path / "other"
    assert cli(*command, "--out", other, watched=(other / "metrics.jsonl", 9)).code == -signal.SIGKILL
    assert "a stopped run" in succeed(cli("evaluate", "--from", other, "--data", data.table)).err
    for lines in (None, len((out / "metrics.jsonl").read_text().splitlines()) + 3):
        folder = out if lines is None else whole
        watched = {} if lines is None else {"watched": (folder / "metrics.jsonl", lines)}
        cli("finetune", "--from", data.lm, "--out", folder, "--resume", "--epochs", 8, **watched)
        succeed(cli("finetune", "--from", data.lm, "--out", folder, "--resume"))
    same(out, whole)
    assert run_of(out)["epochs"] == run_of(whole)["epochs"] == 8
