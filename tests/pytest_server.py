"""Run pytest in processes forked from one that has already imported the slow modules.

    python -m tests.pytest_server

The server reads lines of JSON: {"arguments": [...], "limit": seconds for one test, "environment": {...}}. It answers
each with a line of JSON: [exit code, output, the last test that ran]. The exit code of a process that signal n killed
is -n. A test that runs beyond the limit ends its process, and the output then contains "Timeout". Hypothesis draws the
same examples every time and does not simplify examples that fail.
"""

import faulthandler
import json
import os
import sys
import tempfile

import hypothesis
import pytest
import torch
import torch._dynamo  # noqa: F401  loaded before the fork


class Watch:
    """Pytest plugin that writes the name of the running test to a file and ends the process at the time limit.

    The watchdog is a C thread, which works even while a kernel never returns.
    """

    def __init__(self, limit: float, current: int) -> None:
        self.limit, self.current = limit, current
        self.output = os.dup(1)  # pytest redirects file descriptors 1 and 2
        self.pytest_runtest_logstart("")  # imports and collection count too

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        os.ftruncate(self.current, 0)
        os.pwrite(self.current, nodeid.encode(), 0)
        faulthandler.dump_traceback_later(self.limit, exit=True, file=self.output)


def run(arguments: list[str], limit: float, current: int) -> int:
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("mutants", derandomize=True, database=None, phases=phases)
    hypothesis.settings.load_profile("mutants")
    return int(pytest.main(arguments, plugins=[Watch(limit, current)]))


def serve(arguments: list[str], limit: float, environment: dict[str, str]) -> tuple[int, str, str]:
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as current:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ.update(environment)
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                code = run(arguments, limit, current.fileno())
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        texts = []
        for file in (output, current):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
        return os.waitstatus_to_exitcode(status), *texts


if __name__ == "__main__":
    assert torch.get_num_threads() == 1, "threads would not survive the fork: set OMP_NUM_THREADS=1"
    for line in sys.stdin:
        print(json.dumps(serve(**json.loads(line))), flush=True)
