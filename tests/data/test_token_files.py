"""Token files: ours, llm.c's and nanoGPT's; their preparation from text; training from them."""

import gzip
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from gpt_fast.data import prepare, sources, token_files
from gpt_fast.data import tokenizer as tok
from gpt_fast.data.stream import TokenStream
from tests.command_line import ENVIRONMENT, SMALL, succeed

TEXT = "def f(x):\n    return x  # naïve — 日本\n\n\nclass A:\n\tpass\n \nx = 1\n" * 40


def ignore(*_: object) -> None:
    """Stand in for a display."""


def make(out: Path, *data: object, valid: tuple = (), **options) -> dict:
    given = {"tokenizer": "byte"} | options
    settings = prepare.PrepareSettings(out, tuple(map(str, data)), tuple(map(str, valid)), **given)
    return prepare.prepare(settings, ignore, ignore)


def texts(path: Path, tokenizer) -> list[str]:
    """Return the documents of a token file."""
    ids = token_files.read_token_file(path).tokens[:].tolist()
    start = tok.special_ids(tokenizer)["start_token"]
    assert ids[0] == start
    documents: list[list[int]] = []
    for token in ids:
        if token == start:
            documents.append([])
        else:
            documents[-1].append(token)
    return [tok.decode(tokenizer, document) for document in documents]


# --- the format ---


def written(path: Path, count: int = 1000, dtype: str = "uint16") -> Path:
    pieces = [np.arange(i, min(i + 300, count)) % 250 for i in range(0, count, 300)]
    token_files.write_token_file(path, pieces, dtype, tok.byte_tokenizer(), 258)
    return path


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_token_file_comes_back(tmp_path, dtype):
    file = token_files.read_token_file(written(tmp_path / "a.bin", dtype=dtype))
    assert file.tokens[:].tolist() == (np.arange(1000) % 250).tolist()
    assert (file.header["dtype"], file.header["count"], file.header["document_token"]) == (dtype, 1000, 258)
    token_files.check_vocabulary(file, tok.byte_tokenizer())
    token_files.check_content(file, tok.byte_tokenizer())
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def read_checked(path: Path, tokenizer=None, raw_dtype: str | None = None) -> token_files.TokenFile:
    file = token_files.read_token_file(path, raw_dtype)
    token_files.check_vocabulary(file, tokenizer or tok.byte_tokenizer())
    token_files.check_content(file, tokenizer or tok.byte_tokenizer())
    return file


@pytest.mark.parametrize("change", ["cut off", "added to", "flipped", "vocabulary"])
def test_a_damaged_token_file(tmp_path, change):
    path = written(tmp_path / "a.bin")
    content = bytearray(path.read_bytes())
    tokenizer = tok.byte_tokenizer()
    if change == "cut off":
        content, message = content[:-2], "cut off or added to"
    elif change == "added to":
        content, message = content + b"\0\0", "cut off or added to"
    elif change == "flipped":
        content[1024 + 500] ^= 1
        message = "damaged, its ids have the checksum"
    else:
        tokenizer, message = tok.char_tokenizer(["abc"]), "made with another vocabulary"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.bin: .*{message}"):
        read_checked(path, tokenizer)


def test_any_flipped_bit_of_a_header_is_found(tmp_path):
    """All 8,192 bits are tried, in the magic and the padding too. --raw-dtype does not make the file a raw one."""
    path = written(tmp_path / "a.bin")
    content = path.read_bytes()[:1024]
    with path.open("r+b", buffering=0) as file:
        for bit in range(8 * 1024):
            byte = bit // 8
            os.pwrite(file.fileno(), bytes([content[byte] ^ 1 << bit % 8]), byte)
            with pytest.raises(ValueError, match=r"a\.bin: its header is damaged; expected one whose checksum"):
                token_files.read_token_file(path)
            if byte < 32:  # the magic, and the text that identifies our files without it
                with pytest.raises(ValueError, match=r"--raw-dtype uint16: .*a\.bin has a header of gpt-fast"):
                    token_files.read_token_file(path, "uint16")
            os.pwrite(file.fileno(), content[byte : byte + 1], byte)
    read_checked(path)


