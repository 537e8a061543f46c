"""Sources of data: files of every kind, folders, archives and pipes, and the places where their text is cut."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from gpt_fast.data import corpus, prepare, sources, tables, token_files
from gpt_fast.data import tokenizer as tok
from gpt_fast.data.reading import cuts, files
from tests.command_line import ENVIRONMENT, SMALL, succeed

ROWS = [f"row {i} – with “quotes”, commas, and a\nsecond line" for i in range(40)]


def ignore(*_: object) -> None:
    """Stand in for a display."""


def make(out: Path, *data: object, valid: tuple = (), say: Callable = ignore, **options) -> dict:
    given = {"tokenizer": "byte"} | options
    settings = prepare.PrepareSettings(out, tuple(map(str, data)), tuple(map(str, valid)), **given)
    return prepare.prepare(settings, ignore, say)


def ids_of(path: Path) -> list[int]:
    return token_files.read_token_file(path).tokens[:].tolist()


def texts_of(path: Path) -> list[str]:
    """Return the documents of a token file of bytes."""
    documents: list[list[int]] = []
    for token in ids_of(path):
        if token == tok.special_ids(tok.byte_tokenizer())["start_token"]:
            documents.append([])
        else:
            documents[-1].append(token)
    return [bytes(document).decode() for document in documents]


def prepared(folder: Path, *data: object, **options) -> list[str]:
    """Prepare `data` in `folder`, and return all documents for training and validation."""
    make(folder, *data, **options)
    return texts_of(folder / "train.bin") + texts_of(folder / "valid.bin")


# --- where a text is cut ---


PARAGRAPH = "The fox, however, didn't run 3.14 miles. It sat down!  Why? Nobody knows; 'twas the fox's own will."
TEXTS = {
    "lines": "one line of text\nand another, of 12 words\n" * 60,
    "crlf": "one line of text\r\n\r\nand another\r\n" * 60,
    "cr": "one line of text\rand another\r\r" * 60,
    "unicode line ends": "one line\u2028and another\x85\u2029a third\u2028" * 60,
    "chinese": "今天天气很好。我们去公园散步吧！他说：“你好吗？”然后走了……\n\n第二段没有空格，只有标点。" * 40,
    "chinese without line ends": "今天天气很好。我们去公园散步吧！他说：“你好吗？”然后走了，三个人。" * 40,
    "indented code": "def f(x):\n    if x:\n\t\treturn x  # naïve\n\n\n    \nclass A:\n    pass\n" * 40,
    "blank-line paragraphs": f"{PARAGRAPH}\n\n\n{PARAGRAPH} {PARAGRAPH}\n\n" * 10,
    "indented paragraphs": f"\n    {PARAGRAPH}\n    {PARAGRAPH}\n" * 10,
    "wikitext": " \n = Robert <unk> = \n \n Robert <unk> is an English film , television and theatre actor .\n" * 40,
    "no line ends": f"{PARAGRAPH} " * 40,
    "spaces of all kinds": "a\u3000b\xa0\u2003c  \t d\u202fe \n\n f" * 100,
    "no space at all": "aGVsbG8+d29ybGQ/" * 200,
    "russian": "Все счастливые семьи похожи друг на друга.\n\nВсё смешалось в доме Облонских. — Что?\n" * 30,
}


def gpt2_like() -> Tokenizer:
    """Return byte-level BPE with GPT-2's rule for words, trained on all texts, so that many words are single tokens."""
    return tok.train_bpe(TEXTS.values(), 900)


