"""Readers compare the sizes of their inputs with the memory that is left before they take any.

The inputs are sparse files, endless rows, archives that unpack to more, and long texts.
"""

import gzip
import json
import platform
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from gpt_fast import _memory
from gpt_fast.data import tables
from tests.command_line import ENVIRONMENT

ROOM = 600 << 20  # bytes that the child may take
TEXT = "lorem ipsum dolor sit amet, " * (1 << 15)  # 0.9 MB
ROW = "a row of more than 67,108,864 bytes; expected fewer"
MUCH = "of text or more, held in memory with its tokens; expected at most"
PREPARE = "gpt-fast prepare makes token files of any amount"

# Process whose address space may grow by ROOM. It reads each file, encodes a text, and prints errors and growth.
CHILD = """
import json, os, resource, sys, warnings
from pathlib import Path
from gpt_fast.data import batches, corpus, prepare, tables, tokenizer
room, folder = int(sys.argv[1]), Path(sys.argv[2])
used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (used + room,) * 2)

def prepared(path):
    options = prepare.PrepareSettings(folder / "out", (str(path),), tokenizer="byte")
    prepare.prepare(options, lambda *_: None, lambda _: None)

readers = {
    "pretrain": lambda path: corpus.read_corpus([path]), "evaluate": corpus.read_documents,
    "finetune": lambda path: tables.read_table(path), "prepare": prepared,
}
found = {}
for command, name in json.loads(sys.argv[3]):
    try:
        readers[command](folder / name)
        found[f"{command} {name}"] = "no error"
    except ValueError as error:
        found[f"{command} {name}"] = str(error)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
text = "lorem ipsum dolor sit amet, " * 100_000
stream = batches.text_stream(tokenizer.byte_tokenizer(), [text], 258)
assert len(stream) == len(text) + 1
found["growth"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before >> 10
print(json.dumps(found))
"""


def sparse(path: Path, begin: bytes, size: int) -> None:
    with path.open("wb") as file:
        file.write(begin)
        file.truncate(size)


