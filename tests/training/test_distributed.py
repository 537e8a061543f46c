"""Several processes on the CPU with gloo: equal curves, checkpoints for any number of ranks, a rank that dies."""

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gpt_fast.training.engine.distributed import World
from gpt_fast.training.runs import checkpoints
from tests import two_ranks
from tests.command_line import ENVIRONMENT, SMALL, succeed

STEPS = 9


@pytest.fixture(scope="module")
def command(data) -> list[object]:
    return [
        "pretrain", "--data", data.text, "--tokenizer", "byte", *SMALL, "--batch-size", 8, "--steps", STEPS,
        "--log-every", 1, "--checkpoint-every", 3,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def alone(cli, command, tmp_path_factory) -> dict[str, Path]:
    """Return the run of one process for each objective."""
    folder = tmp_path_factory.mktemp("alone")
    for objective in ("clm", "mlm"):
        succeed(cli(*command, "--objective", objective, "--out", folder / objective))
    return {objective: folder / objective for objective in ("clm", "mlm")}


def curve(run: Path) -> list[list[float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [[line[name] for name in ("train_loss", "grad_norm", "valid_loss")] for line in lines]


def same(run: Path, wanted: Path) -> None:
    """Assert that curves and weights agree within the rounding of float32."""
    torch.testing.assert_close(torch.tensor(curve(run)), torch.tensor(curve(wanted)), rtol=1e-5, atol=1e-6)
    weights, others = (load_file(folder / "model.safetensors") for folder in (run, wanted))
    assert weights.keys() == others.keys()
    for name, tensor in others.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    ("strategy", "ranks", "options"),
    [
        ("ddp", 2, ["--accumulate", 2]),
        ("ddp", 4, ["--objective", "mlm"]),
        ("fsdp", 2, ["--objective", "mlm", "--accumulate", 2]),
        ("fsdp", 4, ["--checkpoint-activations"]),
        ("ddp", 2, ["--pack"]),
    ],
)
def test_the_curve_of_one_process(cli, command, alone, tmp_path, strategy, ranks, options):
    """Each strategy, number of ranks and division of a batch gives the curve, with masks of unequal parts too."""
    out, wanted = tmp_path / "run", alone["mlm" if "mlm" in options else "clm"]
    if "--pack" in options:
        wanted = tmp_path / "alone"
        succeed(cli(*command, *options, "--out", wanted))
    result = succeed(cli(*command, *options, "--strategy", strategy, "--out", out, ranks=ranks))
    assert result.codes == [0] * ranks
    same(out, wanted)
    assert result.out.count("validation loss") == 1  # rank 0 alone prints
    assert result.err.count("unigram entropy of") == 1
    assert (json.loads((out / "run.json").read_text())["ranks"]) == ranks


def test_muon_on_two_ranks(cli, command, tmp_path):
    """The curve is that of one process within 2^-8, as Muon computes its products in bfloat16."""
    options = ["--optimizer", "muon", "--lr", 1e-3]
    succeed(cli(*command, *options, "--out", tmp_path / "alone"))
    result = succeed(cli(*command, *options, "--strategy", "ddp", "--out", tmp_path / "run", ranks=2))
    assert result.codes == [0, 0]
    got, wanted = (torch.tensor(curve(tmp_path / name)) for name in ("run", "alone"))
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-5, atol=1e-6)  # before any of Muon's steps
    torch.testing.assert_close(got, wanted, rtol=2**-8, atol=0)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision(cli, command, alone, tmp_path, precision):
    """FSDP2 computes in 16 bits and sums gradients in 32. Its curve is that of float32 within 1 %."""
    out = tmp_path / "run"
    succeed(cli(*command, "--strategy", "fsdp", "--precision", precision, "--out", out, ranks=2))
    got, wanted = torch.tensor(curve(out)), torch.tensor(curve(alone["clm"]))
    torch.testing.assert_close(got, wanted, rtol=0.01, atol=0)
    assert not torch.equal(got, wanted)
    assert load_file(out / "model.safetensors")["trunk.token_emb.weight"].dtype == torch.float32


def test_each_rank_draws_its_own_dropout(cli, command, tmp_path):
    succeed(cli(*command, "--dropout", 0.3, "--strategy", "ddp", "--out", tmp_path / "run", ranks=2))
    path = next(checkpoints.newest_first(tmp_path / "run" / "checkpoints"))
    stored: dict[str, torch.Tensor] = {}
    for shard in path.glob("*.safetensors"):
        stored |= load_file(shard)
    states = [stored[f"random.cpu.{rank}"] for rank in range(2)]
    assert not torch.equal(*states)


@pytest.mark.parametrize(("first", "then"), [("fsdp", "ddp"), ("ddp", "fsdp")])
def test_resuming_on_another_number_of_ranks(cli, command, alone, tmp_path, first, then):
    """A signal stops four ranks, two ranks resume and are stopped, and one process finishes the run."""
    out = tmp_path / "run"
    stopped = cli(
        *command, "--strategy", first, "--out", out, ranks=4, watched=(out / "metrics.jsonl", 2), signal=signal.SIGTERM
    )
    assert stopped.codes == [143] * 4, stopped.err
    again = cli(
        *command, "--strategy", then, "--out", out, "--resume", ranks=2, watched=(out / "metrics.jsonl", 6),
        signal=signal.SIGTERM,
    )  # fmt: skip
    assert again.codes == [143] * 2, again.err
    assert again.err.count("resuming after update") == 1
    succeed(cli(*command, "--out", out, "--resume"))
    same(out, alone["clm"])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_rank_that_dies(cli, command, alone, tmp_path, strategy):
    """The other rank ends with the reason. A restart resumes from the last checkpoint."""
    out = tmp_path / "run"
    died = cli(*command, "--strategy", strategy, "--out", out, ranks=2, watched=(out / "metrics.jsonl", 5))
    assert died.codes == [2, -signal.SIGKILL]
    assert "rank 0: the connection to another rank broke" in died.err
    assert "Traceback" not in died.err
    assert "resuming after update 3" in succeed(
        cli(*command, "--strategy", strategy, "--out", out, "--resume", ranks=2)
    ).err  # fmt: skip
    same(out, alone["clm"])


def test_gradients_meet_once_an_update():
    """DDP and FSDP sum gradients over ranks only in the last part of a batch."""
    told: list[object] = []

    class Parallel:
        @contextmanager
        def no_sync(self):
            told.append("no_sync")
            yield

        def set_requires_gradient_sync(self, wanted):
            told.append(wanted)

    for strategy in ("ddp", "fsdp"):
        world = World(0, 2, strategy)
        for last in (False, False, True):
            with world.synchronised(Parallel(), last):
                pass
    assert told == ["no_sync", "no_sync", False, False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--strategy", "ddp", "--batch-size", 9],
            "--batch-size 9: cannot be divided evenly among 1 parts on each of 2",
        ),
        ([], "torchrun started 2 processes; say how they share the work: --strategy ddp or fsdp"),
        (["--strategy", "fsdp", "--optimizer", "muon"], "--optimizer muon: orthogonalises whole matrices"),
        (["--strategy", "ddp", "--steps", 0], "--steps 0: expected at least 1"),
        (["--stratgy", "ddp"], "--stratgy: no such option; did you mean '--strategy'?"),
    ],
)
def test_what_several_ranks_refuse(cli, command, tmp_path, options, message):
    """The error comes once, and not from each rank."""
    refused = cli(*command, *options, "--out", tmp_path / "run", ranks=2)
    assert refused.codes == [2, 2]
    assert refused.err.count("gpt-fast: ") == 1 and message in refused.err
    assert "Traceback" not in refused.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lora-rank", 2, "--strategy", "fsdp"], "--strategy fsdp: --lora-rank 2 trains an adapter"),
        (["--freeze", "9", "--strategy", "ddp"], "--freeze 9: "),
        (["--metric", "mse", "--strategy", "ddp"], "mse: classification does not measure it"),
    ],
)
def test_what_several_ranks_of_a_fine_tuning_refuse(cli, data, tmp_path, options, message):
    command = ["finetune", "--from", data.lm, "--train", data.table, "--out", tmp_path / "run"]
    refused = cli(*command, *options, ranks=2)
    assert refused.codes == [2, 2]
    assert refused.err.count("gpt-fast: ") == 1 and message in refused.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("strategy", "task", "close"),
    [("ddp", "generation", 1e-4), ("fsdp", "generation", 1e-4), ("ddp", "classification", 0.1)],
)
def test_fine_tuning(cli, data, tmp_path, strategy, task, close):
    """The curve and the best weights are those of one process.

    54 rows come in batches of 53, so that every other update has fewer rows than parts. A classifier's dropout differs
    from rank to rank.
    """
    command = [
        "finetune", "--from", data.lm, "--train", data.table, "--task", task, "--text-column", "text", "--label-column",
        "label", "--epochs", 3, "--batch-size", 53, "--lr", 3e-3, "--accumulate", 2, "--log-every", 1,
    ]  # fmt: skip
    alone, out = tmp_path / "alone", tmp_path / "run"
    succeed(cli(*command, "--out", alone))
    result = cli(*command, "--strategy", strategy, "--out", out, ranks=2)
    assert result.codes == [0, 0], result.err
    lines, others = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (out, alone)
    )
    for field in ("step", "train_loss", "valid_loss"):
        assert [line[field] for line in lines] == pytest.approx([line[field] for line in others], rel=close), field
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    if task == "generation":
        weights, wanted = (load_file(folder / "model.safetensors") for folder in (out, alone))
        for name, tensor in wanted.items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=2e-5)
    record = json.loads((out / "run.json").read_text())
    assert (record["ranks"], record["strategy"]) == (2, strategy)
    assert result.out.count("fine-tuned, on held-out rows") == 1  # rank 0 alone prints


