"""Metrics and class weights of `gpt-fast finetune`, `evaluate` and `predict` against scikit-learn and scipy."""

import json
import random

import pytest
import torch

from gpt_fast.data.example_batches import Example
from gpt_fast.training import adaptation, tasks
from gpt_fast.training.metrics import (
    classification_metrics,
    confusion_matrix,
    multi_label_metrics,
    regression_metrics,
    tag_metrics,
)
from tests.command_line import succeed

pytest.importorskip("sklearn", reason="scikit-learn of the extra dev is not installed")
import numpy as np
from scipy import stats
from sklearn import metrics
from sklearn.utils.class_weight import compute_class_weight

pytestmark = pytest.mark.usefixtures("one_thread")

# Tolerance of float32 against float64. Ratios of counts round a few times, by 2⁻²⁴ each. A row's loss is off by 2⁻²⁴ of
# its largest logit (here below 30, so 2e-6) for each of a few operations, and so is the log of a printed probability.
CLOSE = {"rel": 1e-5, "abs": 1e-7}


def of_classes(truth: list, answers: list, chances: list[list[float]] | None, names: list) -> dict[str, float]:
    """Return scikit-learn's metrics of classes. `chances` [N, K] are in the order of `names`."""
    common = max(names, key=truth.count)
    found = {
        "accuracy": metrics.accuracy_score(truth, answers),
        "macro_f1": metrics.f1_score(truth, answers, average="macro"),
        "micro_f1": metrics.f1_score(truth, answers, average="micro"),
        "matthews": metrics.matthews_corrcoef(truth, answers),
        "majority_accuracy": metrics.accuracy_score(truth, [common] * len(truth)),
        "majority_macro_f1": metrics.f1_score(truth, [common] * len(truth), average="macro"),
    }
    if chances is None:
        return found
    shares = np.array(chances)  # in float32 they sum to 1 up to rounding, and log_loss warns
    return found | {"loss": metrics.log_loss(truth, shares / shares.sum(1, keepdims=True), labels=names)}


def of_sets(truth: np.ndarray, answers: np.ndarray, chances: np.ndarray) -> dict[str, float]:
    """Return scikit-learn's metrics of sets of classes. All arguments are [N, K]."""
    return {
        "accuracy": metrics.accuracy_score(truth, answers),
        "macro_f1": metrics.f1_score(truth, answers, average="macro", zero_division=0),
        "micro_f1": metrics.f1_score(truth, answers, average="micro", zero_division=0),
        "loss": np.mean([metrics.log_loss(t, c, labels=[0, 1]) for t, c in zip(truth.T, chances.T, strict=True)]),
    }


# --- drawn logits ---


@pytest.mark.parametrize(
    ("K", "present", "answered"),
    [
        pytest.param(2, [0, 1], [0, 1], id="two classes"),
        pytest.param(5, [0, 1, 2, 3, 4], [0, 1, 2, 3, 4], id="five classes"),
        pytest.param(5, [0, 1, 3], [0, 2, 3], id="a class without rows, one without answers, one without either"),
        pytest.param(3, [1], [1], id="one class in rows and answers"),
        pytest.param(3, [0, 1, 2], [2], id="always one answer"),
    ],
)
def test_metrics_of_classes(K, present, answered):
    generator = torch.Generator().manual_seed(K)
    labels = torch.tensor(present)[torch.randint(len(present), (97,), generator=generator)]
    logits = torch.randn(97, K, generator=generator)
    logits[torch.arange(97), labels] += 1.0
    logits[:, [k for k in range(K) if k not in answered]] -= 20
    truth, answers, names = labels.tolist(), logits.argmax(1).tolist(), list(range(K))
    assert set(answers) == set(answered)
    expected = of_classes(truth, answers, logits.double().softmax(1).tolist(), names)
    measured = classification_metrics(logits, labels)
    assert measured == pytest.approx(expected | {"examples": 97}, **CLOSE)
    counts = metrics.confusion_matrix(truth, answers, labels=names)
    assert confusion_matrix(logits, labels).tolist() == counts.tolist()


