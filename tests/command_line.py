"""Fixtures `cli` and `data` for the tests that run `gpt-fast`.

Importing torch takes seconds, so command lines run in processes forked from one process that has imported everything.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

SERVER = """
import io, json, os, resource, signal, socket, sys, tempfile, time, traceback
from pathlib import Path
import gpt_fast_cli.__main__, gpt_fast_cli.app
for name in gpt_fast_cli.app.NAMES:
    gpt_fast_cli.app.load_command(name)
import gpt_fast.integrations.nanogpt.folder
import gpt_fast.training.compare, gpt_fast.training.finetune, gpt_fast.training.pretrain
import matplotlib.backends.backend_agg, torchmetrics.classification, torchmetrics.text  # imported late

def happened(watched):  # a path, with so many lines in it
    path, lines = watched
    found = sorted(Path("/").glob(path.lstrip("/")))
    if not found:
        return False
    try:
        return lines == 0 or found[0].read_bytes().count(b"\\n") >= lines
    except FileNotFoundError:
        return False

def start(request, rank, out, err):
    pid = os.fork()
    if pid:
        return pid
    if request["stdin"] is None:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    else:
        piped = tempfile.TemporaryFile()
        piped.write(request["stdin"].encode("utf-8", "surrogateescape"))
        piped.seek(0)
        os.dup2(piped.fileno(), 0)
    sys.stdin = open(0, closefd=False)
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    os.environ.update(request["environment"])
    if request["ranks"]:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(request["ranks"]))
    sys.argv = ["gpt-fast", *request["args"]]
    if request["file_size"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"],) * 2)
    if request["memory"]:
        resource.setrlimit(resource.RLIMIT_AS, (request["memory"],) * 2)
    signal.alarm(request["seconds"])
    code = 0
    try:
        gpt_fast_cli.__main__.main()
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def text(file):
    file.seek(0)
    return file.read().decode()


for line in sys.stdin:
    request = json.loads(line)
    request["environment"] = {}
    if request["ranks"]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            request["environment"] = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    files = [(tempfile.TemporaryFile(), tempfile.TemporaryFile()) for _ in range(request["ranks"] or 1)]
    waiting = {start(request, rank, *pair): rank for rank, pair in enumerate(files)}
    victim = list(waiting)[-1]
    codes = {}
    watched = request["watched"]
    while waiting:
        if watched and happened(watched):
            watched = None
            time.sleep(request["later"])
            done, status = os.waitpid(victim, os.WNOHANG)
            if not done:
                os.kill(victim, request["signal"])
                if request["again"]:
                    time.sleep(0.002)
                    os.kill(victim, request["again"])
                continue
            codes[waiting.pop(done)] = os.waitstatus_to_exitcode(status)
            continue
        done, status = os.waitpid(-1, os.WNOHANG if watched else 0)
        if done:
            codes[waiting.pop(done)] = os.waitstatus_to_exitcode(status)
            if done == victim:
                watched = None
        elif watched:
            time.sleep(0.001)
    outs, errs = ([text(pair[i]) for pair in files] for i in (0, 1))
    codes = [codes[rank] for rank in sorted(codes)]
    print(json.dumps([codes[-1], "".join(outs), "".join(errs), codes]), flush=True)
"""
# PYTEST_* variables are left out: a pytest that a command line starts would take itself for a worker of this one.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "COLUMNS": "200",
    "NO_COLOR": "1",
}
SENTENCES = "".join(f"the {'red' if i % 3 else 'blue'} fox runs {i % 7} times\n" for i in range(300))
SMALL = ["--layers", "1", "--heads", "2", "--dim", "16", "--seq-len", "32", "--batch-size", "4", "--device", "cpu"]


class Result(NamedTuple):
    code: int
    out: str
    err: str
    codes: tuple[int, ...] = ()  # the exit code of each rank


Cli = Callable[..., Result]


@pytest.fixture(scope="session")
def cli() -> Iterator[Cli]:
    """Return a function that runs one command line in its own process.

    `watched` is a path, perhaps with wildcards, and the number of lines that the file must have (0: it must exist).
    When that holds and `later` more seconds have passed, the process gets `signal` and 2 ms later `again`, if set.
    No file can grow past `file_size` bytes. No process can use more than `memory` bytes of address space or run longer
    than `seconds`. `ranks` starts that many processes with the environment variables that torchrun sets. The last rank
    gets the signal, and the result holds its exit code. Standard input is a file with the text `stdin`, or /dev/null.
    """
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    )

    def run(
        *args: object,
        watched: tuple[object, int] | None = None,
        signal: int = 9,
        again: int = 0,
        later: float = 0.0,
        file_size: int = 0,
        memory: int = 0,
        seconds: int = 0,
        ranks: int = 0,
        stdin: str | None = None,
    ) -> Result:
        request = {
            "args": [str(arg) for arg in args], "signal": int(signal), "later": later, "file_size": file_size,
            "memory": memory, "seconds": seconds, "ranks": ranks, "again": int(again), "stdin": stdin,
            "watched": watched and (str(watched[0]), watched[1]),
        }  # fmt: skip
        print(json.dumps(request), file=server.stdin, flush=True)
        return Result(*json.loads(server.stdout.readline()))

    with server:
        yield run
        server.stdin.close()


def succeed(result: Result) -> Result:
    assert result.code == 0, result.err
    assert "Traceback" not in result.err
    return result


class Data(NamedTuple):
    """Files and runs that many tests read. No test may change them."""

    folder: Path
    text: Path
    table: Path
    lm: Path
    mlm: Path
    classifier: Path


@pytest.fixture(scope="session")
def data(cli, tmp_path_factory) -> Data:
    folder = tmp_path_factory.mktemp("data")
    made = Data(folder, *(folder / name for name in ("text.txt", "table.csv", "lm", "mlm", "classifier")))
    made.text.write_text(SENTENCES, encoding="utf-8")
    rows = [f"{line},{'warm' if 'red' in line else 'cold'}" for line in SENTENCES.splitlines()[:60]]
    made.table.write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    pretrain = ["pretrain", "--data", made.text, *SMALL, "--steps", 4]
    succeed(cli(*pretrain, "--out", made.lm, "--tokenizer", "byte"))
    succeed(cli(*pretrain, "--out", made.mlm, "--objective", "mlm", "--tokenizer", "char"))
    succeed(cli("finetune", "--from", made.lm, "--train", made.table, "--out", made.classifier, "--epochs", 1))
    return made
