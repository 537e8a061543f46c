"""Labels of other kinds than one class a row: sets of classes, a tag for each word, a span of a text."""

import json
import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from gpt_fast import GPTConfig, GPTForQuestionAnswering, GPTForSequenceClassification, GPTForTokenClassification
from gpt_fast.data.example_batches import Context, Example, task_batch
from gpt_fast.data.tokenizer import byte_tokenizer, special_ids, train_bpe
from gpt_fast.training import table_examples, tasks
from gpt_fast.training.compare import logits_and_gradients, random_batch
from gpt_fast.training.metrics import entities, multi_label_metrics, span_metrics, span_text, tag_metrics
from tests import numerics

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"num_tokens": 261, "hidden_dim": 16, "num_heads": 2, "num_layers": 1, "seq_len": 40, "dropout": 0.0}
SPECIAL = special_ids(byte_tokenizer())


def config(**options) -> GPTConfig:
    return GPTConfig.preset("gpt2", **(SIZES | options), classifier_dropout=0.0, **SPECIAL)


def read(tmp_path: Path, task: str, rows: list[dict], tokenizer=None, **options):
    """Write `rows` to a table, and return the names of its labels and its examples for `task`."""
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = tasks.task_settings(task, None, None, None, False)
    table = table_examples.read_task_table(path, settings)
    names = table_examples.label_names(table, settings)
    return names, table_examples.examples(table, settings, names, tokenizer or byte_tokenizer(), config(**options))


def spelled(row: Example) -> str:
    letters = {SPECIAL["start_token"]: "|", SPECIAL["delimiter_token"]: "/", SPECIAL["extract_token"]: "!"}
    return "".join(letters.get(token, chr(token)) for token in row.sequences[0])


# --- sets ---


def test_sets_of_classes(tmp_path):
    """Sets are lists or texts with commas, and may be empty."""
    rows = [{"text": "a", "labels": ["x", "z"]}, {"text": "b", "labels": "z, y"}, {"text": "c", "labels": []}]
    names, found = read(tmp_path, "multi-label", [*rows, {"text": "d", "labels": ""}])
    assert names == ["x", "y", "z"]
    assert [row.target for row in found] == [[1, 0, 1], [0, 1, 1], [0, 0, 0], [0, 0, 0]]
    batch = task_batch(found, 0, numbers=True)
    assert batch.labels.dtype == torch.float32 and batch.labels.shape == (4, 3)


@pytest.mark.parametrize("weights", [None, (0.5, 2.0, 3.0)])
def test_the_loss_of_sets_is_torchs(weights):
    torch.manual_seed(0)
    model = GPTForSequenceClassification(config(num_labels=3, problem="multi_label"))
    model.weigh_classes(weights)
    tokens, labels = torch.randint(200, (5, 7)), torch.randint(2, (5, 3)).float()
    loss, logits = model(tokens, labels)
    exact = weights and torch.tensor(weights, dtype=torch.float64)
    numerics.assert_rounded_once(loss, nn.BCEWithLogitsLoss(pos_weight=exact)(logits.double(), labels.double()))
    with pytest.raises(ValueError, match=r"labels is int64 \[5, 3\]; expected floating point \[5, 3\]"):
        model(tokens, labels.long())


def test_transformers_has_the_same_loss_of_sets():
    torch.manual_seed(0)
    model = GPTForSequenceClassification(config(num_labels=3, problem="multi_label", classifier_bias=False)).eval()
    theirs = model.to_hf().eval()
    assert theirs.config.problem_type == "multi_label_classification"
    tokens, labels = torch.randint(200, (5, 7)), torch.randint(2, (5, 3)).float()
    torch.testing.assert_close(model(tokens, labels).loss, theirs(tokens, labels=labels).loss)
    assert GPTForSequenceClassification.from_hf(theirs).config.problem == "multi_label"


def test_the_metrics_of_sets():
    """The figures are counted by hand. Class 0: 1 right, 1 missed; class 1: 1 right, 1 too many; class 2: 2 right."""
    truth = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 0, 1], [0, 0, 0]])
    logits = torch.tensor([[1.0, -1, 2], [-1, 3, -1], [-2, 1, 1], [-1, -1, -1]])
    measured = multi_label_metrics(logits, truth.float())
    assert measured["accuracy"] == pytest.approx(2 / 4)
    assert measured["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert measured["micro_f1"] == pytest.approx(2 * 4 / (5 + 5))
    assert measured["majority_accuracy"] == pytest.approx(1 / 4)
    likelihood = [math.log1p(math.exp(-x if t else x)) for x, t in zip(logits.flatten(), truth.flatten(), strict=True)]
    assert measured["loss"] == pytest.approx(sum(likelihood) / 12, rel=1e-6)


# --- tags ---


def test_a_tag_stands_at_the_last_token_of_its_word(tmp_path):
    """Words are a list, or a text with spaces. A word that does not fit is cut off and has no tag."""
    rows = [{"tokens": ["ab", "c", "def"], "tags": [2, 0, 1]}, {"tokens": "g  hi", "tags": "0 1"}]
    names, (first, second) = read(tmp_path, "token-classification", rows)
    assert names == ["0", "1", "2"]
    assert spelled(first) == "|ab c def!" and spelled(second) == "|g hi!"
    no = -100
    assert first.tags == [no, no, 2, no, 0, no, no, no, 1, no]
    assert second.tags == [no, 0, no, no, 1, no]
    assert task_batch([first, second], 0).labels.tolist() == [first.tags, second.tags + [no] * 4]
    _, (cut, _) = read(tmp_path, "token-classification", rows, seq_len=8)
    assert spelled(cut) == "|ab c d!" and cut.tags == [no, no, 2, no, 0, no, no, no]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["x"]}, "line 2: 1 tags of 2 words; expected one for each"),
        ({"tokens": ["a b"], "tags": ["x"]}, "line 2: column 'tokens' holds 'a b' in a list; expected a word without"),
        ({"tokens": ["a"], "tags": ["x y"]}, "line 2: column 'tags' holds 'x y' in a list; expected a label without"),
        (
            {"tokens": ["a"], "tags": [None]},
            "line 2: column 'tags' holds None in a list; expected a label without spaces",
        ),
    ],
)
def test_tags_that_are_refused(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, "token-classification", [{"tokens": ["a", "b"], "tags": ["x", "y"]}, row])