@pytest.mark.parametrize("empty", [None, 1])
def test_metrics_of_sets(empty):
    """The class `empty` has no row and no answer, and its F1 counts as 0."""
    generator = torch.Generator().manual_seed(3)
    truth = torch.rand(83, 4, generator=generator) < torch.tensor([0.1, 0.4, 0.5, 0.9])
    logits = torch.randn(83, 4, generator=generator) + 2.0 * truth - 1.0
    if empty is not None:
        truth[:, empty], logits[:, empty] = False, -3.0
    measured = multi_label_metrics(logits, truth.float())
    exact = logits.double()
    expected = of_sets(truth.long().numpy(), (logits > 0).long().numpy(), exact.sigmoid().numpy())
    rows, counts = np.unique(truth.numpy(), axis=0, return_counts=True)
    constant = np.tile(rows[counts.argmax()], (83, 1))
    expected["majority_accuracy"] = metrics.accuracy_score(truth.numpy(), constant)
    expected["majority_macro_f1"] = metrics.f1_score(truth.numpy(), constant, average="macro", zero_division=0)
    assert measured == pytest.approx(expected | {"examples": 83}, **CLOSE)


def test_metrics_of_tags():
    """Words of all rows count alike, however long their rows are; positions without a tag do not count."""
    generator = torch.Generator().manual_seed(4)
    rows, logits = [], []
    for T in (3, 9, 1, 30):
        tags = torch.randint(4, (T,), generator=generator)
        tags[torch.rand(T, generator=generator) < 0.3] = -100
        rows.append(Example([[1] * T], tags=tags.tolist()))
        logits.append(torch.randn(T, 4, generator=generator))
    kept = [(row > -100).nonzero().flatten() for row in (torch.tensor(row.tags) for row in rows)]
    truth = [tag for row in rows for tag in row.tags or [] if tag != -100]
    exact = torch.cat([scores[which] for scores, which in zip(logits, kept, strict=True)]).double()
    expected = of_classes(truth, exact.argmax(1).tolist(), exact.softmax(1).tolist(), [0, 1, 2, 3])
    measured = tag_metrics(logits, rows, ["a", "b", "c", "d"])
    assert measured == pytest.approx(expected | {"words": len(truth), "examples": 4}, **CLOSE)


def test_metrics_of_numbers():
    """Some values are equal, so their ranks are means."""
    generator = torch.Generator().manual_seed(5)
    targets = torch.randint(6, (71,), generator=generator).float()
    values = (targets + 2 * torch.randn(71, generator=generator)).round()
    mean = [float(targets.double().mean())] * 71
    expected = {
        "mse": metrics.mean_squared_error(targets, values),
        "mean_mse": metrics.mean_squared_error(targets, mean),
        "pearson": stats.pearsonr(targets.double(), values.double()).statistic,
        "spearman": stats.spearmanr(targets, values).statistic,
        "examples": 71,
    }
    assert regression_metrics(values, targets) == pytest.approx(expected, **CLOSE)


# --- class weights ---


def balanced(task: str, names: list[str], rows: list[Example]) -> list[float]:
    return adaptation.class_weights("balanced", names, rows, tasks.task_settings(task, None, None, None, False))


def test_balanced_weights_of_classes_and_tags():
    targets = random.Random(0).choices(range(4), [1, 2, 5, 9], k=113)
    expected = compute_class_weight("balanced", classes=np.arange(4), y=targets)
    names = list("abcd")
    assert balanced("classification", names, [Example([[1]], target) for target in targets]) == pytest.approx(expected)
    tagged = [Example([[1] * 9], tags=[-100, *targets[i : i + 8]]) for i in range(0, 113, 8)]
    assert balanced("token-classification", names, tagged) == pytest.approx(expected)


def test_balanced_weights_of_sets():
    """Each class is a binary problem, in which rows with the class count as much as rows without it.

    `pos_weight` is the ratio of scikit-learn's two weights.
    """
    drawn = random.Random(1)
    truth = np.array([[float(drawn.random() < share) for share in (0.1, 0.5, 0.8)] for _ in range(60)])
    expected = []
    for column in truth.T:
        without, having = compute_class_weight("balanced", classes=np.array([0.0, 1.0]), y=column)
        expected.append(having / without)
    rows = [Example([[1]], row.tolist()) for row in truth]
    assert balanced("multi-label", ["a", "b", "c"], rows) == pytest.approx(expected)


