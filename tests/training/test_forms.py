"""LAMBADA- and HellaSwag-form files, and text in windows: figures against transformers' model on the same weights."""

import json
import math
import re

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from gpt_fast import GPTConfig, GPTForCausalLM
from gpt_fast.data.reading.rows import RowOptions
from gpt_fast.training import evaluate, forms
from tests.command_line import succeed

pytestmark = pytest.mark.usefixtures("one_thread")

V, T = 61, 12
PLAIN = RowOptions()


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"num_tokens": V, "hidden_dim": 32, "num_heads": 4, "num_layers": 2, "seq_len": T, "dropout": 0.1}
    return GPTForCausalLM(GPTConfig.preset("gpt2", init_std=0.3, start_token=60, **sizes)).double()


def their_score(theirs, context, continuation):
    """Return the log-probability of `continuation` by transformers' model, and whether greedy decoding gives it."""
    inputs = torch.tensor([[*context, *continuation][-(T + 1) : -1]])
    with torch.no_grad():
        logits = theirs(inputs).logits[0, -len(continuation) :].double()
    total = logits.log_softmax(-1)[torch.arange(len(continuation)), torch.tensor(continuation)].sum()
    return float(total), logits.argmax(-1).tolist() == continuation


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_last_words_against_transformers(model, tokenizer, tmp_path):
    """Half of the last words are the model's own choice. Contexts longer than its positions lose their start."""
    pytest.importorskip("transformers", reason="the extra hf is not installed")
    theirs = model.to_hf().eval()
    rows, found = [], []
    for i in range(20):
        context = torch.randint(1, 60, (3 + i,)).tolist()
        with torch.no_grad():
            likeliest = int(theirs(torch.tensor([context[-T:]])).logits[0, -1].argmax())
        word = likeliest if i % 2 else 7
        rows.append({"text": " ".join(f"w{token}" for token in [*context, word])})
        found.append(their_score(theirs, context, [word]))
    path = write(tmp_path / "lambada.jsonl", rows)
    result = forms.evaluate_form("lambada", model, tokenizer, path, PLAIN)
    loss = -sum(log_prob for log_prob, _ in found) / 20
    assert result["last_word_accuracy"] == sum(is_greedy for _, is_greedy in found) / 20 >= 0.5
    assert result["last_word_loss"] == pytest.approx(loss, rel=1e-6)
    assert result["last_word_perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert result["examples"] == 20


def test_endings_against_transformers(model, tokenizer, tmp_path):
    """Endings have unequal lengths, so that the accuracies by total, by character and by token differ."""
    pytest.importorskip("transformers", reason="the extra hf is not installed")
    theirs = model.to_hf().eval()
    rows, right = [], [0, 0, 0]
    generator = torch.Generator().manual_seed(1)
    for i in range(40):
        context = torch.randint(1, 60, (4,), generator=generator).tolist()
        endings = [torch.randint(1, 60, (1 + (i + j) % 4,), generator=generator).tolist() for j in range(4)]
        texts = [" ".join(f"w{token}" for token in ending) for ending in endings]
        totals = [their_score(theirs, context, ending)[0] for ending in endings]
        for k, sizes in enumerate(([1] * 4, list(map(len, texts)), list(map(len, endings)))):
            values = [total / size for total, size in zip(totals, sizes, strict=True)]
            right[k] += values.index(max(values)) == i % 4
        rows.append({"ctx": " ".join(f"w{token}" for token in context), "endings": texts, "label": i % 4})
    result = forms.evaluate_form("hellaswag", model, tokenizer, write(tmp_path / "h.jsonl", rows), PLAIN)
    names = ("choice_accuracy", "choice_accuracy_norm", "choice_accuracy_per_token")
    assert [result[name] for name in names] == [count / 40 for count in right]
    assert len(set(right)) == 3
    assert (result["chance"], result["examples"]) == (0.25, 40)


def test_the_published_columns_make_the_context(tmp_path):
    row = {
        "activity_label": "Removing ice", "ctx_a": "A man [title] is here.", "ctx_b": "the Man [substeps]",
        "ctx": "another text", "endings": ["[step] goes  home.", "stays. [title] sleeps."], "label": "1",
    }  # fmt: skip
    path = write(tmp_path / "h.jsonl", [row])
    (question,) = forms.read_endings(path, None, "endings", "label", PLAIN)
    assert question.context == "Removing ice: A man. is here. The man "
    assert question.choices == ("  goes home.", " stays.. sleeps.")  # as lm-evaluation-harness cleans them
    assert question.answer == 1
    (raw,) = forms.read_endings(path, "ctx", "endings", "label", PLAIN)
    assert (raw.context, raw.choices[0]) == ("another text", " [step] goes  home.")


def test_columns_by_name(tmp_path):
    path = tmp_path / "q.csv"
    path.write_text("q,a,b,right\nw1 w2,w3,w4,1\n")
    (question,) = forms.read_endings(path, "q", "a,b", "right", PLAIN)
    assert (question.context, question.choices, question.answer) == ("w1 w2", (" w3", " w4"), 1)


def test_spaces_at_the_end_of_a_context_belong_to_the_ending(model):
    """Byte-level BPE encodes a space with the word after it, so the ending must begin before the space."""
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary = {"a": 0, "Ġb": 1, "Ġ": 2, "b": 3}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ġ", "b")]))
    tokenizer.pre_tokenizer = pieces
    for context, choice in (("a", " b"), ("a ", "b")):
        assert forms.continuation_ids(model, tokenizer, forms.Question("", context, ()), choice) == ([0], [1])
    assert forms.continuation_ids(model, tokenizer, forms.Question("", "", ()), " b") == ([60], [1])


BAD_ROWS = {
    "one word": ("lambada", {"text": "word"}, "'text' has 'word'; expected words with a space between"),
    "a space at the end": ("lambada", {"text": "two words "}, "expected words with a space between"),
    "a number": ("lambada", {"text": 3}, "column 'text' holds 3; expected a text"),
    "no text": ("lambada", {"words": "a b"}, "no column 'text'; it has 'words'"),
    "one ending": ("hellaswag", {"ctx": "a", "endings": ["b"], "label": 0}, "expected a list of two texts or more"),
    "an empty ending": ("hellaswag", {"ctx": "a", "endings": ["b", ""], "label": 0}, "expected a list of two texts"),
    "no label": ("hellaswag", {"ctx": "a", "endings": ["b", "c"], "label": ""}, "holds ''; expected the number"),
    "a label too large": ("hellaswag", {"ctx": "a", "endings": ["b", "c"], "label": 2}, "the right choice, 0 to 1"),
    "a negative label": ("hellaswag", {"ctx": "a", "endings": ["b", "c"], "label": -1}, "the right choice, 0 to 1"),
    "a long ending": (
        "hellaswag",
        {"ctx": "w1", "endings": ["w2", "w3 " * (T + 1)], "label": 0},
        f"has {T + 1} tokens; expected 1 to {T}",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_named(model, tokenizer, tmp_path, case):
    form, row, message = BAD_ROWS[case]
    good = {"text": "w1 w2", "ctx": "w1", "endings": ["w2", "w3"], "label": 0}
    path = write(tmp_path / "t.jsonl", [good, row])
    with pytest.raises(ValueError, match=rf"line 2.*{re.escape(message)}"):
        forms.evaluate_form(form, model, tokenizer, path, PLAIN)


def test_an_empty_file(model, tokenizer, tmp_path):
    (tmp_path / "t.csv").write_text("text\n")
    with pytest.raises(ValueError, match="has no row"):
        forms.evaluate_form("lambada", model, tokenizer, tmp_path / "t.csv", PLAIN)


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_reads_both_forms(cli, data, tmp_path):
    texts = write(tmp_path / "l.jsonl", [{"text": "the red fox runs 7"}, {"text": "the blue fox"}])
    result = json.loads(succeed(cli("evaluate", "--from", data.lm, "--data", texts, "--form", "lambada", "--json")).out)
    assert (result["task"], result["examples"]) == ("lambada", 2)
    assert result["last_word_perplexity"] == pytest.approx(math.exp(result["last_word_loss"]))
    shown = succeed(cli("evaluate", "--from", data.lm, "--data", texts, "--form", "lambada")).out
    assert "written by greedy decoding" in shown
    rows = [{"q": "the red", "c": ["fox", "times times"], "a": 0}]
    named = ["--text-column", "q", "--pair-column", "c", "--label-column", "a"]
    command = [
        "evaluate",
        "--from",
        data.lm,
        "--data",
        write(tmp_path / "h.jsonl", rows),
        "--form",
        "hellaswag",
        *named,
    ]
    result = json.loads(succeed(cli(*command, "--json")).out)
    assert (result["chance"], result["examples"]) == (0.5, 1)
    assert "by chance: 50.0%" in succeed(cli(*command)).out


def test_text_in_windows(cli, data):
    """With --stride every token is scored once, including those after the last whole window. The loss is their mean."""
    command = ["evaluate", "--from", data.lm, "--data", data.text, "--json"]
    plain = json.loads(succeed(cli(*command)).out)
    windowed = json.loads(succeed(cli(*command, "--stride", 16)).out)
    size, words = (len(part) for part in (data.text.read_bytes(), data.text.read_text().split()))
    assert plain["tokens"] < windowed["tokens"] == size + 1  # bytes and the start token
    assert windowed["stride"] == 16
    assert windowed["words"] == words
    bits = windowed["loss"] / math.log(2) * windowed["tokens"]
    assert windowed["bits_per_byte"] == pytest.approx(bits / size)
    assert windowed["bits_per_word"] == pytest.approx(bits / words)
    model = evaluate.load_run(data.lm, "cpu").eval()
    tokens = torch.tensor([[model.config.start_token, *data.text.read_bytes()]])
    losses = []
    for begin in range(0, tokens.shape[1], 16):  # window by window, as transformers' guide has it
        end = min(begin + 32, tokens.shape[1])
        labels = tokens[:, begin:end].clone()
        labels[:, : max(1, (begin and begin + 16) - begin)] = -100
        with torch.no_grad():
            losses.append((float(model(tokens[:, begin:end], labels).loss), int((labels != -100).sum())))
        if end == tokens.shape[1]:
            break
    assert sum(count for _, count in losses) == tokens.shape[1] - 1
    assert windowed["loss"] == pytest.approx(sum(a * b for a, b in losses) / (tokens.shape[1] - 1), rel=1e-5)
    assert "bits per word" in succeed(cli(*command[:-1], "--stride", 16)).out
