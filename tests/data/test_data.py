"""Tokenizers, corpora, snippets, masking and batches."""

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_fast.config import IGNORE
from gpt_fast.data import batches, corpus, example_batches, snippets
from gpt_fast.data import tokenizer as tok
from gpt_fast.data.example_batches import Example, Marks
from gpt_fast.data.masking import mask_tokens
from gpt_fast.data.stream import TokenStream, WindowOrder, mix, shuffled

TEXT = "def f(x):\r\n\treturn x  # naïve — 日本 🙂\n\n\nclass A:\n    pass\n" * 5
SPECIAL = list(tok.SPECIAL_TOKENS.values())
ODD = [*SPECIAL, "a<|mask|>b", "\r\n\r \x00", "  x  ", "🙂" * 3, ""]


@pytest.fixture(scope="module")
def trained() -> dict:
    return {"bpe": tok.train_bpe([TEXT], 300), "byte": tok.byte_tokenizer(), "char": tok.char_tokenizer([TEXT])}


# --- tokenizers ---


@pytest.mark.parametrize("kind", ["bpe", "byte"])
@settings(max_examples=60, deadline=None)
@given(
    text=st.one_of(
        st.text(max_size=40), st.sampled_from([*SPECIAL, "a<|mask|>b", "\r\n\r \x00", "  x  ", "🙂" * 3, ""])
    )
)
def test_text_comes_back_exactly(trained, kind, text):
    """This holds for any Unicode text, also for untrained text and text that is spelled like a special token."""
    ids = tok.encode(trained[kind], text)
    assert tok.decode(trained[kind], ids) == text


def test_byte_ids_are_bytes(trained):
    assert tok.encode(trained["byte"], "aé\n") == [*"aé\n".encode()]
    assert tok.vocabulary_size(trained["byte"]) == 261


def test_char_knows_its_text_and_marks_the_rest(trained):
    tokenizer = trained["char"]
    assert tok.decode(tokenizer, tok.encode(tokenizer, TEXT)) == TEXT
    assert tok.encode(tokenizer, "aZ")[1] == tokenizer.token_to_id(tok.UNKNOWN)


@pytest.mark.parametrize("kind", ["bpe", "byte", "char"])
def test_special_tokens_are_reserved_and_out_of_reach_of_text(trained, kind, tmp_path):
    tok.save_tokenizer(trained[kind], tmp_path / "tokenizer.json")
    for tokenizer in (trained[kind], tok.load_tokenizer(tmp_path)):
        special = tok.special_ids(tokenizer)
        assert len(set(special.values())) == 5
        assert max(special.values()) < tok.vocabulary_size(tokenizer)
        assert not set(special.values()) & set(tok.encode(tokenizer, "".join(SPECIAL)))


def test_bpe_training_is_deterministic():
    first, second = (tok.train_bpe([TEXT, TEXT[:40]], 290).to_str() for _ in range(2))
    assert first == second


def test_bpe_needs_room_for_the_bytes():
    with pytest.raises(ValueError, match=r"100.*256 bytes"):
        tok.train_bpe([TEXT], 100)