# --- the commands ---

COLOURS, ANIMALS = ("red", "blue", "green"), ("fox", "crow", "cat")


def row(task: str, i: int) -> dict[str, object]:
    """Return a row whose label sometimes contradicts its text, so that no model is right everywhere."""
    drawn = random.Random(i)
    colour, animal, noisy = drawn.choice(COLOURS), drawn.choice(ANIMALS), drawn.random() < 0.3
    label = drawn.choice(COLOURS) if noisy else colour
    text = f"{colour} {animal}"
    if task == "entailment":
        return {"premise": text, "hypothesis": animal, "label": label}
    if task == "similarity":
        return {"sentence1": colour, "sentence2": animal, "label": label}
    if task == "multiple-choice":
        return {"question": colour, "choices": list(COLOURS), "answer": COLOURS.index(label)}
    if task == "multi-label":
        return {"text": text, "labels": sorted({label, animal} - {"blue"})}
    if task == "token-classification":
        return {"tokens": text.split(), "tags": [f"B-{label}", "O" if noisy else "I-" + label]}
    if task == "regression":
        return {"text": text, "label": COLOURS.index(label) + drawn.random()}
    return {"text": text, "label": label}


WRITES_TEXT = {"generation", "question-answering", "answer-span"}  # metrics that scikit-learn does not have


@pytest.fixture(scope="module", params=[name for name in tasks.TASKS if name not in WRITES_TEXT])
def trained(request, cli, data, tmp_path_factory) -> tuple[str, list[dict], dict, dict, list[dict]]:
    """Return a task, its held-out rows, and the results of `finetune`, `evaluate` and `predict` for them."""
    task, folder = request.param, tmp_path_factory.mktemp(request.param)
    rows = [row(task, i) for i in range(1000, 1050)]
    for name, made in (("train", [row(task, i) for i in range(120)]), ("valid", rows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in made))
    tables = ["--train", folder / "train.jsonl", "--valid", folder / "valid.jsonl"]
    rate = ["--batch-size", 8, "--lr", 1e-2, "--epochs", 4]
    options = ["--from", data.lm, *tables, "--task", task, "--out", folder / "run", *rate, "--json"]
    record = json.loads(succeed(cli("finetune", *options)).out)
    use = ["--from", folder / "run", "--data", folder / "valid.jsonl", "--json"]
    measured, found = (json.loads(succeed(cli(command, *use)).out) for command in ("evaluate", "predict"))
    return task, rows, record, measured, found["predictions"]


def sets(rows: list[list[str]], names: list[str]) -> np.ndarray:
    return np.array([[int(name in row) for name in names] for row in rows])


def test_the_commands_measure_what_their_predictions_are_worth(trained):
    """`evaluate` and the record of `finetune` have scikit-learn's figures for the answers of `predict`."""
    task, rows, record, measured, found = trained
    answers = [each["prediction"] for each in found]
    labels = [each[tasks.TASKS[task].columns[2]] for each in rows]
    names = record["labels"]
    chances = [[each["probabilities"][name] for name in names] for each in found if "probabilities" in each]
    if task == "regression":
        expected = {
            "mse": metrics.mean_squared_error(labels, answers),
            "pearson": stats.pearsonr(labels, answers).statistic,
            "spearman": stats.spearmanr(labels, answers).statistic,
        }
    elif task == "multi-label":
        given = sets([answer.split(",") for answer in answers], names)
        expected = of_sets(sets(labels, names), given, np.array(chances))
    elif task == "token-classification":
        truth = [tag for tags in labels for tag in tags]
        expected = of_classes(truth, [tag for answer in answers for tag in answer.split()], None, names)
    else:
        truth = ["ABC"[label] for label in labels] if task == "multiple-choice" else labels
        expected = of_classes(truth, answers, chances, names)
    assert measured["task"] == task and len(answers) == 50
    assert {name: measured[name] for name in expected} == pytest.approx(expected, **CLOSE)
    noted = {name: record[f"valid_{name}"] for name in expected if not name.startswith("majority")}
    assert noted == pytest.approx({name: expected[name] for name in noted}, **CLOSE)
    assert measured["mse"] > 0 if task == "regression" else 0 < measured["accuracy"] < 1  # 0 and 1 are easy to match
