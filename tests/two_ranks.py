"""Run a script as two ranks over gloo, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(script: str, folder: Path) -> None:
    """Run `script RANK STORE` for ranks 0 and 1; each has to end with the line "done". `folder` holds the store."""
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