def test_an_older_token_file_names_the_command_that_remakes_it(tmp_path):
    header = b'gptfast1{"dtype": "uint16", "count": 4, "crc32": 1, "vocabulary": "", "document_token": 1}'
    (tmp_path / "train.bin").write_bytes(header.ljust(1024) + bytes(8))
    (tmp_path / "data.json").write_text('{"data": ["my books"]}')
    with pytest.raises(
        ValueError, match=r"train\.bin: .*header has no checksum.*prepare --data 'my books' --tokenizer"
    ):
        token_files.read_token_file(tmp_path / "train.bin")


def llmc(path: Path, ids: np.ndarray, magic: int = 20240520, version: int = 1, dtype: str = "<u2") -> Path:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids)
    path.write_bytes(header.tobytes() + ids.astype(dtype).tobytes())
    return path


def test_foreign_token_files_are_read_as_what_they_are(tmp_path):
    """The headers identify llm.c's two versions. Files without a header have the given type."""
    ids = np.arange(3000) % 256
    (tmp_path / "16.bin").write_bytes(ids.astype("<u2").tobytes())
    (tmp_path / "32.bin").write_bytes(ids.astype("<u4").tobytes())
    for path, raw_dtype in (
        (llmc(tmp_path / "gpt2.bin", ids), None),
        (llmc(tmp_path / "llama.bin", ids, 20240801, 7, "<u4"), None),
        (tmp_path / "16.bin", "uint16"),
        (tmp_path / "32.bin", "uint32"),
    ):
        file = read_checked(path, raw_dtype=raw_dtype)
        assert file.header is None
        assert np.array_equal(file.tokens, ids)


def head(*words: int, ids: bytes = b"") -> bytes:
    """Return a file whose header by llm.c begins with `words`."""
    return np.array([*words, *[0] * (256 - len(words))], "<i4").tobytes() + ids


IDS = (np.arange(100) % 90).astype("<u2").tobytes()
NO_TOKEN_FILES = {
    "cut off": (head(20240520, 1, 100, ids=IDS[:-2]), None, "1,222 bytes; expected 1,224 by its header"),
    "half a header": (head(20240520, 1, 100)[:600], None, "600 bytes; expected a header of 1024 by llm.c"),
    "version": (head(20240520, 2, 100, ids=IDS), None, "llm.c's version 2; expected 1 \\(uint16\\)"),
    "llama version": (head(20240801, 1, 100, ids=IDS), None, "llm.c's version 1; expected 7 \\(uint32\\)"),
    "llama as uint16": (head(20240801, 7, 100, ids=IDS), None, "1,224 bytes; expected 1,424"),
    "negative count": (head(20240520, 1, -100, ids=IDS), None, "damaged \\(count -100\\)"),
    "padding": (head(20240520, 1, 100, 0, 7, ids=IDS), None, "its header by llm.c is damaged"),
    "evaluation": (head(20240522, 1, 100), None, "a data set for evaluation, by llm.c; expected a token file"),
    "model": (head(20240326, 3, 1024), None, "a model file, by llm.c; expected a token file"),
    "llama model": (head(20240803, 3, 1024), None, "a Llama 3 model, by llm.c; expected a token file"),
    "tokenizer": (head(20240328, 2, 1024), None, "a tokenizer, by llm.c; expected a token file"),
    "optimizer": (head(20240527, 1), None, "an optimizer state; .*by llm.c; expected a token file"),
    "debug state": (head(20240327, 2), None, "a debug state, by llm.c; expected a token file"),
    "flipped magic": (head(20240520 ^ 64, 1, 100, ids=IDS), None, "without a header .*or --raw-dtype uint16"),
    "no header": (IDS, None, "200 bytes without a header of gpt-fast or llm.c; expected one, or --raw-dtype uint16"),
    "zeros": (bytes(6000), None, "6,000 bytes without a header"),
    "zeros as raw": (bytes(6000), "uint16", "all 3,000 ids are 0; expected the tokens of a text"),
    "zeros behind a header": (head(20240520, 1, 50, ids=bytes(100)), None, "all 50 ids are 0"),
    "odd": (b"abc", "uint16", "3 bytes; expected a multiple of 2 for uint16"),
    "odd uint32": (IDS[:-2], "uint32", "198 bytes; expected a multiple of 4 for uint32"),
    "empty": (b"", "uint16", "0 bytes; expected a multiple of 2"),
    "empty without an option": (b"", None, "0 bytes without a header"),
    "uint32 as uint16": (np.arange(100, dtype="<u4").tobytes(), "uint16", "as in a file of uint32; expected uint16"),
    "uint16 as uint32": (IDS, "uint32", "holds the id \\d{7}, .*the type of ids"),
    "another type": (IDS, "int32", "--raw-dtype int32; expected one of uint16, uint32"),
    "large id": (np.array([5, 9000], "<u2").tobytes(), "uint16", "holds the id 9000, the tokenizer has 261"),
}


