"""Generated text: spaces between words, bytes that are no characters, control characters on a terminal."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from gpt_fast import GPTConfig, GPTForCausalLM
from gpt_fast.data import tables
from gpt_fast.data import tokenizer as tok
from gpt_fast_cli import terminal
from gpt_fast_cli.generate import _Text
from tests.command_line import ENVIRONMENT, Result, succeed
from tests.commands.test_bad_input import refuse

TEXT = ["the quick brown fox's dog jumps over the lazy dog . pack my box with five dozen jugs , don't ' s"] * 20


def gpt1() -> Tokenizer:
    """Return GPT-1's kind of tokenizer. A word's last piece ends in </w>, a space unless it ends the text."""
    made = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.BPEDecoder(suffix="</w>")
    options = {"special_tokens": ["<unk>"], "end_of_word_suffix": "</w>", "show_progress": False}
    made.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=150, **options))
    return made


def wordpiece() -> Tokenizer:
    """Return a WordPiece tokenizer. Further pieces of a word begin with ##. Decoding tidies punctuation up."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    options = {"special_tokens": ["[UNK]"], "show_progress": False}
    made.train_from_iterator(TEXT, trainers.WordPieceTrainer(vocab_size=150, **options))
    return made


def sentencepiece() -> Tokenizer:
    """Return a Unigram tokenizer. A word's first piece begins with ▁, which is dropped at the beginning of a text."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    options = {"special_tokens": ["<unk>"], "unk_token": "<unk>", "show_progress": False}
    made.train_from_iterator(TEXT, trainers.UnigramTrainer(vocab_size=90, **options))
    return made


WORDS = pytest.mark.parametrize("make", [gpt1, wordpiece, sentencepiece], ids=lambda make: make.__name__)


def continued(tokenizer: Tokenizer, prompt: str, whole: str, stop: tuple[str, ...] = ()) -> tuple[str, str]:
    """Return the continuation from `prompt` to `whole` twice: as one text, and as it is streamed."""
    ids, context = tok.encode(tokenizer, whole), tok.encode(tokenizer, prompt)
    assert ids[: len(context)] == context
    sample, streamed = _Text(tokenizer, prompt, context, stop, []), ""
    for token in ids[len(context) :]:
        sample.add(token)
        streamed += sample.settled()
    return sample.text(), streamed + sample.rest()


@WORDS
@pytest.mark.parametrize("whole", ["the quick brown fox", "pack my box, don't jump over", "the fox's dog . the box"])
def test_a_continuation_keeps_its_first_space(make, whole):
    """Prompt and continuation together are the text that the tokens decode to, and streaming prints the same."""
    tokenizer = tok.parse_tokenizer(make().to_str())
    prompt = " ".join(whole.split()[:2]).rstrip(",")
    text, streamed = continued(tokenizer, prompt, whole)
    before, decoded = (tok.decode(tokenizer, tok.encode(tokenizer, each), special=False) for each in (prompt, whole))
    assert before + text == decoded
    assert streamed == text
    assert text.startswith((" ", ",")), text


@WORDS
def test_a_prompt_that_ends_in_a_space_gets_no_second_one(make):
    tokenizer = tok.parse_tokenizer(make().to_str())
    context = tok.encode(tokenizer, "the quick")
    sample = _Text(tokenizer, "the quick ", context, (), [])
    for token in tok.encode(tokenizer, "the quick brown")[len(context) :]:
        sample.add(token)
    assert sample.text() == "brown"


def test_a_text_to_stop_at_is_found_behind_the_first_space():
    tokenizer = tok.parse_tokenizer(wordpiece().to_str())
    assert continued(tokenizer, "the quick", "the quick brown fox dog", (" fox",)) == (" brown", " brown")


def test_bytes_are_streamed_without_delay():
    """Byte-level text never changes, so only the bytes of an unfinished character are held back."""
    tokenizer = tok.byte_tokenizer()
    sample, printed = _Text(tokenizer, "a", tok.encode(tokenizer, "a"), (), []), []
    for token in tok.encode(tokenizer, " é!"):
        sample.add(token)
        printed.append(sample.settled())
    assert printed == [" ", "", "é", "!"]


@WORDS
def test_generate_and_evaluate_a_model_without_special_tokens(cli, tmp_path, make):
    """The model has no start, end or padding token, like GPT-1 from transformers."""
    tokenizer = make()
    torch.manual_seed(0)
    sizes = {"num_tokens": tokenizer.get_vocab_size(), "hidden_dim": 16, "num_heads": 2, "num_layers": 1, "seq_len": 32}
    GPTForCausalLM(GPTConfig(**sizes, pre_norm=make is not gpt1)).save_pretrained(tmp_path)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text(TEXT[0])
    command = ["generate", "--from", tmp_path, "--prompt", "the quick", "--max-new-tokens", 8, "--seed", 3]
    text = json.loads(succeed(cli(*command, "--json")).out)["text"]
    assert succeed(cli(*command)).out == f"the quick{text}\n"
    several = succeed(cli(*command, "--num-samples", 2, "--stop", "o")).out
    assert several.count("the quick") == 2
    loaded = tok.load_tokenizer(tmp_path)
    drawn = [token for token in tok.encode(loaded, f"the quick{text}") if token < sizes["num_tokens"]]
    assert len(drawn) > 2
    refuse(cli("generate", "--from", tmp_path), "--prompt '': ", "has no start token to begin a text with")
    result = json.loads(succeed(cli("evaluate", "--from", tmp_path, "--data", tmp_path / "text.txt", "--json")).out)
    assert result["loss"] > 0 and result["bits_per_byte"] > 0


# --- bytes that are no characters ---


def test_half_a_surrogate_pair_is_replaced():
    """JSON can hold half a pair, but UTF-8 cannot, and the tokenizers library raises TypeError for it."""
    tokenizer = tok.byte_tokenizer()
    expected = list("a\ufffdb".encode())
    assert tok.encode(tokenizer, "a\ud800b") == expected
    assert list(tok.encode_documents(tokenizer, ["a\ud800b", "é🙂"])) == [expected, list("é🙂".encode())]
    for kind in ("char", "bpe"):
        made = tok.make_tokenizer(kind, ["a\udcffb"] * 9, 300)
        assert tok.decode(made, tok.encode(made, "a\udcffb")) == "a\ufffdb"


def test_half_a_surrogate_pair_in_a_table_is_told(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "\\ud800b", "label": 2}\n')
    table = tables.read_table(tmp_path / "t.jsonl")
    assert table.notes == [f"{tmp_path}/t.jsonl: half a surrogate pair is read as \ufffd in 1 rows: line 2"]


@pytest.mark.parametrize(
    "command",
    [
        "generate --from {lm} --prompt",
        "generate --from {lm} --stop",
        "predict --from {classifier} --text",
        "predict --from {classifier} --text a --pair",
    ],
)
def test_bytes_on_the_command_line_that_are_no_characters(cli, data, command):
    given = [part.format(**data._asdict()) for part in command.split()]
    refuse(cli(*given, os.fsdecode(b"ab\xff")), f"{given[-1]}: not UTF-8 from character 3 on; expected text")


# --- control characters ---

HOSTILE = "a\tb\nc\x1b[31md\x07\r\x7f\x9b2J\u202e\x00é🙂"
SHOWN = "a\tb\nc\\x1b[31md\\x07\\x0d\\x7f\\x9b2J\\u202e\\x00é🙂"


class Terminal:
    """Stdout that says it is a terminal."""

    def isatty(self) -> bool:
        return True

    def flush(self) -> None:
        """Do nothing."""


def test_control_characters_are_escaped_on_a_terminal_alone(monkeypatch):
    assert terminal.printable(HOSTILE) == HOSTILE
    monkeypatch.setattr(terminal.sys, "stdout", Terminal())
    assert terminal.printable(HOSTILE) == SHOWN
    assert terminal.printable(HOSTILE, raw=True) == HOSTILE


def test_errors_and_messages_are_escaped(capsys):
    """Text on stderr is always escaped, because people read it wherever it goes."""
    terminal.say(HOSTILE)
    terminal.print_error("\x1b]0;title\x07 expected")
    terminal.show_warning("\x1b[2J", UserWarning, "", 0)
    shown = capsys.readouterr().err
    assert SHOWN.partition("\t")[2] in shown  # rich makes spaces of a tab
    assert "gpt-fast: \\x1b]0;title\\x07 expected" in shown and "gpt-fast: \\x1b[2J" in shown
    assert "\x1b]" not in shown and "\x07" not in shown


def test_json_on_a_terminal_is_the_same_json(monkeypatch):
    printed: list[str] = []
    monkeypatch.setattr(terminal.typer, "echo", printed.append)
    terminal.print_json({"text": HOSTILE})
    monkeypatch.setattr(terminal.sys, "stdout", Terminal())
    terminal.print_json({"text": HOSTILE})
    assert [json.loads(line) for line in printed] == [{"text": HOSTILE}] * 2
    assert "\x9b" in printed[0] and not any(ord(c) < 32 or 127 <= ord(c) < 160 or c == "\u202e" for c in printed[1])


def on_a_terminal(*command: object) -> Result:
    """Return what a command prints when its stdout is a terminal."""
    ours, theirs = pty.openpty()
    arguments = [sys.executable, "-m", "gpt_fast", *map(str, command)]
    with subprocess.Popen(arguments, env=ENVIRONMENT, stdout=theirs, stderr=subprocess.PIPE) as process:
        os.close(theirs)
        printed = b""
        while True:
            try:
                block = os.read(ours, 4096)
            except OSError:  # Linux raises this at the end
                break
            if not block:
                break
            printed += block
        error = process.stderr.read().decode() if process.stderr else ""
    os.close(ours)
    return Result(process.returncode, printed.decode(), error, [process.returncode])


def test_generate_and_predict_on_a_terminal(cli, data, tmp_path: Path):
    """Control characters are escaped on a terminal, but not with --raw or in a pipe."""
    command = ["generate", "--from", data.lm, "--prompt", "a\x1b[31m", "--max-new-tokens", 1, "--temperature", 0]
    assert on_a_terminal(*command).out.startswith("a\\x1b[31m")
    assert on_a_terminal(*command, "--raw").out.startswith("a\x1b[31m")
    assert succeed(cli(*command)).out.startswith("a\x1b[31m")
    (tmp_path / "t.csv").write_text("text\nred\x1b[2J fox\n")
    assert (
        on_a_terminal("predict", "--from", data.classifier, "--data", tmp_path / "t.csv")
        .out.rstrip()
        .endswith("red\\x1b[2J fox")
    )