def test_foreign_tokenizer_gets_the_special_tokens(tmp_path):
    """The foreign tokenizer.json has truncation, and an end token that its encode would append."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    foreign = Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1, "</s>": 7}, unk_token="<unk>"))
    foreign.pre_tokenizer = pre_tokenizers.Whitespace()
    foreign.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 7)])
    foreign.enable_truncation(2)
    foreign.save(str(tmp_path / "theirs.json"))
    tokenizer = tok.make_tokenizer(str(tmp_path / "theirs.json"), [], 0)
    assert tok.encode(tokenizer, "hello hello hello") == [1, 1, 1]
    assert tok.vocabulary_size(tokenizer) == max(*tok.special_ids(tokenizer).values(), 7) + 1


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b'"text"', b"3", b"{}", b'{"model": {"type": "x"}}', b'\xff{"model": 1}']
)
def test_what_is_no_tokenizer(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer.json: not a tokenizer.json"):
        tok.load_tokenizer(path)


def test_unknown_tokenizer():
    with pytest.raises(ValueError, match="no such file; expected bpe, byte, char or the path"):
        tok.make_tokenizer("bqe", [], 300)


# --- corpora ---


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def test_many_files_split_by_file(tmp_path):
    write(tmp_path, {f"sub/{i}.txt": f"file {i}\r\n" * 9 for i in range(40)} | {".hidden/x": b"\xff", "sub/empty": ""})
    read = corpus.read_corpus([tmp_path])
    assert read == corpus.read_corpus([tmp_path])
    names = [document.name for document in read.train + read.valid]
    assert sorted(names) == sorted(f"sub/{i}.txt" for i in range(40))
    assert 2 <= len(read.valid) <= 4
    assert all("\r\n" in document.text for document in read.train)


def test_few_files_split_at_a_line(tmp_path):
    text = "".join(f"line {i}\n" for i in range(100))
    write(tmp_path, {"a.txt": text})
    read = corpus.read_corpus([tmp_path / "a.txt"])
    assert read.train[0].text + read.valid[0].text == text
    assert read.valid[0].text.startswith("\nline ")
    assert 0.08 < len(read.valid[0].text) / len(text) < 0.12


@pytest.mark.parametrize(
    ("files", "path", "message"),
    [
        ({}, "none.txt", "none.txt: no such file"),
        ({"a.txt": " \n"}, "a.txt", "a.txt: empty"),
        ({"d/.x": "hidden"}, "d", "d: no files"),
        ({"d/a.txt": "fine", "d/b.txt": b"caf\xe9"}, "d", "b.txt: not UTF-8"),
    ],
)
def test_text_that_cannot_be_read(tmp_path, files, path, message):
    write(tmp_path, files)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        corpus.read_corpus([tmp_path / path])


@pytest.fixture(scope="module")
def stdlib() -> corpus.Corpus:
    return corpus.read_corpus(None)


def test_standard_library(stdlib):
    """The corpus has no tests. A tenth of the text is held out in whole files, some from every larger package."""
    train, valid = ({document.name for document in part} for part in (stdlib.train, stdlib.valid))
    assert not train & valid
    assert "argparse.py" in train | valid
    assert not [name for name in train | valid if re.search(r"(^|/)(tests?|idle_test|site-packages)/", name)]
    sizes = [sum(len(document.text) for document in part) for part in (stdlib.train, stdlib.valid)]
    assert sum(sizes) > 2_000_000
    assert 0.08 < sizes[1] / sum(sizes) < 0.11
    for name in snippets.chosen_packages(stdlib.train + stdlib.valid):
        assert any(document.startswith(f"{name}/") for document in valid), name


# --- snippets ---


def test_snippets_do_not_name_their_package(stdlib):
    train, valid = snippets.snippet_table()
    names = snippets.chosen_packages(stdlib.train + stdlib.valid)
    assert len(names) == snippets.NUM_CLASSES
    assert set(train.labels) == set(valid.labels) == set(names)
    assert not [text for text in train.texts + valid.texts if re.search("|".join(names), text, re.IGNORECASE)]
    assert max(train.labels.count(name) for name in names) < 0.2 * len(train)


def test_snippets_split_by_file(stdlib):
    """No snippet is in both tables, and the snippets for validation come from held-out files."""
    train, valid = snippets.snippet_table()
    assert not set(train.texts) & set(valid.texts)
    held_out = "\n".join(document.text for document in stdlib.valid)
    kept = [line for text in valid.texts for line in text.splitlines() if len(line) > 40]
    assert all(line in held_out for line in kept)


def test_snippets_leave_imports_and_names_out():
    text = "import os\nfrom a.b import c\nx = Email(1)\nimportant = 1\n" + "y = 2\n" * 60
    (piece,) = snippets.snippets(text, ["email", "xml"])
    assert piece.splitlines()[0] == "important = 1"
    assert "Email" not in piece


# --- masking ---


def test_masking_rates():
    """15 % of the tokens have labels. Of these 80 % are masked, 10 % random and 10 % kept. Other tokens stay."""
    generator = torch.Generator().manual_seed(0)
    ordinary = torch.arange(5, 1000)
    tokens = torch.randint(5, 1000, (200, 500), generator=generator)
    inputs, labels = mask_tokens(tokens, generator, mask_token=1, ordinary=ordinary)
    asked = labels != IGNORE
    assert (labels[asked] == tokens[asked]).all()
    assert (inputs[~asked] == tokens[~asked]).all()
    N = asked.sum().item()
    assert N / tokens.numel() == pytest.approx(0.15, abs=0.005)
    assert (inputs[asked] == 1).sum() / N == pytest.approx(0.8, abs=0.02)
    changed = asked & (inputs != 1) & (inputs != tokens)
    assert changed.sum() / N == pytest.approx(0.1, abs=0.02)
    assert inputs[changed].min() >= 5


@pytest.mark.parametrize(
    ("shape", "ordinary", "rate", "message"),
    [
        ((3,), 5, 0.15, r"shape \[3\]; expected \[B, T\]"),
        ((1, 3), 0, 0.15, "ordinary is empty"),
        ((1, 3), 5, 1.5, "rate is 1.5"),
    ],
)
def test_masking_refuses(shape, ordinary, rate, message):
    tokens, ids = torch.zeros(shape, dtype=torch.int64), torch.arange(ordinary)
    with pytest.raises(ValueError, match=message):
        mask_tokens(tokens, torch.Generator(), mask_token=1, ordinary=ids, rate=rate)


def test_masking_is_seeded():
    tokens = torch.arange(10, 110).view(2, 50)
    ordinary = torch.arange(5, 200)
    first, second, other = (
        mask_tokens(tokens, torch.Generator().manual_seed(seed), mask_token=1, ordinary=ordinary) for seed in (3, 3, 4)
    )
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[1], other[1])


def test_masking_spares_special_tokens_and_asks_something_of_every_row():
    """Ids 0 to 4 and 300 (past the ordinary ones) are special; the last row has no ordinary token at all."""
    tokens = torch.tensor([[0, 2, 7, 4], [9, 3, 3, 300], [0, 1, 2, 300]])
    for seed in range(50):
        _, labels = mask_tokens(
            tokens, torch.Generator().manual_seed(seed), mask_token=1, ordinary=torch.arange(5, 300), rate=0.01
        )
        assert labels.tolist() == [[-100, -100, 7, -100], [9, -100, -100, -100], [-100] * 4]


# --- batches ---


def test_stream_and_windows():
    stream = batches.token_stream([[5, 6, 7], [8, 9]], start_token=2)
    assert stream.read(0, 99).tolist() == [2, 5, 6, 7, 2, 8, 9]
    assert batches.lm_windows(stream, 3).tolist() == [[2, 5, 6], [7, 2, 8]]
    assert batches.lm_windows(TokenStream([np.arange(100)]), 10, most=3).tolist()[1][0] == 30
    with pytest.raises(ValueError, match="7 tokens, fewer than a window of 8"):
        batches.lm_windows(stream, 8)
    with pytest.raises(ValueError, match="most has 0; expected at least 1"):
        batches.lm_windows(stream, 3, most=0)
    assert stream.windows([], 3).shape == (0, 3)


def test_reading_across_arrays():
    """A stream of several arrays, an empty one among them, is read like one."""
    whole = np.arange(50)
    stream = TokenStream([whole[:7], whole[7:7], whole[7:8].astype(np.uint16), whole[8:]])
    assert len(stream) == 50
    for start, length in ((0, 50), (5, 4), (7, 1), (6, 1), (8, 42), (49, 1)):
        assert stream.read(start, length).tolist() == list(range(start, start + length))
    assert stream.counts().tolist() == [1] * 50


@pytest.mark.parametrize("size", [1, 2, 3, 17, 64, 1000])
def test_shuffled_is_a_permutation(size):
    for key in (0, 1, 2**63):
        assert sorted(shuffled(i, size, key) for i in range(size)) == list(range(size))


def test_shuffling_by_seed():
    first, again, other = ([shuffled(i, 500, mix(seed)) for i in range(500)] for seed in (3, 3, 4))
    assert first == again != other
    # As many ascents as a random permutation has: 249.5 on average, with a standard deviation of 6.5.
    assert abs(sum(a < b for a, b in pairwise(first)) - 249.5) < 30


def test_a_pass_visits_every_window_once():
    """A pass has no token twice and leaves out tokens only at the ends. Passes differ in order and offset."""
    order = WindowOrder(1003, 10, seed=5)
    passes = [[order.start(p * order.per_pass + i) for i in range(order.per_pass)] for p in range(6)]
    for starts in passes:
        assert np.diff(sorted(starts)).tolist() == [10] * (order.per_pass - 1)
        assert min(starts) < 10
        assert max(starts) + 10 <= 1003
        assert min(starts) + 1003 - (max(starts) + 10) < 20
    assert len({min(starts) for starts in passes}) > 2
    assert len({tuple(starts) for starts in passes}) == 6


@pytest.mark.parametrize(("num_tokens", "seq_len"), [(10, 10), (12, 10), (19, 10), (21, 10), (30, 10)])
def test_windows_of_a_short_stream(num_tokens, seq_len):
    order = WindowOrder(num_tokens, seq_len, seed=0)
    starts = [order.start(i) for i in range(300)]
    assert min(starts) == 0 or num_tokens == 30
    assert num_tokens - seq_len - 10 < max(starts) <= num_tokens - seq_len


def test_packing_documents():
    """Each document of a window is a sequence, and so is the rest of a document at the window's beginning."""
    tokens = torch.tensor([[7, 8, 2, 9], [2, 2, 5, 6]])
    batch = batches.packed(batches.causal_batch(tokens), tokens, document_token=2)
    assert batch.tokens.tolist() == [[7, 8, 2, 9, 2, 2, 5, 6]]
    assert batch.labels.tolist() == [[-100, 8, 2, 9, -100, 2, 5, 6]]
    assert batch.cu_seqlens.tolist() == [0, 2, 4, 5, 8]
    assert batch.weight == 6


