"""Run a script as two ranks over gloo, each in its own process."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(script: str, folder: Path) -> None:
    """Run the Python text `script` with arguments RANK and STORE for ranks 0 and 1. Each must print "done" at its end.

    STORE is a file in `folder`.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank), str(folder / "store")], cwd=ROOT, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for rank in ranks:
        output, _ = rank.communicate(timeout=300)
        assert rank.returncode == 0 and output.endswith("done\n"), output[-3000:]
