"""The tasks: two heads that read several sequences, the input of each task, and its training."""

import dataclasses
import json
import random
import statistics
import typing
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torchmetrics.classification import MulticlassMatthewsCorrCoef

from gpt_fast import GPTConfig, GPTForMultipleChoice, GPTForSimilarity
from gpt_fast.data.example_batches import Example
from gpt_fast.data.labels import ANSWERS
from gpt_fast.data.tables import Table
from gpt_fast.data.tokenizer import byte_tokenizer, special_ids
from gpt_fast.training import evaluate, finetune, predict, pretrain, tasks
from gpt_fast.training import table_examples as examples
from gpt_fast.training.metrics import classification_metrics, generated_metrics
from gpt_fast.training.runs import schemas
from gpt_fast.training.runs.folder import read_record

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"num_tokens": 40, "hidden_dim": 16, "num_heads": 2, "num_layers": 2, "seq_len": 16}
EXTRACT = 39


def test_a_record_may_name_every_task_and_every_form_of_answers():
    columns = tasks.task_settings("multiple-choice", None, None, None, False)
    fields = {field.name for field in dataclasses.fields(columns)}
    assert set(schemas.Columns.model_fields) == fields
    assert set(typing.get_args(schemas.TaskName)) == set(tasks.TASKS)
    for answers in ANSWERS:
        values = {
            "name": "multiple-choice",
            "text_column": "a",
            "pair_columns": [],
            "label_column": "b",
            "numbers": False,
        }
        schemas.check("run.json", schemas.Columns, values | {"answers": answers})
    with pytest.raises(ValueError, match="run.json: name has 'x'; expected 'classification', "):
        schemas.check("run.json", schemas.Columns, values | {"name": "x"})


def ignore(*_: object) -> None:
    """Stand in for a display."""


# --- heads ---


def several(B: int, S: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sequences of unequal lengths, each ending in the extract token, and their lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 10, (B, S), generator=generator)
    tokens = torch.randint(30, (B, S, 10), generator=generator)
    return tokens.scatter(2, lengths[..., None] - 1, EXTRACT), lengths


def make(head, **options):
    torch.manual_seed(0)
    return head(GPTConfig.preset("gpt2", **SIZES, extract_token=EXTRACT, pooling="extract", **options)).eval()


def test_similarity_adds_both_orders():
    model = make(GPTForSimilarity, num_labels=3)
    tokens, lengths = several(4, 2)
    logits = model(tokens, lengths=lengths).logits
    for i in range(4):
        states = [
            model.trunk(tokens[i, s : s + 1, : lengths[i, s]])[0, lengths[i, s] - 1] for s in range(2)
        ]  # each sequence alone
        torch.testing.assert_close(logits[i], model.classifier(states[0] + states[1]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model(tokens.flip(1), lengths=lengths.flip(1)).logits, logits, rtol=1e-5, atol=1e-6)


def test_multiple_choice_is_a_softmax_over_the_answers():
    model = make(GPTForMultipleChoice)
    tokens, lengths = several(5, 3)
    labels = torch.tensor([0, 2, 1, 1, 0])
    loss, logits = model(tokens, labels, lengths=lengths)
    assert logits.shape == (5, 3)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))
    alone = torch.stack([model(tokens[:, k : k + 1], lengths=lengths[:, k : k + 1]).logits[:, 0] for k in range(3)], 1)
    torch.testing.assert_close(alone, logits, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("head", "S"), [(GPTForSimilarity, 2), (GPTForMultipleChoice, 3)])