@pytest.mark.slow
def test_torchrun(command, alone, tmp_path):
    """The command that users type trains. torchrun ends all ranks when it loses one."""
    out = tmp_path / "run"
    torchrun = [Path(sys.executable).parent / "torchrun", "--nproc-per-node", "2", "--master-port", "29611", "-m"]
    line = list(map(str, [*torchrun, "gpt_fast_cli", *command, "--strategy", "fsdp", "--out", out]))
    child = subprocess.Popen(line, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    lines = 0
    while lines < 4:
        lines = (out / "metrics.jsonl").read_bytes().count(b"\n") if (out / "metrics.jsonl").exists() else 0
        assert child.poll() is None
    ranks = subprocess.run(["pgrep", "-P", str(child.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    _, errors = child.communicate(timeout=120)
    assert child.returncode != 0
    assert "SIGKILL" in errors or "Signal 9" in errors
    subprocess.run([*line, "--resume"], env=ENVIRONMENT, check=True, timeout=240)
    same(out, alone["clm"])


def test_no_reducer_outlives_its_group(tmp_path):
    """An error's traceback may keep DDP's module alive. A reducer that is freed after its group may hang."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    two_ranks.run(
        f"""
import os, sys, torch
rank = sys.argv[1]
os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="{port}")
from gpt_fast.training.engine import distributed

with distributed.world("ddp", "cpu") as joined:
    model = joined.wrap(torch.nn.Linear(3, 3), torch.float32)
    model(torch.ones(2, 3)).sum().backward()
    assert model.reducer is not None
assert model.reducer is None and model.logger is None
print("done")
""",
        tmp_path,
    )