def test_unigram_entropy():
    assert batches.unigram_entropy(np.array([0, 2, 0, 2])) == pytest.approx(0.6931472)
    assert batches.unigram_entropy(np.ones(64)) == pytest.approx(4.158883)
    with pytest.raises(ValueError, match="expected a text of one token or more"):
        batches.unigram_entropy(np.zeros(4))


MARKS = Marks(start=2, delimiter=3, extract=4, pad=0)


@pytest.mark.parametrize(
    ("texts", "seq_len", "wanted"),
    [
        ([[7, 8, 9]], 5, [2, 7, 8, 9, 4]),
        ([[7, 8, 9, 10]], 5, [2, 7, 8, 9, 4]),
        ([[]], 5, [2, 4]),
        ([[7], [8, 9]], 9, [2, 7, 3, 8, 9, 4]),
        ([[7, 7, 7, 7, 7], [8, 9]], 7, [2, 7, 7, 3, 8, 9, 4]),
        ([[7, 7, 7, 7], [8, 8, 8]], 7, [2, 7, 7, 3, 8, 8, 4]),
        ([[5], [6], [7]], 20, [2, 5, 3, 6, 3, 7, 4]),
    ],
    ids=["fits", "cut", "empty", "pair", "longest is cut", "both are cut", "three"],
)
def test_task_input(texts, seq_len, wanted):
    assert example_batches.task_input(texts, seq_len, MARKS) == wanted