@pytest.mark.parametrize("case", NO_TOKEN_FILES)
def test_files_that_are_no_token_files(tmp_path, case):
    content, raw_dtype, message = NO_TOKEN_FILES[case]
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.bin: .*{message}"):
        read_checked(tmp_path / "a.bin", raw_dtype=raw_dtype)


def test_which_files_validate(tmp_path):
    """Files with the word val in their names validate, else the last tenth of all tokens, also across files."""
    for name, count in (("a", 700), ("medieval", 300), ("my_val_0", 50)):
        written(tmp_path / f"{name}.bin", count)
    files = [token_files.read_token_file(path) for path in token_files.token_files([tmp_path])]
    train, valid = token_files.split_streams(files)
    assert (len(train), len(valid)) == (1000, 50)
    train, valid = token_files.split_streams(files[:2])
    assert (len(train), len(valid)) == (900, 100)
    assert np.concatenate([train.read(0, 900), valid.read(0, 100)]).tolist() == TokenStream(
        [file.tokens for file in files[:2]]
    ).read(0, 1000).tolist()  # fmt: skip


READER = """
import sys, numpy as np
from pathlib import Path
from gpt_fast.data import token_files
from gpt_fast.data.stream import TokenStream, WindowOrder
def own():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon"))
file = token_files.read_token_file(Path(sys.argv[1]))
before = own()
stream = TokenStream([file.tokens])
order = WindowOrder(len(stream), 1024, seed=1)
for position in range(0, 10**15, 10**12):
    assert stream.windows([order.start(position)], 1024).shape == (1, 1024)
print(len(stream), own() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_reading_takes_constant_memory(tmp_path):
    """A thousand windows all over a sparse file of four billion tokens cost less than 8 MB."""
    path = written(tmp_path / "a.bin")
    fields = token_files.read_token_file(path).header | {"count": 4_000_000_000}
    with path.open("wb") as file:
        file.write(token_files.pack_header(fields))
        file.truncate(1024 + 2 * 4_000_000_000)
    done = subprocess.run([sys.executable, "-c", READER, str(path)], capture_output=True, text=True, check=True)
    tokens, kilobytes = map(int, done.stdout.split())
    assert tokens == 4_000_000_000
    assert kilobytes < 8192


@pytest.mark.parametrize("change", ["shrinks", "grows", "is written anew"])
def test_a_token_file_that_changes_while_it_is_read(tmp_path, change):
    """The error names the file. A file that shrinks under a memory map would kill the process (SIGBUS)."""
    path = written(tmp_path / "a.bin", 100_000)
    stream = TokenStream([token_files.read_token_file(path).tokens]).part(50_000, 100_000)
    assert stream.read(40_000, 3).tolist() == [(90_000 + i) % 300 % 250 for i in range(3)]
    size = path.stat().st_size
    time.sleep(0.05)  # longer than a tick of the file system's clock
    if change == "is written anew":
        path.write_bytes(bytes(size))
    else:
        os.truncate(path, size // 2 if change == "shrinks" else 2 * size)
    with pytest.raises(
        ValueError, match=rf"a\.bin: changed while it was read, from {size:,} to .*expected the file as"
    ):
        stream.windows([40_000], 64)


def test_a_token_file_that_another_replaces_is_read_on(tmp_path):
    path = written(tmp_path / "a.bin")
    stream = TokenStream([token_files.read_token_file(path).tokens])
    before = stream.read(0, 1000)
    written(tmp_path / "b.bin", 10).replace(path)
    assert np.array_equal(stream.read(0, 1000), before)


# --- preparation ---


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return a folder of twelve files, one of them compressed."""
    made = tmp_path / "texts"
    made.mkdir()
    for i in range(11):
        (made / f"{i}.txt").write_text(f"file {i}\n{TEXT}")
    (made / "11.txt.gz").write_bytes(gzip.compress(f"file 11\n{TEXT}".encode()))
    return made