def make(folder: Path) -> None:
    sparse(folder / "sparse.txt", b"words ", 20 << 30)
    sparse(folder / "line.jsonl", b'{"text": "a"}\n{"text": "', 3 << 30)
    sparse(folder / "line.csv", b"text,label\na,b\n", 20 << 30)
    sparse(folder / "quoted.tsv", b'text\tlabel\n"a', 3 << 30)
    sparse(folder / "array.json", b'[{"text": "a', 20 << 30)
    sparse(folder / "object.json", b'{\n"data": [', 20 << 30)
    row = json.dumps({"text": TEXT, "label": 1}) + "\n"
    with gzip.open(folder / "bomb.txt.gz", "wt", 1) as text, gzip.open(folder / "bomb.jsonl.gz", "wt", 1) as rows:
        for _ in range(100):
            text.write(TEXT)
            rows.write(row)
    with zipfile.ZipFile(folder / "bomb.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("rows.jsonl", row * 100)


CASES = {
    ("pretrain", "sparse.txt"): ("sparse.txt: 21.5 GB", MUCH, PREPARE),
    ("evaluate", "sparse.txt"): ("sparse.txt: 21.5 GB", MUCH, PREPARE),
    ("prepare", "sparse.txt"): ("sparse.txt: has a NUL byte (byte 6)",),
    ("pretrain", "line.jsonl"): (f"line.jsonl, line 2: {ROW}",),
    ("prepare", "line.jsonl"): (f"line.jsonl, line 2: {ROW}",),
    ("finetune", "line.csv"): (f"line.csv, line 3: {ROW}",),
    ("pretrain", "line.csv"): (f"line.csv, line 3: {ROW}",),
    ("finetune", "quoted.tsv"): (f"quoted.tsv, line 2: {ROW}",),
    ("finetune", "array.json"): (f"array.json, row 1: {ROW}",),
    ("pretrain", "array.json"): (f"array.json, row 1: {ROW}",),
    ("finetune", "object.json"): ("object.json: one JSON value of more than 268,435,456 bytes; expected a row on",),
    ("pretrain", "bomb.txt.gz"): ("bomb.txt.gz: ", MUCH, PREPARE),
    ("evaluate", "bomb.jsonl.gz"): ("bomb.jsonl.gz: ", MUCH, PREPARE),
    ("pretrain", "bomb.zip"): ("bomb.zip/rows.jsonl: ", MUCH, PREPARE),
    ("finetune", "bomb.jsonl.gz"): ("bomb.jsonl.gz, line ", MUCH, "a part of the rows may be enough"),
}


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("hostile")
    make(folder)
    command = [sys.executable, "-c", CHILD, str(ROOM), str(folder), json.dumps(list(CASES))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is limited and read as Linux does")


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_files_that_are_larger_than_the_memory(told, case):
    """In a process with 600 MB the error names the file, and the row or a remedy."""
    for words in CASES[case]:
        assert words in told[" ".join(case)]


def test_a_long_text_is_not_encoded_whole(told):
    """2.8 MB of text take less than 100 MB. Encoded whole they took 530 MB, 190 bytes for each byte."""
    assert told["growth"] < 100


@pytest.mark.parametrize(("text", "size"), [("abc", 3), ("é", 2), ("日本", 6), ("😀", 4), ("\ud800", 1), ("", 0)])
def test_a_text_counts_by_its_bytes(text, size):
    assert _memory.utf8_size(text) == size


def test_a_table_of_other_scripts_counts_by_its_bytes(tmp_path, monkeypatch):
    """20,000 characters of three bytes each, where there is room for 50,000 bytes."""
    monkeypatch.setattr(tables, "available", lambda: 50_000 * tables._COST)
    for letter, refused in (("a", False), ("日", True)):
        path = tmp_path / f"{refused}.jsonl"
        path.write_text(json.dumps({"text": letter * 20_000, "label": "b"}) + "\n", "utf-8")
        if refused:
            with pytest.raises(ValueError, match="line 1: 0.1 MB of text or more"):
                tables.read_table(path)
        else:
            assert len(tables.read_table(path)) == 1


GROUPS = {
    "version 2": ("0::/user/job\n", {
        "sys/fs/cgroup/user/job/memory.max": "max\n", "sys/fs/cgroup/user/job/memory.current": "100\n",
        "sys/fs/cgroup/user/memory.max": "5000\n", "sys/fs/cgroup/user/memory.current": "3000\n",
        "sys/fs/cgroup/user/memory.stat": "anon 1\ninactive_file 500\nactive_file 300\n",
    }, 2800),
    "version 1": ("3:cpu:/a\n2:memory:/a\n0::/\n", {
        "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "4000\n",
        "sys/fs/cgroup/memory/a/memory.usage_in_bytes": "3500\n",
        "sys/fs/cgroup/memory/a/memory.stat": "total_inactive_file 100\ninactive_file 900\n",
    }, 600),
    "full": ("0::/\n", {
        "sys/fs/cgroup/memory.max": "1000\n", "sys/fs/cgroup/memory.current": "2000\n",
    }, 0),
    "no group": ("0::/\n", {}, 7 << 10),
}  # fmt: skip


@pytest.mark.parametrize("name", GROUPS)
def test_available_memory(tmp_path, name):
    """The result is the least of the machine's memory and each control group's. A group's page cache counts as free."""
    groups, files, expected = GROUPS[name]
    for path, content in {
        "proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   7 kB\n",
        "proc/self/cgroup": groups,
        **files,
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content)
    assert _memory.available(tmp_path) == expected


# Prints how many pages the system clears for ten tensors of 32 MB, each freed before the next. The first twenty tensors
# let the heap grow, because glibc puts an aligned block only where there is a little more room than it takes.
TEN_TENSORS = """
import resource, sys, torch
from gpt_fast import _memory
if sys.argv[1] == "kept": assert _memory.keep_freed()
for _ in range(20): torch.zeros(8 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10): torch.zeros(8 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_freed_memory_is_kept():
    """Without the setting every tensor takes new pages. With it almost none are taken."""
    faults = {
        how: int(subprocess.run([sys.executable, "-c", TEN_TENSORS, how], check=True, capture_output=True).stdout)
        for how in ("given back", "kept")
    }
    pages = (32 << 20) // resource.getpagesize()
    assert faults["given back"] > 5 * pages > 50 * faults["kept"]