def test_task_input_needs_room_for_its_marks():
    assert example_batches.task_input([[7], [8]], 3, MARKS) == [2, 3, 4]
    with pytest.raises(ValueError, match="2 texts in 2 positions; expected at least 3"):
        example_batches.task_input([[7], [8]], 2, MARKS)


@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=3), seq_len=st.integers(5, 40))
def test_task_input_fills_but_never_exceeds(lengths, seq_len):
    """The longest texts are cut first: a text that is cut keeps at most one token less than any other."""
    row = example_batches.task_input([[9 + i] * length for i, length in enumerate(lengths)], seq_len, MARKS)
    assert len(row) == min(seq_len, sum(lengths) + len(lengths) + 1)
    kept = [row.count(9 + i) for i in range(len(lengths))]
    cut = [length for length, left in zip(lengths, kept, strict=True) if left < length]
    assert not cut or min(kept[i] for i in range(len(kept)) if kept[i] < lengths[i]) + 1 >= max(kept)


def test_task_batches():
    """Rows have one sequence, several sequences, or a text of which only the answer has labels."""
    one = example_batches.task_batch([Example([[2, 7, 4]], 1), Example([[2, 4]], 0)], 0)
    assert one.tokens.tolist() == [[2, 7, 4], [2, 4, 0]]
    assert (one.labels.tolist(), one.lengths.tolist(), one.weight) == ([1, 0], [3, 2], 2)
    pairs = example_batches.task_batch([Example([[2, 3, 4], [2, 4]], 0.5)], 0, numbers=True)
    assert pairs.tokens.tolist() == [[[2, 3, 4], [2, 4, 0]]]
    assert (pairs.lengths.tolist(), pairs.labels.tolist(), pairs.labels.dtype) == ([[3, 2]], [0.5], torch.float32)
    written = example_batches.task_batch([Example([[2, 7, 3, 8, 4]], answer=3), Example([[2, 3, 4]], answer=2)], 0)
    assert written.labels.tolist() == [[-100, -100, -100, 8, 4], [-100, -100, 4, -100, -100]]
    assert written.weight == 3
    with pytest.raises(ValueError, match="batch_size is 0; expected at least 1"):
        list(example_batches.task_batches([Example([[2, 4]])], 0, 0))