@pytest.mark.parametrize("processes", [1, 3])
def test_files_are_documents(folder, tmp_path, processes):
    record = make(tmp_path / "out", folder, processes=processes)
    tokenizer = tok.load_tokenizer(tmp_path / "out")
    train, valid = (texts(tmp_path / "out" / f"{part}.bin", tokenizer) for part in ("train", "valid"))
    assert (len(train), len(valid)) == (record["train_documents"], record["valid_documents"])
    assert sorted(train + valid) == sorted(f"file {i}\n{TEXT}" for i in range(12))
    assert len(valid) == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "data.json", "tokenizer.json", "train.bin", "valid.bin",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["bpe", "byte", "char"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_long_texts_are_cut_where_no_token_changes(tmp_path, monkeypatch, kind, suffix):
    """A text that is cut into units of 300 bytes has the tokens of the whole text."""
    monkeypatch.setattr(sources, "UNIT", 300)
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(gzip.compress(TEXT.encode()) if suffix else TEXT.encode())
    other = tmp_path / "b.txt"
    other.write_text("x = 1\n")
    make(tmp_path / "out", path, valid=(other,), tokenizer=kind, vocab_size=300)
    tokenizer = tok.load_tokenizer(tmp_path / "out")
    ids = token_files.read_token_file(tmp_path / "out" / "train.bin").tokens[:].tolist()
    assert ids == [tok.special_ids(tokenizer)["start_token"], *tok.encode(tokenizer, TEXT)]
    if not suffix:
        assert len(sources.plan([str(path)], [str(other)])) > 5


def test_few_files_give_their_last_tenth(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    make(tmp_path / "out", tmp_path / "a.txt")
    tokenizer = tok.load_tokenizer(tmp_path / "out")
    (train,), (valid,) = (texts(tmp_path / "out" / f"{part}.bin", tokenizer) for part in ("train", "valid"))
    assert train + valid == TEXT
    assert 0.05 < len(valid) / len(TEXT) < 0.11


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_rows_are_documents(tmp_path, monkeypatch, suffix):
    """About one row in ten is held out. A table is cut into units, too."""
    monkeypatch.setattr(sources, "UNIT", 500)
    rows = [f"row {i} ä" for i in range(60)]
    content = "".join(json.dumps({"body": row, "n": i}) + "\n" for i, row in enumerate(rows)).encode()
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    make(tmp_path / "out", path, text_column="body")
    tokenizer = tok.load_tokenizer(tmp_path / "out")
    train, valid = (texts(tmp_path / "out" / f"{part}.bin", tokenizer) for part in ("train", "valid"))
    assert sorted(train + valid) == sorted(rows)
    assert 3 <= len(valid) <= 6


def test_a_hugging_face_data_set(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the extra hf is not installed")
    monkeypatch.setattr(sources, "ROWS", 25)
    rows = [f"row {i}" for i in range(60)]
    datasets.Dataset.from_dict({"text": rows}).save_to_disk(str(tmp_path / "set"))
    make(tmp_path / "out", f"hf:{tmp_path / 'set'}")
    tokenizer = tok.load_tokenizer(tmp_path / "out")
    train, valid = (texts(tmp_path / "out" / f"{part}.bin", tokenizer) for part in ("train", "valid"))
    assert sorted(train + valid) == sorted(rows)
    assert len(valid) == 6
    with pytest.raises(ValueError, match=r"no column 'body'; it has 'text'"):
        make(tmp_path / "other", f"hf:{tmp_path / 'set'}", text_column="body")


def test_a_large_vocabulary_takes_uint32(tmp_path):
    (tmp_path / "a.txt").write_text("".join(map(chr, range(0x4E00, 0x9FFF))) + "".join(map(chr, range(0xAC00, 0xD7A0))))
    (tmp_path / "b.txt").write_text("".join(map(chr, range(0x20000, 0x29000))))
    record = make(
        tmp_path / "out", tmp_path / "a.txt", tmp_path / "b.txt", valid=(tmp_path / "a.txt",), tokenizer="char"
    )
    assert (record["dtype"], record["vocabulary"] > 65_536) == ("uint32", True)
    assert token_files.read_token_file(tmp_path / "out" / "train.bin").tokens[:].max() > 65_536


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.txt": b"caf\xe9 \n"}, r"a\.txt: not UTF-8 \(byte 3"),
        ({"a.jsonl": b'{"text": "a"}\n{"text"\n'}, r"a\.jsonl, line 2: not JSON"),
        ({"a.jsonl": b'{"body": "a"}\n'}, r"a\.jsonl, line 1: no column 'text'; it has 'body' \(see --text-column\)"),
        ({"a.jsonl": b'{"text": "a"}\n'}, "no document is for validation"),
        ({"a.txt.gz": b"no gzip"}, r"a\.txt\.gz: damaged, or not gzip"),
        ({"a.txt": b""}, r"a\.txt: empty"),
        ({}, "none: no such file"),
    ],
    ids=["latin", "broken row", "other column", "too few", "no gzip", "empty", "missing"],
)
def test_text_that_cannot_be_prepared(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make(tmp_path / "out", *[tmp_path / name for name in files] or [tmp_path / "none"])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_preparation_goes_on_where_it_was_killed(cli, folder, tmp_path):
    """Killed after its fourth part, a preparation makes only the other parts and ends with the same files."""
    command = ["prepare", "--data", folder, "--tokenizer", "byte", "--processes", 1]
    whole, out = tmp_path / "whole", tmp_path / "out"
    succeed(cli(*command, "--out", whole))
    assert cli(*command, "--out", out, watched=(out / ".parts" / "000003.json", 0)).code == -signal.SIGKILL
    shown = succeed(cli(*command, "--out", out)).err
    assert int(re.search(r"resuming: (\d+) of 12 parts", shown)[1]) >= 4
    for name in ("train.bin", "valid.bin", "tokenizer.json", "data.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert not (out / ".parts").exists()
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert "nothing is left to do" in succeed(cli(*command, "--out", out)).err
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def killed_at(out: Path, data: Path, stage: str) -> int:
    """Prepare in a process that is killed where it would rename the file `stage`, or remove the parts.

    Return its exit code.
    """
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    rename, remove = Path.replace, shutil.rmtree
    die = partial(os.kill, os.getpid(), signal.SIGKILL)
    Path.replace = lambda path, target: die() if Path(target) == out / stage else rename(path, target)
    shutil.rmtree = lambda path, **given: die() if stage == "parts" else remove(path, **given)
    make(out, data)
    os._exit(0)


@pytest.mark.parametrize("stage", ["train.bin", "valid.bin", "tokenizer.json", "data.json", "parts"])
def test_a_preparation_that_was_killed_while_joining_resumes(folder, tmp_path, monkeypatch, stage):
    """It resumes from its parts, tokenises none of them again, and leaves nothing beside the same files."""
    make(tmp_path / "whole", folder)
    out = tmp_path / "out"
    assert killed_at(out, folder, stage) == -signal.SIGKILL
    assert stage == "parts" or list(out.glob(f".{stage}.*.partial"))
    monkeypatch.setattr(prepare, "tokenise", lambda *_: pytest.fail("a part was tokenised again"))
    make(out, folder)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in (tmp_path / "whole").iterdir())
    for path in (tmp_path / "whole").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_preparation_whose_files_are_gone_is_made_again(folder, tmp_path):
    """The record alone does not make a preparation count as done."""
    make(tmp_path / "out", folder)
    (tmp_path / "out" / "train.bin").unlink()
    with pytest.raises(FileExistsError, match="holds other data, or a part of it"):
        make(tmp_path / "out", folder)
    make(tmp_path / "out", folder, overwrite=True)
    assert (tmp_path / "out" / "train.bin").exists()


def living(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="children are read from /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(tmp_path, number):
    """Workers end even in the middle of a part. If the parent can catch the signal, it says how to resume."""
    (tmp_path / "a.txt").write_text("lorem ipsum dolor " * 2_000_000)
    command = [sys.executable, "-m", "gpt_fast", "prepare", "--data", tmp_path / "a.txt", "--tokenizer", "byte"]
    command += ["--processes", "2", "--out", tmp_path / "out"]
    parent = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    children, deadline = Path(f"/proc/{parent.pid}/task/{parent.pid}/children"), time.monotonic() + 60
    while len(list((tmp_path / "out").glob(".parts/.*.train.*"))) != 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = [int(pid) for pid in children.read_text().split()]
    assert len(workers) == 2
    parent.send_signal(number)
    _, shown = parent.communicate(timeout=60)
    assert parent.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    deadline = time.monotonic() + 10
    while any(map(living, workers)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(living, workers))
    assert "Traceback" not in shown
    if number != signal.SIGKILL:
        message = rf"stopped by {number.name}; \d of 5 parts are done in .*\.parts, and the same command resumes"
        assert re.search(message, " ".join(shown.split()))


def test_a_worker_that_is_killed_is_an_error_of_one_line(folder, tmp_path, monkeypatch):
    """The system kills workers where memory is short. The parts that are done stay."""

    def killed(unit: sources.Unit, *given) -> Iterator[tuple[str, bool, str]]:
        if unit.name == "7.txt":
            os.kill(os.getpid(), signal.SIGKILL)
        return sources.documents(unit, *given)

    with monkeypatch.context() as patched:
        patched.setattr(prepare, "documents", killed)
        with pytest.raises(
            ChildProcessError, match=r"a worker was killed, perhaps for want of memory; \d+ of 12 parts"
        ):
            make(tmp_path / "out", folder, processes=2)
    assert make(tmp_path / "out", folder, processes=2)["train_documents"] == 11


def test_of_several_faulty_parts_the_first_is_named(tmp_path, monkeypatch):
    """The error does not depend on which worker meets its fault first."""
    (tmp_path / "a.txt").write_bytes(b"a\0b\n" * 100)

    def late(unit: sources.Unit, *given) -> Iterator[tuple[str, bool, str]]:
        if unit.start == 0:
            time.sleep(0.3)
        return sources.documents(unit, *given)

    monkeypatch.setattr(prepare, "documents", late)
    with pytest.raises(ValueError, match=r"a\.txt: has a NUL byte \(byte 1\)"):
        make(tmp_path / "out", tmp_path / "a.txt", processes=2)


def test_another_preparations_folder_is_not_written_over(cli, folder, tmp_path):
    out = tmp_path / "out"
    make(out, folder)
    (folder / "0.txt").write_text("changed")
    refused = cli("prepare", "--data", folder, "--tokenizer", "byte", "--out", out)
    assert (refused.code, "holds other data" in refused.err) == (2, True)
    succeed(cli("prepare", "--data", folder, "--tokenizer", "byte", "--out", out, "--overwrite"))
    (out / "thesis.tex").write_text("")
    refused = cli("prepare", "--data", folder, "--tokenizer", "byte", "--out", out, "--overwrite")
    assert (refused.code, "thesis.tex" in refused.err) == (2, True)


def test_a_full_disk(tmp_path):
    path = tmp_path / "a.bin"
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        try:
            written(path, 5000)
        except OSError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert list(tmp_path.iterdir()) == []


# --- training from token files ---


def test_token_files_train_as_their_text(cli, data, tmp_path):
    """Training on text and on its token files has equal losses, with and without --pack."""
    lines = data.text.read_text().splitlines(keepends=True)
    (tmp_path / "texts").mkdir()
    for i in range(60):
        (tmp_path / "texts" / f"{i}.txt").write_text("".join(lines[i::60]))
    succeed(cli("prepare", "--data", tmp_path / "texts", "--tokenizer", "byte", "--out", tmp_path / "tokens"))
    losses = []
    text = ["--tokenizer", "byte", "--data", tmp_path / "texts"]
    for name, source in (("a", text), ("b", ["--data", tmp_path / "tokens"])):
        for pack in ([], ["--pack"]):
            out = tmp_path / f"{name}{len(pack)}"
            succeed(cli("pretrain", *source, *SMALL, *pack, "--steps", 5, "--seed", 3, "--out", out))
            losses.append(json.loads((out / "run.json").read_text())["train_loss"])
    assert losses[0] != losses[1]
    assert losses[2:] == losses[:2]
    refused = cli(
        "pretrain", "--data", tmp_path / "tokens", "--tokenizer", data.mlm / "tokenizer.json", "--out", tmp_path / "x"
    )
    assert refused.code == 2
    assert "made with another vocabulary" in refused.err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--tokenizer byte", "holds tokens already"),
        ("--tokenizer {lm} --raw-dtype uint16", "--raw-dtype uint16: "),
        ("", "no tokenizer.json beside it"),
        ("--tokenizer {lm} --pack", "--pack: nothing says which token begins a document"),
    ],
)
def test_foreign_token_files_that_need_more(cli, data, tmp_path, options, message):
    path = llmc(tmp_path / "a.bin", np.arange(3000) % 256)
    given = [option.format(lm=data.lm) for option in options.split()]
    refused = cli("pretrain", "--data", path, *given, *SMALL, "--steps", 2, "--out", tmp_path / "run")
    assert refused.code == 2
    assert message in refused.err
    assert sorted(tmp_path.iterdir()) == [path]


def test_pretrain_from_llm_c(cli, data, tmp_path):
    path = llmc(tmp_path / "a.bin", np.arange(3000) % 256)
    out = tmp_path / "run"
    succeed(cli("pretrain", "--data", path, "--tokenizer", data.lm, *SMALL, "--steps", 2, "--out", out))
    record = json.loads((out / "run.json").read_text())
    assert (record["train_tokens"], record["valid_tokens"]) == (2700, 300)


def test_pretrain_from_nanogpt_takes_the_option(cli, data, tmp_path):
    """Without the option the file is refused by name; text with the option is refused, too."""
    path = tmp_path / "train.bin"
    path.write_bytes((np.arange(3000) % 256).astype("<u2").tobytes())
    command = ["pretrain", "--data", path, "--tokenizer", data.lm, *SMALL, "--steps", 2, "--out", tmp_path / "run"]
    refused = cli(*command)
    assert refused.code == 2
    assert "Traceback" not in refused.err
    message = " ".join(refused.err.split())
    assert "train.bin: 6,000 bytes without a header of gpt-fast or llm.c; expected one, or --raw-dtype" in message
    succeed(cli(*command, "--raw-dtype", "uint16"))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["train_tokens"] == 2700
    refused = cli("pretrain", "--data", data.text, "--raw-dtype", "uint16", *SMALL, "--out", tmp_path / "other")
    assert (refused.code, "--raw-dtype uint16: --data names text" in refused.err) == (2, True)