def test_the_joint_loss_adds_the_language_model(head, S):
    """The language model's loss is over the tokens of all sequences, without padding."""
    plain, joint = make(head), make(head, lm_weight=0.5)
    joint.load_state_dict(plain.state_dict(), strict=False)
    tokens, lengths = several(3, S)
    labels = torch.tensor([0, 1, 1])
    flat, ends = tokens.flatten(0, 1), lengths.flatten()
    logits = F.linear(joint.trunk(flat, lengths=ends), joint.output_layer.weight)
    asked = torch.arange(1, 10) < ends[:, None]
    wanted = F.cross_entropy(logits[:, :-1][asked], flat[:, 1:][asked])
    got = joint(tokens, labels, lengths=lengths).loss - plain(tokens, labels, lengths=lengths).loss
    torch.testing.assert_close(got, 0.5 * wanted, rtol=1e-4, atol=1e-5)


def test_what_the_heads_refuse():
    with pytest.raises(ValueError, match=r"GPTForSimilarity: tokens is int64 \[2, 3, 5\]; expected int64 \[B, 2, T\]"):
        make(GPTForSimilarity)(torch.zeros(2, 3, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"GPTForMultipleChoice: tokens is int64 \[2, 5\]; expected int64 \[B, K, T\]"):
        make(GPTForMultipleChoice)(torch.zeros(2, 5, dtype=torch.int64))
    tokens, lengths = several(2, 3)
    with pytest.raises(ValueError, match=r"labels hold 0 to 3; expected classes in \[0, 3\)"):
        make(GPTForMultipleChoice)(tokens, torch.tensor([0, 3]), lengths=lengths)


# --- inputs ---


def config() -> GPTConfig:
    tokenizer = byte_tokenizer()
    return GPTConfig.preset("gpt2", **(SIZES | {"num_tokens": 261, "seq_len": 40}), **special_ids(tokenizer))


def spelled(name: str, table: Table, **options) -> list:
    """Return (sequences, target, answer) of each row. In the sequences | is start, / delimiter and ! extract."""
    tokenizer, marks = byte_tokenizer(), tasks.marks(config())
    task = tasks.task_settings(name, None, None, None, **({"numbers": False} | options))
    names = examples.label_names(table, task)
    letters = {marks.start: "|", marks.delimiter: "/", marks.extract: "!"}
    rows = examples.examples(table, task, names, tokenizer, config())
    texts = [["".join(letters.get(t, chr(t)) for t in sequence) for sequence in row.sequences] for row in rows]
    return [(text, row.target, row.answer) for text, row in zip(texts, rows, strict=True)]


def test_what_each_task_is_fed():
    table = Table("t", ["aa", "b"], ["x", "y"], [("c",), ("dd",)])
    assert spelled("classification", Table("t", ["aa", "b"], ["x", "y"])) == [(["|aa!"], 0, None), (["|b!"], 1, None)]
    assert spelled("entailment", table) == [(["|aa/c!"], 0, None), (["|b/dd!"], 1, None)]
    assert spelled("similarity", table) == [(["|aa/c!", "|c/aa!"], 0, None), (["|b/dd!", "|dd/b!"], 1, None)]
    numbers = Table("t", ["aa", "b"], ["0.5", "-1"], [("c",), ("dd",)])
    assert [row[1] for row in spelled("similarity", numbers, numbers=True)] == [0.5, -1]
    choices = Table("t", ["q", "r", "s", "t"], ["two", "one", "two", "two"], [("one", "two")] * 4)
    assert spelled("multiple-choice", choices)[0] == (["|q/one!", "|q/two!"], 1, None)
    assert [row[1] for row in spelled("multiple-choice", choices)] == [1, 0, 1, 1]
    assert spelled("generation", Table("t", ["aa"], ["xy"])) == [(["|aa/xy!"], 0, 4)]
    assert spelled("question-answering", Table("t", ["aa"], ["xy"], [("q",)])) == [(["|aa/q/xy!"], 0, 6)]


def test_exact_match_and_word_f1():
    measured = generated_metrics(["the Red fox", "a dog.", "cat"], ["red fox", "dog", "no cat here"])
    assert measured["exact_match"] == pytest.approx(2 / 3)
    assert measured["word_f1"] == pytest.approx((1 + 1 + 0.5) / 3)


def test_a_question_without_an_answer_is_measured_as_squad_2_measures_it():
    """If there is no answer, an empty text scores 1 and any other text 0."""
    measured = generated_metrics(["", "fox", "a red fox", ""], ["", "", "fox", "fox"])
    assert measured["exact_match"] == pytest.approx(1 / 4)
    assert measured["word_f1"] == pytest.approx((1 + 0 + 2 / 3 + 0) / 4)
    assert generated_metrics(["", "x"], ["", ""]) == {"exact_match": 0.5, "word_f1": 0.5}


def test_a_constant_answer_has_no_correlation():
    """Matthews' correlation of a constant answer is 0, as in scikit-learn. Else it is that of indicators."""
    labels = torch.tensor([0] * 20 + [1] * 40)
    always = F.one_hot(torch.ones(60, dtype=torch.int64), 2).float()
    assert classification_metrics(always, labels)["matthews"] == 0
    assert classification_metrics(always[:40], labels[20:])["matthews"] == 0
    answers = torch.tensor([0, 1, 1, 0, 1, 1, 0, 1])
    truth = torch.tensor([0, 1, 0, 0, 1, 1, 1, 1])
    expected = float(torch.corrcoef(torch.stack([answers, truth]).double())[0, 1])
    assert classification_metrics(F.one_hot(answers).float(), truth)["matthews"] == pytest.approx(expected)
    three = torch.tensor([0, 2, 2, 1, 1, 0]), torch.tensor([0, 2, 1, 1, 0, 0])
    assert classification_metrics(F.one_hot(three[0]).float(), three[1])["matthews"] == pytest.approx(
        float(MulticlassMatthewsCorrCoef(3)(*three))
    )


# --- each task learns ---

ANIMALS = {"fox": "beast", "wolf": "beast", "crow": "bird", "gull": "bird"}
COLOURS = ("red", "green", "blue")


def draw(i: int) -> tuple[str, str, str, int]:
    chosen = random.Random(i)
    return chosen.choice(COLOURS), chosen.choice(list(ANIMALS)), chosen.choice(COLOURS), chosen.randrange(10)


def row(task: str, i: int) -> dict[str, object]:
    """Return a row of `task` that a small model can learn, because one or two words decide its label."""
    colour, animal, other, count = draw(i)
    text = f"{colour} {animal} {count}"
    if task == "entailment":
        return {"premise": text, "hypothesis": "bird", "label": "yes" if ANIMALS[animal] == "bird" else "no"}
    if task == "similarity":
        return {"sentence1": f"{colour} fox", "sentence2": f"{other} fox", "label": str("red" in (colour, other))}
    if task == "multiple-choice":
        choices = list(COLOURS)
        random.Random(i + 1).shuffle(choices)
        return {"question": "red is the answer", "choices": choices, "answer": choices.index("red")}
    if task == "regression":
        return {"text": text, "label": count}
    if task == "multi-label":
        return {"text": text, "labels": [ANIMALS[animal]] + ["red"] * (colour == "red")}
    if task == "token-classification":
        return {"tokens": text.split(), "tags": ["colour", f"B-{ANIMALS[animal]}", "O"]}
    if task == "answer-span":
        return {"context": text, "question": "animal", "answers": {"text": [animal], "answer_start": [len(colour) + 1]}}
    if task == "generation":
        return {"prompt": text, "answer": ANIMALS[animal]}
    if task == "question-answering":
        return {"context": text, "question": "kind", "answer": ANIMALS[animal]}
    return {"text": text, "label": ANIMALS[animal]}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Return a model that is pre-trained on the words of `row`."""
    folder = tmp_path_factory.mktemp("tasks")
    text = "".join(f"{' '.join(map(str, draw(i)))} {ANIMALS[draw(i)[1]]}\n" for i in range(900))
    (folder / "text.txt").write_text(text)
    settings = pretrain.PretrainSettings(
        out=folder / "lm", data=(folder / "text.txt",), tokenizer="bpe", layers=1, heads=2, dim=32, seq_len=24,
        steps=60, batch_size=8, lr=5e-3,
    )  # fmt: skip
    pretrain.pretrain(settings, ignore, ignore)
    return folder / "lm"


@pytest.mark.parametrize("task", [name for name in tasks.TASKS if name not in ("classification", "regression")])
def test_each_task_learns(source, tmp_path, task):
    """On held-out rows the model is far better than a constant answer. `evaluate` finds the figures of training."""
    for name, numbers in (("train", range(400)), ("valid", range(1000, 1060))):
        rows = [json.dumps(row(task, i)) for i in numbers]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    settings = finetune.FinetuneSettings(
        source=source, out=tmp_path / "run", train=tmp_path / "train.jsonl", valid=tmp_path / "valid.jsonl", task=task,
        batch_size=16, lr=5e-3, epochs=10 if task == "multi-label" else 4,
        # All colours are equally likely here, so a joint loss would make their tied embeddings alike.
        lm_weight=0.0 if task == "similarity" else 0.5,
    )  # fmt: skip
    record = finetune.finetune(settings, ignore, ignore)
    result = evaluate.evaluate(tmp_path / "run", tmp_path / "valid.jsonl", None, None, "cpu")
    assert result["task"] == task
    if task in ("generation", "question-answering"):
        assert result["exact_match"] > 0.9
        assert result["word_f1"] >= result["exact_match"]
        assert result["perplexity"] < 1.5
        names = ("exact_match", "loss", "bits_per_byte")
    elif task == "answer-span":
        assert result["exact_match"] > 0.9
        names = ("exact_match", "word_f1", "loss")
    else:
        assert result["majority_accuracy"] < 0.8
        assert result["accuracy"] > 0.9
        names = ("accuracy", "micro_f1", "loss")
    for name in names:
        assert result[name] == pytest.approx(record[f"valid_{name}"], rel=1e-4)
    _, table, found = predict.predict(tmp_path / "run", "cpu", tmp_path / "valid.jsonl")
    assert table.labels == []
    rows = [row(task, i) for i in range(1000, 1060)]
    label = tasks.TASKS[task].columns[2]
    spelled = {
        "multiple-choice": lambda value: "ABC"[value],
        "multi-label": lambda value: ",".join(sorted(value)),
        "token-classification": " ".join,
        "answer-span": lambda value: value["text"][0],
    }.get(task, str)
    pairs = [(prediction.answer, spelled(r[label])) for prediction, r in zip(found, rows, strict=True)]
    if task == "token-classification":
        pairs = [pair for answer, wanted in pairs for pair in zip(answer.split(), wanted.split(), strict=True)]
    right = statistics.mean(answer == wanted for answer, wanted in pairs)
    assert right == pytest.approx(result["exact_match" if "exact_match" in result else "accuracy"])
    for prediction in found:
        if prediction.probabilities is not None and task != "multi-label":
            assert sum(prediction.probabilities.values()) == pytest.approx(1)
            assert prediction.answer == max(prediction.probabilities, key=prediction.probabilities.__getitem__)


def test_the_best_validation_is_kept(source, tmp_path, monkeypatch):
    """The weights, and the figures in the record, are those of the third of five validations."""
    rows = [json.dumps(row("classification", i)) for i in range(60)]
    (tmp_path / "t.jsonl").write_text("\n".join(rows) + "\n")
    scores = iter([0.2, 0.4, 0.9, 0.9, 0.3])
    seen = []

    def validation(model, *_):
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return {"valid_accuracy": next(scores), "valid_loss": float(len(seen)), "majority_accuracy": 0.1}

    monkeypatch.setattr(finetune, "validation", validation)
    settings = finetune.FinetuneSettings(
        source=source, out=tmp_path / "run", train=tmp_path / "t.jsonl", batch_size=11, epochs=1, lr=1e-2
    )
    record = finetune.finetune(settings, ignore, ignore)
    assert (record["valid_accuracy"], record["best_step"]) == (0.9, 3)
    kept = dict(evaluate.load_run(tmp_path / "run", "cpu").named_parameters())
    assert all(torch.equal(kept[name], tensor) for name, tensor in seen[2].items())
    assert not torch.equal(kept["classifier.weight"], seen[4]["classifier.weight"])
    assert read_record(tmp_path / "run")["best_step"] == 3


def test_a_rare_label_is_trained_on(tmp_path):
    """For every seed the only row of a label stays in training."""
    path = tmp_path / "rare.csv"
    rows = [f"text {i},{'ab'[i % 2]}" for i in range(39)]
    path.write_text("\n".join(["text,label", *rows, "text 39,rare"]) + "\n")
    task = tasks.task_settings("classification", None, None, None, False)
    sizes = set()
    for seed in range(40):
        train, valid, _ = examples.read_tables(path, None, task, seed)
        assert set(train.labels) == {"a", "b", "rare"} and "rare" not in valid.labels
        assert sorted(train.texts + valid.texts) == sorted(f"text {i}" for i in range(40))
        sizes.add(len(valid))
    assert sizes == {3, 4}


def test_remarks():
    table = Table("t.csv", ["some words", " ", "x", ""], [])
    rows = [Example([[1] * 8]), Example([[1] * 3]), Example([[1] * 3]), Example([[1] * 2])]
    assert examples.remarks(table, rows, 8) == [
        "t.csv: 25% of the rows fill all 8 positions and may have been cut off",
        "t.csv: 2 rows have an empty text, the first of them row 2",
    ]
    assert examples.remarks(Table("t.csv", ["a"], []), [Example([[1] * 3])], 8) == []


def test_scratch_draws_the_weights_anew(source, tmp_path):
    rows = [json.dumps(row("classification", i)) for i in range(30)]
    (tmp_path / "t.jsonl").write_text("\n".join(rows) + "\n")
    weights = []
    for scratch in (False, True):
        out = tmp_path / str(scratch)
        finetune.finetune(
            finetune.FinetuneSettings(
                source=source, out=out, train=tmp_path / "t.jsonl", scratch=scratch, epochs=1, lr=1e-9
            ),
            ignore,
            ignore,
        )
        weights.append(evaluate.load_run(out, "cpu").trunk.token_emb.weight)
    pretrained = evaluate.load_run(source, "cpu").trunk.token_emb.weight
    torch.testing.assert_close(weights[0], pretrained, rtol=0, atol=1e-6)
    assert (weights[1] - pretrained).abs().max() > 0.01


@pytest.mark.parametrize(("ranks", "parts"), [(1, 1), (1, 3), (2, 1), (2, 2), (4, 3)])
def test_every_row_counts_once_on_some_rank(ranks, parts):
    """The rows of each update are divided among all parts of all ranks, as many parts on each.

    A part without a row of its own repeats one without weight.
    """
    rows = [Example([[i, EXTRACT]], target=i % 2) for i in range(23)]
    sources = [finetune.RowSource(rows, 8, 0, 5, parts, rank=rank, ranks=ranks) for rank in range(ranks)]
    alone = finetune.RowSource(rows, 8, 0, 5)
    for step in range(7):
        batches = [source(step) for source in sources]
        assert len({len(batch) for batch in batches}) == 1
        assert len(batches[0]) <= parts
        counted = [batch.tokens[:, 0].tolist() for rank in batches for batch in rank if batch.weight]
        (wanted,) = alone(step)
        assert sorted(row for rows in counted for row in rows) == sorted(wanted.tokens[:, 0].tolist())
        assert sum(batch.weight for rank in batches for batch in rank) == wanted.weight