def with_rule(rule: str) -> Tokenizer:
    """Return byte-level BPE with the regular expression `rule` for words."""
    tokenizer = gpt2_like()
    words = pre_tokenizers.Split(Regex(rule), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    return tokenizer


def word_piece() -> Tokenizer:
    vocabulary = {token: i for i, token in enumerate(["[UNK]", *map(chr, range(33, 127)), "##o", "##x", "fo", "line"])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
GPT4 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|"
GPT4 += r"\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.mark.parametrize("text", TEXTS)
def test_every_place_to_cut_is_between_two_words(text):
    """A cut at any place that the patterns find leaves the words of GPT-2's own rule unchanged."""
    words = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    content = TEXTS[text][:700]
    patterns = (cuts._LAST_SPACE, cuts._BEHIND_MARK)
    places = [found.start() for pattern in patterns for found in pattern.finditer(content, 1)]
    assert places or text == "no space at all"
    whole = [word for word, _ in words(content)]
    for place in places:
        assert [word for part in (content[:place], content[place:]) for word, _ in words(part)] == whole, place


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["bpe", "gpt2.json", "gpt4.json", "byte", "char", "wordpiece.json"])
def test_tokens_of_a_cut_text_are_those_of_the_whole(tmp_path, monkeypatch, text, kind):
    """The text is cut into units of 300 bytes, pieces of 90 characters, and two parts for training and validation."""
    monkeypatch.setattr(sources, "UNIT", 300)
    monkeypatch.setattr(cuts, "PIECE", 90)
    monkeypatch.setattr(cuts, "WINDOW", 400)
    if text == "no space at all" and kind == "wordpiece.json":
        pytest.skip("WordPiece ends a word at white space, and the text has none")
    content = TEXTS[text]
    (tmp_path / "a.txt").write_bytes(content.encode())
    made = {"gpt2.json": gpt2_like, "gpt4.json": lambda: with_rule(GPT4), "wordpiece.json": word_piece}.get(kind)
    if made:
        made().save(str(tmp_path / kind))
    chosen = str(tmp_path / kind) if made else kind
    make(tmp_path / "out", tmp_path / "a.txt", tokenizer=chosen, vocab_size=300)
    tokenizer = tok.load_tokenizer(tmp_path / "out")
    start, *train = ids_of(tmp_path / "out" / "train.bin")
    again, *valid = ids_of(tmp_path / "out" / "valid.bin")
    assert start == again == tok.special_ids(tokenizer)["start_token"]
    assert train + valid == tok.encode(tokenizer, content)
    assert list(tok.encode_documents(tokenizer, [content, "", content])) == [train + valid, [], train + valid]
    assert 0.01 < len(valid) / (len(train) + len(valid)) < 0.15
    keeps = cuts.keeps_tokens(tokenizer) if made else None
    assert len(sources.plan([str(tmp_path / "a.txt")], keeps=keeps)) >= 5


@pytest.mark.parametrize(
    ("text", "before", "after"),
    [
        ("a b. c d\ne f", "a b. c d", "\ne f"),
        ("a b\r\ne f", "a b\r", "\ne f"),
        ("a b\x85e f", "a b", "\x85e f"),
        ("a b\n    e f", "a b\n   ", " e f"),
        ("a 3.14 b. C d", "a 3.14 b.", " C d"),
        ("一二，三四。五六", "一二，三四。", "五六"),
        ("一二。”三四", "一二。”", "三四"),
        ("ab cd", "ab", " cd"),
        ("ab+cd", "ab+", "cd"),
    ],
    ids=["line", "crlf", "next line", "indented", "sentence", "chinese sentence", "closing quote", "word", "mark"],
)
def test_line_ends_come_before_sentences_before_words(text, before, after):
    place = cuts.next_place(text)
    assert (text[:place], text[place:]) == (before, after)


PEAK = """
import sys
from pathlib import Path
from gpt_fast.data import prepare
source, out = sys.argv[1:]
settings = prepare.PrepareSettings(Path(out), (source,), (), "byte")
prepare.prepare(settings, lambda *_: None, lambda _: None)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("form", ["text", "gz", "jsonl"])
def test_memory_does_not_grow_with_the_text(tmp_path, form):
    """20 MB more of text without line ends, compressed text or table raise the peak by less than 20 MB."""
    peaks = []
    for size in (4 << 20, 24 << 20):
        text = "lorem ipsum dolor " * (size // 18)
        path = tmp_path / f"{size}.{'txt' if form == 'text' else 'txt.gz'}"
        if form == "jsonl":
            path = tmp_path / f"{size}.jsonl"
            path.write_text("".join(json.dumps({"text": text[: 1 << 16]}) + "\n" for _ in range(size >> 16)))
        else:
            path.write_bytes(gzip.compress(text.encode(), 1) if form == "gz" else text.encode())
        command = [sys.executable, "-c", PEAK, str(path), str(tmp_path / f"out{size}")]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT)
        peaks.append(int(done.stdout) << 10)
    assert peaks[1] - peaks[0] < 20 << 20


def test_files_of_one_name_do_not_share_a_part(tmp_path):
    """A split by name alone would put all of them into training or all into validation."""
    for i in range(12):
        (tmp_path / f"book{i}").mkdir()
        (tmp_path / f"book{i}" / "text.txt").write_text(f"book {i}: {'words ' * 50}")
    paths = sorted(tmp_path.glob("*/text.txt"))
    make(tmp_path / "out", *paths)
    train, valid = (texts_of(tmp_path / "out" / f"{part}.bin") for part in ("train", "valid"))
    assert (len(train), len(valid)) == (11, 1)
    read = corpus.read_corpus(paths)
    assert [document.text for document in read.valid] == valid
    assert len({document.name for document in read.train + read.valid}) == 12


# --- kinds of files ---


def write_csv(path: Path, delimiter: str) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([["n", "text"], *[[i, row] for i, row in enumerate(ROWS)]])


def write_parquet(path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra hf is not installed")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"n": list(range(len(ROWS))), "text": ROWS}), path, row_group_size=15)


def json_lines() -> str:
    return "".join(json.dumps({"n": i, "text": row}) + "\n" for i, row in enumerate(ROWS))


def zstd(content: bytes) -> bytes:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra hf is not installed")
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def write_zip(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


ARRAY = json.dumps([{"n": i, "text": row} for i, row in enumerate(ROWS)], indent=1)
TABLES = {
    "a.jsonl": lambda path: path.write_text(json_lines()),
    "a.ndjson": lambda path: path.write_text(json_lines()),
    "lines.json": lambda path: path.write_text(json_lines()),
    "bom.jsonl": lambda path: path.write_text("\ufeff" + json_lines()),
    "utf16.jsonl": lambda path: path.write_text(json_lines(), encoding="utf-16"),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(json_lines().encode())),
    "a.jsonl.zst": lambda path: path.write_bytes(zstd(json_lines().encode())),
    "a.jsonl.bz2": lambda path: path.write_bytes(bz2.compress(json_lines().encode())),
    "a.jsonl.xz": lambda path: path.write_bytes(lzma.compress(json_lines().encode())),
    "a.json": lambda path: path.write_text(ARRAY),
    "texts.json": lambda path: path.write_text(json.dumps(ROWS)),
    "a.json.gz": lambda path: path.write_bytes(gzip.compress(ARRAY.encode())),
    "a.csv": lambda path: write_csv(path, ","),
    "a.tsv": lambda path: write_csv(path, "\t"),
    "a.CSV": lambda path: write_csv(path, ","),
    "a.parquet": write_parquet,
    "a.zip": lambda path: write_zip(path, {"d/a.jsonl": json_lines().encode(), "d/": b"", ".x": b"hidden"}),
}


@pytest.mark.parametrize("name", TABLES)
def test_rows_of_every_kind_of_table(tmp_path, monkeypatch, name):
    """prepare, pretrain and evaluate read the same 40 texts, one in ten or so for validation."""
    monkeypatch.setattr(sources, "UNIT", 700)
    TABLES[name](tmp_path / name)
    assert sorted(prepared(tmp_path / "out", tmp_path / name)) == sorted(ROWS)
    read = corpus.read_corpus([tmp_path / name])
    assert [d.text for d in read.train] == texts_of(tmp_path / "out" / "train.bin")
    assert [d.text for d in read.valid] == texts_of(tmp_path / "out" / "valid.bin")
    assert 1 <= len(read.valid) <= 5
    assert [document.text for document in corpus.read_documents(tmp_path / name)] == ROWS


NOVEL = "Все счастливые семьи похожи друг на друга.\r\n“Café”, 日本 🙂\n" * 30
PLAIN = {
    "a.txt": NOVEL.encode(),
    "a.md": NOVEL.encode(),
    "a.py": NOVEL.encode(),
    "README": NOVEL.encode(),
    "bom.txt": b"\xef\xbb\xbf" + NOVEL.encode(),
    "utf16.txt": NOVEL.encode("utf-16"),
    "utf16be.txt": b"\xfe\xff" + NOVEL.encode("utf-16-be"),
    "utf32.txt": NOVEL.encode("utf-32"),
    "a.txt.gz": gzip.compress(NOVEL.encode()),
    "two members.txt.gz": gzip.compress(NOVEL[:100].encode()) + gzip.compress(NOVEL[100:].encode()),
    "gzip without its ending.txt": gzip.compress(NOVEL.encode()),
    "utf16.txt.gz": gzip.compress(NOVEL.encode("utf-16")),
}


@pytest.mark.parametrize("name", PLAIN)
def test_text_of_every_encoding(tmp_path, monkeypatch, name):
    """A byte order mark is dropped and UTF-16 is decoded, in small units too."""
    monkeypatch.setattr(sources, "UNIT", 300)
    monkeypatch.setattr(files, "TEXT_BLOCK", 64)
    (tmp_path / name).write_bytes(PLAIN[name])
    assert "".join(prepared(tmp_path / "out", tmp_path / name)) == NOVEL
    read = corpus.read_corpus([tmp_path / name])
    assert (read.train[0].text, read.valid[0].text) == tuple(
        texts_of(tmp_path / "out" / f"{part}.bin")[0] for part in ("train", "valid")
    )
    assert corpus.read_documents(tmp_path / name)[0].text == NOVEL


def tarball() -> bytes:
    """Return a tar archive with one text in it."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as archive:
        info = tarfile.TarInfo("a.txt")
        info.size = 5
        archive.addfile(info, io.BytesIO(b"words"))
    return written.getvalue()


REFUSED: dict[str, tuple[str, bytes, str]] = {
    "nul": ("a.txt", b"abc\ndef\0ghi" * 20, r"a\.txt: has a NUL byte \(byte 7\); expected text"),
    "nul behind a mark": ("a.txt", b"\xef\xbb\xbfab\0" * 20, r"has a NUL byte \(byte 5\)"),
    "utf-16 without a mark": (
        "a.txt",
        "plain text".encode("utf-16-le") * 9,
        r"NUL byte \(byte 1\); .* byte order mark",
    ),
    "latin-1": ("a.txt", b"caf\xe9 " * 20, r"a\.txt: not UTF-8 \(byte 3: "),
    "late latin-1": ("a.txt", "日本".encode() * 30000 + b"\xe9 ", r"not UTF-8 \(byte 180000: "),
    "cut off character": ("a.txt", "日本".encode()[:-1], r"not UTF-8 \(byte 3: "),
    "half a surrogate": ("a.txt", b"\xff\xfe\x00\xd8a\x00" * 20, r"a\.txt: not UTF-16-LE"),
    "nul in json": ("a.jsonl", b'{"text": "a\\u0000b"}\n' * 20, r"a\.jsonl, line 1: has a NUL character"),
    "no gzip": ("a.txt.gz", b"no gzip", r"a\.txt\.gz: damaged, or not gzip"),
    "cut off gzip": ("a.txt.gz", gzip.compress(os.urandom(5000))[:3000], r"a\.txt\.gz: damaged, or not what its name"),
    "flipped gzip": ("a.jsonl.gz", gzip.compress(json_lines().encode())[:-8] + bytes(8), r"a\.jsonl\.gz: damaged"),
    "no zip": ("a.zip", b"no zip", r"a\.zip: damaged, or not what its name says"),
    "no parquet": ("a.parquet", b"no parquet", r"a\.parquet: damaged, or no parquet table"),
    "parquet as text": ("a.txt", b"PAR1" + bytes(100), r"a\.txt: a parquet table; name it \.parquet"),
    "pdf": ("a.txt", b"%PDF-1.7\n" * 20, r"a\.txt: a PDF; convert it to text"),
    "docx": ("a.docx", b"PK\x03\x04" + bytes(60), r"a\.docx: a zip archive or an office document"),
    "rtf": ("a.txt", b"{\\rtf1\\ansi " * 20, r"a\.txt: an RTF document"),
    "tar": ("a.tar.gz", gzip.compress(tarball()), r"a\.tar\.gz: a tar archive; unpack it"),
    "lfs": ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a pointer of Git LFS"),
    "tokens": ("a.bin", b"gptfast2" * 20, r"a\.bin: a token file by its name"),
    "json object": ("a.json", b'{"data": [\n1, 2]}', r"a\.json: one JSON value; expected an array of rows"),
    "json array of numbers": ("a.json", b"[1, 2]", r"a\.json, row 1: a number; expected an object with text"),
    "cut off array": ("a.json", b'[{"text": "a"}, {"text": "b', r"a\.json, row 2: not JSON"),
    "array without an end": ("a.json", b'[{"text": "a"}', r"a\.json: not JSON, has its end; expected ','"),
    "text behind an array": ("a.json", b'[{"text": "a"}] x', r"a\.json: more text behind its JSON array"),
    "nested array": ("a.json", b"[" * 100_000, r"a\.json, row 1: not JSON that can be read, nested"),
    "broken line": ("a.jsonl", b'{"text": "a"}\n{"text"\n', r"a\.jsonl, line 2: not JSON"),
    "other field": (
        "a.jsonl",
        b'{"body": "a"}\n',
        r"a\.jsonl, line 1: no column 'text'; it has 'body' \(see --text-col",
    ),
    "number": ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl, line 1: 'text' holds a number; expected text"),
    "line of a list": ("a.jsonl", b'["a"]\n', r"a\.jsonl, line 1: a list; expected an object"),
    "other column": ("a.csv", b"n,body\n1,a\n", r"a\.csv, line 2: no column 'text'; it has 'n', 'body'"),
    "two columns": (
        "a.csv",
        b"text,text\n1,a\n",
        r"a\.csv: columns 1 and 2 are both called 'text'; expected a name for each",
    ),
    "ragged": ("a.csv", b"n,text\n1,a\n2\n", r"a\.csv, line 3: 1 fields under a header of 2$"),
    "lone quote": ("a.csv", b'n,text\n1,"a\n', r"a\.csv, line 2: unexpected end of data; expected quotes"),
    "latin-1 table": ("a.csv", b"n,text\n1,caf\xe9\n", r"a\.csv, line 2: not UTF-8 \(byte 5 of the line"),
}


@pytest.mark.parametrize("characters", [10, 100_000])
def test_a_json_file_with_one_row(tmp_path, characters):
    """The row may be longer than the block by which other files are told apart, and blank lines may surround it."""
    path = tmp_path / "a.json"
    path.write_text("\n" + json.dumps({"text": "a" * characters}) + "\n\n")
    assert files.kind_of(files.TextFile(path, path.name)) == "jsonl"
    path.write_text(path.read_text() + "x")
    with pytest.raises(ValueError, match=r"a\.json: one JSON value; expected an array of rows"):
        files.kind_of(files.TextFile(path, path.name))


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_are_not_text(tmp_path, case):
    """prepare, pretrain and evaluate refuse these files in the same words and leave nothing."""
    name, content, message = REFUSED[case]
    (tmp_path / name).write_bytes(content)
    for read in (
        lambda: make(tmp_path / "out", tmp_path / name),
        lambda: corpus.read_corpus([tmp_path / name]),
        lambda: corpus.read_documents(tmp_path / name),
    ):
        with pytest.raises(ValueError, match=message):
            read()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_damaged_zstandard_file(tmp_path):
    (tmp_path / "a.txt.zst").write_bytes(zstd(os.urandom(50_000))[:30_000])
    with pytest.raises(ValueError, match=r"a\.txt\.zst: damaged, or not what its name says"):
        make(tmp_path / "out", tmp_path / "a.txt.zst")


@pytest.mark.parametrize("name", ["a.parquet", "a.txt.zst", "hf:set"])
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, name):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    (tmp_path / "a.txt.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    monkeypatch.setattr(files, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r": needs (pyarrow|datasets); pip install gpt-fast\[hf\]"):
        corpus.read_corpus([Path(name) if name.startswith("hf:") else tmp_path / name])


def test_the_quotes_of_a_tsv(tmp_path):
    """GLUE's files are written without quoting: a lone quote is a character and swallows no row."""
    rows = ['"It was fun', 'an inch is 2.54 cm, 1"', 'the end"', 'a "b" c']
    (tmp_path / "a.tsv").write_text("".join(f"{i}\t{row}\n" for i, row in enumerate(["text", *rows])))
    (tmp_path / "a.tsv").write_text("n\ttext\n" + "".join(f"{i}\t{row}\n" for i, row in enumerate(rows)))
    with pytest.warns(UserWarning, match=r"a\.tsv: read without quoting, 4 rows"):
        assert [document.text for document in corpus.read_documents(tmp_path / "a.tsv")] == rows
    said: list[str] = []
    make(tmp_path / "out", tmp_path / "a.tsv", valid=(tmp_path / "a.tsv",), say=said.append)
    assert len(said) == 2
    assert all("a.tsv: read without quoting, 4 rows" in line for line in said)


def read_labelled(path: Path) -> list[str]:
    """Return the texts of a labelled table whose labels are in column n."""
    return tables.read_table(path, label_column="n").texts


@pytest.mark.parametrize("name", [name for name in TABLES if name not in ("texts.json", "a.zip")])
def test_a_labelled_table_is_read_by_the_same_reader(tmp_path, name):
    """A labelled table may be compressed or in UTF-16, too."""
    TABLES[name](tmp_path / name)
    assert read_labelled(tmp_path / name) == ROWS


@pytest.mark.parametrize("case", [case for case, (name, *_) in REFUSED.items() if Path(name).suffix in files.KINDS])
def test_a_labelled_table_is_refused_in_the_same_words(tmp_path, case):
    """The messages differ only in the cases listed here, for which the two readers have different rules."""
    name, content, message = REFUSED[case]
    message = {
        "json object": r"a\.json, row 1: a number; expected an object with named fields",
        "json array of numbers": r"a\.json, row 1: a number; expected an object with named fields",
        "other field": r"a\.jsonl, line 1: no column 'text'",
        "other column": r"a\.csv, line 2: no column 'text'",
        "number": r"a\.jsonl, line 1: column 'text' holds 5; expected text",
        "nul in json": r"a\.jsonl, line 1: column 'text' has a NUL character; expected text",
    }.get(case, message.removesuffix("$"))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        tables.read_table(tmp_path / name, label_column=None)


def test_a_row_of_a_later_unit_is_named_by_its_line(tmp_path, monkeypatch):
    """The line is counted from the beginning of the file, although the row's unit begins in the middle."""
    monkeypatch.setattr(sources, "UNIT", 300)
    lines = json_lines().splitlines(keepends=True)
    lines[29] = '{"text": 5}\n'
    (tmp_path / "a.jsonl").write_text("".join(lines))
    assert len(sources.plan([str(tmp_path / "a.jsonl")])) > 5
    with pytest.raises(ValueError, match=r"a\.jsonl, line 30: 'text' holds a number; expected text"):
        corpus.read_corpus([tmp_path / "a.jsonl"])


LONG = "a" * 5000
TOO_LONG = {
    "a.jsonl": (json.dumps({"n": 1, "text": "b"}) + "\n" + json.dumps({"n": 1, "text": LONG}), "line 2"),
    "a.json": (json.dumps([{"n": 1, "text": "b"}, {"n": 1, "text": LONG}]), "row 2"),
    "a.csv": (f"n,text\n1,b\n1,{LONG}\n", "line 3"),
    "quoted.csv": ('n,text\n1,b\n1,"' + "line\n" * 1000 + '"\n', "line 202"),
    "a.tsv": (f"n\ttext\n1\tb\n1\t{LONG}\n", "line 3"),
}


@pytest.mark.parametrize("name", TOO_LONG)
def test_a_row_has_a_limit(tmp_path, monkeypatch, name):
    """A row that never ends, as in a damaged file, takes no more memory. Rows of several lines have the same limit."""
    monkeypatch.setattr(files, "ROW", 1000)
    monkeypatch.setattr(files, "TEXT_BLOCK", 64)
    content, place = TOO_LONG[name]
    (tmp_path / name).write_text(content)
    for read in (read_labelled, corpus.read_documents, lambda path: make(tmp_path / "out", path)):
        with pytest.raises(ValueError, match=rf"{name}, {place}: a row of more than 1,000 bytes; expected fewer"):
            read(tmp_path / name)
    (tmp_path / name).write_text(content.replace("a" * 5000, "a" * 900).replace("line\n" * 1000, "line\n" * 150))
    assert len(read_labelled(tmp_path / name)) == 2


def test_rows_without_text_are_counted(tmp_path):
    """Rows without text are left out and counted in a message. None does not become a text."""
    rows = [{"text": None if i % 10 == 3 else "" if i % 10 == 4 else f"row {i}"} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said: list[str] = []
    assert len(prepared(tmp_path / "out", tmp_path / "a.jsonl", say=said.append)) == 32
    assert said == ["8 rows without text in 'text' are left out"]
    with pytest.warns(UserWarning, match=r"a\.jsonl: 8 rows without text in 'text' are left out"):
        assert len(corpus.read_documents(tmp_path / "a.jsonl")) == 32


# --- folders ---


def test_links_are_followed_once(tmp_path):
    """The links lead to a folder outside, to a file and a folder inside, and to the folder itself."""
    inside, outside = tmp_path / "books", tmp_path / "elsewhere"
    (inside / "sub").mkdir(parents=True)
    outside.mkdir()
    (inside / "a.txt").write_text("a")
    (inside / "sub" / "b.txt").write_text("b")
    (outside / "c.txt").write_text("c")
    (inside / "0 link").symlink_to(outside)
    (inside / "0 again").symlink_to("sub")
    (inside / "sub" / "loop").symlink_to(inside)
    (inside / "0.txt").symlink_to("a.txt")
    (tmp_path / "link").symlink_to(inside)
    for folder in (inside, tmp_path / "link"):
        assert [file.name for file in files.find(folder)] == ["0 link/c.txt", "a.txt", "sub/b.txt"]
    (inside / "gone.txt").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match=r"gone\.txt: a link to nowhere, which is not there"):
        files.find(inside)


def test_a_folder_of_several_kinds(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.txt").write_text("plain text. " * 20)
    (folder / "rows.jsonl").write_text(json_lines())
    (folder / "package.json").write_text('{\n"name": 1}')
    write_zip(
        folder / "z.zip", {"one.txt": b"first member. " * 20, "deep/two.md.gz": gzip.compress(b"second one. " * 20)}
    )
    found = prepared(tmp_path / "out", folder)
    whole = "".join(found)
    assert all(row in found for row in ROWS)
    assert whole.count('"name": 1') == 1  # among other files one JSON object is text
    for words in ("plain text. ", "first member. ", "second one. "):
        assert whole.count(words.strip()) == 20


# --- pipes ---


def write_into(pipe: Path, content: bytes) -> threading.Thread:
    writer = threading.Thread(target=lambda: pipe.write_bytes(content))
    writer.start()
    return writer


@pytest.mark.parametrize("command", ["prepare", "pretrain", "evaluate"])
def test_a_named_pipe(cli, data, tmp_path, command):
    """The pipe is read once and copied, so it may hold a compressed table."""
    pipe = tmp_path / "rows.jsonl"
    os.mkfifo(pipe)
    given = {
        "prepare": ["--out", tmp_path / "out", "--tokenizer", "byte", "--processes", 2],
        "pretrain": ["--out", tmp_path / "out", "--tokenizer", "byte", *SMALL, "--steps", 2],
        "evaluate": ["--from", data.lm, "--json"],
    }[command]
    writer = write_into(pipe, gzip.compress(json_lines().encode(), mtime=0))
    done = succeed(cli(command, "--data", pipe, *given))
    writer.join()
    if command == "prepare":
        assert sorted(texts_of(tmp_path / "out/train.bin") + texts_of(tmp_path / "out/valid.bin")) == sorted(ROWS)
        writer = write_into(pipe, gzip.compress(json_lines().encode(), mtime=0))
        assert "nothing is left to do" in cli(command, "--data", pipe, *given).err
        writer.join()
    elif command == "pretrain":
        tokens = sum(len(row.encode()) + 1 for row in ROWS)
        record = json.loads((tmp_path / "out" / "run.json").read_text())
        assert record["train_tokens"] + record["valid_tokens"] == tokens
    else:
        assert json.loads(done.out)["data"] == str(pipe)


def test_standard_input(data, tmp_path):
    command = [
        sys.executable,
        "-m",
        "gpt_fast",
        "prepare",
        "--data",
        "-",
        "--tokenizer",
        "byte",
        "--out",
        tmp_path / "out",
    ]
    subprocess.run(command, input=json_lines().encode(), check=True, capture_output=True, env=ENVIRONMENT)
    assert sorted(texts_of(tmp_path / "out/train.bin") + texts_of(tmp_path / "out/valid.bin")) == sorted(ROWS)


def test_errors_name_the_pipe_and_not_its_copy(cli, tmp_path):
    pipe = tmp_path / "pipe.txt"
    os.mkfifo(pipe)
    writer = write_into(pipe, b"a\0b" * 20)
    refused = cli("prepare", "--data", pipe, "--tokenizer", "byte", "--out", tmp_path / "out")
    writer.join()
    assert (refused.code, f"gpt-fast: {pipe}: has a NUL byte (byte 1)" in " ".join(refused.err.split())) == (2, True)
    assert list(tmp_path.iterdir()) == [pipe]


def test_resume_refuses_pipes(cli, data, tmp_path):
    """--resume refuses a pipe before it reads anything, and refuses a run that began with a pipe."""
    pipe, out = tmp_path / "pipe.txt", tmp_path / "run"
    os.mkfifo(pipe)
    command = ["pretrain", *SMALL, "--out", out, "--tokenizer", "byte", "--steps", 200, "--checkpoint-every", 1]
    for source in (pipe, "-"):
        refused = cli(*command, "--data", source, "--resume")
        assert (refused.code, f"--resume: --data {source} is a pipe" in " ".join(refused.err.split())) == (2, True)
        assert not out.exists()
    writer = write_into(pipe, NOVEL.encode())
    assert cli(*command, "--data", pipe, watched=(out / "checkpoints" / "step-*", 0)).code == -9
    writer.join()
    refused = cli("pretrain", "--out", out, "--resume")
    assert (refused.code, f"--resume: --data {pipe} is a pipe" in " ".join(refused.err.split())) == (2, True)


def test_a_data_set_without_a_network_is_an_error_at_once(tmp_path):
    """The address of the hub refuses connections. `datasets` alone retried for 28 seconds."""
    script = (
        "import time\n"
        "from gpt_fast.data.reading import rows\n"
        "import datasets\n"
        "began = time.perf_counter()\n"
        "try:\n"
        "    rows.data_set('hf:me/tiny')\n"
        "except ValueError as error:\n"
        "    print(time.perf_counter() - began, error)\n"
    )
    environment = ENVIRONMENT | {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    seconds, _, message = done.stdout.strip().partition(" ")
    assert message.startswith("hf:me/tiny: cannot be loaded (Couldn't reach 'me/tiny' on the Hub"), done.stderr
    assert float(seconds) < 3  # on a busy machine


# --- the commands ---


def test_pretrain_and_evaluate_read_tables(cli, data, tmp_path):
    """Both read the texts of a .jsonl. evaluate finds the same loss on its token files."""
    table = tmp_path / "a.jsonl"
    table.write_text("".join(json.dumps({"id": i, "review": row}) + "\n" for i, row in enumerate(ROWS)))
    column = ["--data", table, "--text-column", "review"]
    succeed(cli("pretrain", *column, "--tokenizer", "byte", *SMALL, "--steps", 2, "--out", tmp_path / "run"))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["train_tokens"] + record["valid_tokens"] == sum(len(row.encode()) + 1 for row in ROWS)
    measured = json.loads(succeed(cli("evaluate", "--from", tmp_path / "run", *column, "--json")).out)
    succeed(cli("prepare", *column, "--valid", table, "--tokenizer", tmp_path / "run", "--out", tmp_path / "tokens"))
    tokens = tmp_path / "tokens" / "train.bin"
    again = json.loads(succeed(cli("evaluate", "--from", tmp_path / "run", "--data", tokens, "--json")).out)
    assert (measured["loss"], measured["tokens"]) == (again["loss"], again["tokens"])
    assert measured["bits_per_byte"] > 0
    refused = cli("evaluate", "--from", tmp_path / "run", "--data", table)
    assert refused.code == 2
    assert re.search(r"a\.jsonl, line 1: no column 'text'; it has 'id', 'review'", " ".join(refused.err.split()))