def test_entities():
    """Entities are counted as CoNLL's script does: an I- tag after a tag of another kind begins an entity."""
    assert entities(["B-X", "I-X", "O", "I-X", "B-X", "B-Y", "I-X", "O"]) == [
        (0, 1, "X"), (3, 3, "X"), (4, 4, "X"), (5, 5, "Y"), (6, 6, "X"),
    ]  # fmt: skip
    names = ["B-X", "I-X", "O"]
    rows = [Example([[1] * 4], tags=[-100, 0, 1, 2]), Example([[1] * 3], tags=[0, 2, -100])]
    answers = [[2, 0, 1, 2], [0, 1, 2]]  # the first entity is right, the second is too long
    logits = [torch.nn.functional.one_hot(torch.tensor(row), 3).float() for row in answers]
    measured = tag_metrics(logits, rows, names)
    assert measured["entity_f1"] == pytest.approx(0.5)
    assert measured["accuracy"] == pytest.approx(4 / 5)
    assert (measured["words"], measured["examples"]) == (5, 2)
    assert "entity_f1" not in tag_metrics(logits, rows, ["a", "b", "c"])


# --- spans ---

TEXT = "Der Fuchs lief über den Hügel, der Fuchs schlief."


def squad(answer: str, start: int | None) -> dict:
    answers = {"text": [answer] if answer else [], "answer_start": [start] if answer else []}
    return {"context": TEXT, "question": "Wer?", "answers": answers if start is not None or not answer else answer}


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_a_span_is_that_of_the_text(tmp_path, kind):
    """With either tokenizer the tokens of a span hold the answer, and at most a space before it."""
    tokenizer = byte_tokenizer() if kind == "byte" else train_bpe([TEXT] * 20, 280)
    starts = {"Fuchs": 35, "Hügel": 24, "schlief": 41}
    rows = [squad(answer, start) for answer, start in starts.items()] + [squad("Fuchs", None)]
    _, found = read(tmp_path, "answer-span", rows, tokenizer, seq_len=80, num_tokens=300)
    for row, (answer, start) in zip(found, [*starts.items(), ("Fuchs", 4)], strict=True):
        first, last = (position - row.context.begin for position in row.target)
        assert row.context.offsets[first][0] in (start - 1, start), answer  # a token may hold the space before
        assert row.context.offsets[last][1] == start + len(answer)
        logits = torch.zeros(2, len(row.sequences[0]))
        logits[0, row.target[0]] = logits[1, row.target[1]] = 1.0
        assert span_text(logits, row) == answer


def test_rows_without_an_answer_or_with_one_that_was_cut_off(tmp_path):
    _, (without, cut) = read(tmp_path, "answer-span", [squad("", None), squad("schlief", 41)])
    last = len(without.sequences[0]) - 1
    assert without.target == [last, last] and spelled(without).startswith("|Wer?/Der Fuchs")
    assert cut.target == [-100, -100]
    logits = torch.zeros(2, last + 1)
    logits[:, last] = 1.0
    assert span_text(logits, without) == ""
    measured = span_metrics([logits, logits], [without, cut])
    assert measured["exact_match"] == pytest.approx(0.5)
    assert measured["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits[:1], torch.tensor([last]))))


def test_the_end_of_a_span_is_behind_its_beginning():
    context = Context("abcd", 1, [(0, 1), (1, 2), (2, 3), (3, 4)])
    row = Example([[0] * 6], [1, 1], context=context)
    logits = torch.zeros(2, 6)
    logits[0, 4], logits[1, 2], logits[1, 4] = 2.0, 5.0, 4.0  # the likeliest end stands before the likeliest start
    assert span_text(logits, row) == "d"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (squad("Katze", None), "line 2: answer 'Katze' is not in the text; expected a part of it"),
        (squad("Fuchs", 5), "line 2: answer_start is 5, where the text has 'uchs '; expected 'Fuchs'"),
    ],
)
def test_spans_that_are_refused(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, "answer-span", [squad("Fuchs", 4), row])


@pytest.mark.parametrize(
    ("head", "options"),
    [
        (GPTForQuestionAnswering, {}),
        (GPTForTokenClassification, {"num_labels": 3}),
        (GPTForSequenceClassification, {"num_labels": 3, "problem": "multi_label"}),
    ],
)
def test_compare_draws_labels_that_the_head_takes(head, options):
    model = head(config(**options))
    _, gradients = logits_and_gradients(model, random_batch(model, 2), nullcontext)
    assert all(gradient.abs().max() > 0 for gradient in gradients[-2:])
