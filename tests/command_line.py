"""The fixtures `cli` and `data` of the tests that run `gpt-fast`.

Importing torch takes seconds, so most command lines run in processes forked from one that has imported everything.
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
import io, json, os, resource, sys, tempfile, time, traceback
from pathlib import Path
import gpt_fast.commands, gpt_fast.cli
import gpt_fast.training.compare, gpt_fast.training.finetune, gpt_fast.training.pretrain

def happened(watched):  # a path, with so many lines in it
    path, lines = watched
    found = sorted(Path("/").glob(path.lstrip("/")))
    if not found:
        return False
    try:
        return lines == 0 or found[0].read_bytes().count(b"\\n") >= lines
    except FileNotFoundError:
        return False

for line in sys.stdin:
    request = json.loads(line)
    out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    pid = os.fork()
    if pid == 0:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.argv = ["gpt-fast", *request["args"]]
        if request["file_size"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"],) * 2)
        code = 0
        try:
            gpt_fast.cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    done = 0
    while request["watched"] and not done:
        if happened(request["watched"]):
            time.sleep(request["later"])
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done:
                os.kill(pid, request["signal"])
            break
        time.sleep(0.001)
        done, status = os.waitpid(pid, os.WNOHANG)
    if not done:
        _, status = os.waitpid(pid, 0)
    texts = []
    for file in (out, err):
        file.seek(0)
        texts.append(file.read().decode())
    print(json.dumps([os.waitstatus_to_exitcode(status), *texts]), flush=True)
"""
ENVIRONMENT = os.environ | {
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


Cli = Callable[..., Result]


@pytest.fixture(scope="session")
def cli() -> Iterator[Cli]:
    """Runs one command line in a process of its own: with `watched` (a path, perhaps with wildcards, and how many lines
    it must have) the process gets `signal` as soon as that is there and `later` seconds have passed; no file can grow
    past `file_size`."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    )

    def run(
        *args: object,
        watched: tuple[object, int] | None = None,
        signal: int = 9,
        later: float = 0.0,
        file_size: int = 0,
    ) -> Result:
        request = {
            "args": [str(arg) for arg in args], "signal": int(signal), "later": later, "file_size": file_size,
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
    """Files and runs that the tests read and none may change."""

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
