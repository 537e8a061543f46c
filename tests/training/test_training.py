"""Schedules, optimizer, metrics, and small trainings from text and tables to run folders."""

import math
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gpt_fast import GPTConfig, GPTForCausalLM, GPTForMaskedLM
from gpt_fast.data.batches import Batch
from gpt_fast.data.corpus import read_corpus
from gpt_fast.data.stream import TokenStream
from gpt_fast.data.tables import Table
from gpt_fast.training import evaluate, finetune, pretrain
from gpt_fast.training import metrics as evaluation
from gpt_fast.training.compare import compare, difference
from gpt_fast.training.engine import update as engine
from gpt_fast.training.engine.distributed import World
from gpt_fast.training.engine.optimizer import make_optimizer, warmup_cosine, warmup_linear
from gpt_fast.training.lm_data import masker
from gpt_fast.training.runs import folder as runs
from gpt_fast.training.runs import recipes

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"num_tokens": 40, "hidden_dim": 16, "num_heads": 2, "num_layers": 2, "seq_len": 16}


def ignore(*_: object) -> None:
    """Stand in for a display."""


# --- schedules ---


@pytest.mark.parametrize("schedule", [warmup_cosine, warmup_linear])
def test_schedules(schedule):
    """The rate rises linearly to 1 in the warm-up, then falls at every step, almost to 0."""
    rates = [schedule(step, total=100, warmup=10) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1
    assert all(later < earlier for earlier, later in pairwise(rates[10:]))
    assert 0 < rates[-1] < 0.02
    assert schedule(100, total=100, warmup=10) == 0


def test_schedules_halfway():
    assert warmup_cosine(55, total=100, warmup=10) == pytest.approx(0.5)
    assert warmup_cosine(25, total=70, warmup=10) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert warmup_linear(25, total=70, warmup=10) == pytest.approx(0.75)


def test_a_schedule_that_ends_above_0():
    rates = [warmup_cosine(step, total=110, warmup=10, final=0.1) for step in range(111)]
    assert (rates[9], rates[10], rates[110]) == pytest.approx((1, 1, 0.1))
    assert rates[60] == pytest.approx(0.55)


# --- recipes ---


@pytest.mark.parametrize(
    ("preset", "lr", "betas", "weight_decay", "final"),
    [
        ("gpt1", 2.5e-4, (0.9, 0.999), 0.01, 0),
        ("notes", 2.5e-4, (0.9, 0.999), 0.01, 0),
        ("gpt2", 6e-4, (0.9, 0.95), 0.1, 0.1),
        ("gpt2-medium", 3e-4, (0.9, 0.95), 0.1, 0.1),
        ("gpt2-large", 2.5e-4, (0.9, 0.95), 0.1, 0.1),
        ("gpt2-xl", 2e-4, (0.9, 0.95), 0.1, 0.1),
    ],
)
def test_published_recipes(preset, lr, betas, weight_decay, final):
    recipe = recipes.pretraining(preset, None)
    assert (recipe.lr, (recipe.beta1, recipe.beta2)) == (lr, betas)
    assert (recipe.weight_decay, recipe.final_lr) == (weight_decay, final)


@pytest.mark.parametrize(("preset", "residual"), [("gpt1", 0.02), ("gpt2", 0.02 / math.sqrt(2 * 8))])
def test_weights_begin_as_published(preset, residual):
    """Weights are N(0, 0.02), gains 1 and biases 0.

    Layers that write into GPT-2's residual stream have 0.02 / √(2 · layers) instead.
    """
    model = GPTForCausalLM(GPTConfig.preset(preset, **(SMALL | {"hidden_dim": 64, "num_layers": 8})))
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            wanted = residual if "out_proj" in name or "ff.3" in name else 0.02
            error = 4 / math.sqrt(2 * parameter.numel())  # four standard errors of a standard deviation
            assert parameter.std().item() == pytest.approx(wanted, rel=error), name
            assert abs(parameter.mean().item()) < 4 * wanted / math.sqrt(parameter.numel()), name


def test_the_optimizer_has_the_recipe_and_what_is_given_wins(text, tmp_path, monkeypatch):
    """A small gpt2 gives AdamW its betas and weight decay and the schedule its rates, unless options are given."""
    made = []
    monkeypatch.setattr(engine, "make_optimizer", lambda *a: made.append(make_optimizer(*a)) or made[-1])
    for name, given in (("plain", {}), ("given", {"beta2": 0.98, "weight_decay": 0.0, "lr": 1e-3, "final_lr": 0.0})):
        settings = pretrain.PretrainSettings(
            out=tmp_path / name, data=(text,), tokenizer="byte", preset="gpt2", steps=50, log_every=50, warmup=1,
            **given, **(SIZES | {"dim": 16, "batch_size": 1}),
        )  # fmt: skip
        pretrain.pretrain(settings, ignore, ignore)
    groups = [optimizer.param_groups[0] for optimizer in made]
    assert [(group["betas"], group["weight_decay"]) for group in groups] == [((0.9, 0.95), 0.1), ((0.9, 0.98), 0.0)]
    last = [runs.read_metrics(tmp_path / name)[-1]["lr"] for name in ("plain", "given")]
    assert last == pytest.approx([6e-4 * warmup_cosine(49, total=50, warmup=1, final=0.1), 1e-3 * 0.001], rel=0.05)
    again = recipes.pretraining(None, tmp_path / "given")  # the recipe with --from
    assert again == recipes.Recipe(1e-3, 0.9, 0.98, 0.0, 0.0)
    assert recipes.finetuning_lr(tmp_path / "given") == 6.25e-5  # the rate for published sizes


def test_fine_tuning_defaults_are_the_papers(monkeypatch, tmp_path):
    settings = finetune.FinetuneSettings(source=tmp_path, out=tmp_path)
    assert (settings.epochs, settings.batch_size, settings.lm_weight) == (3, 32, 0.5)
    assert (settings.beta1, settings.beta2, settings.weight_decay, settings.max_grad_norm) == (0.9, 0.999, 0.01, 1.0)
    assert recipes.finetuning_lr(tmp_path) == 6.25e-5  # weights from elsewhere, without a record
    (tmp_path / "run.json").write_text('{"lr": 2e-3}')
    assert recipes.finetuning_lr(tmp_path) == 5e-4
    (tmp_path / "run.json").write_text('{"lr": null}')
    assert recipes.finetuning_lr(tmp_path) == 6.25e-5


def test_perplexity_of_losses_beyond_numbers():
    assert evaluation.perplexity(0.0) == 1.0 and evaluation.perplexity(1000.0) == math.inf
    assert math.isnan(evaluation.perplexity(math.nan))


# --- optimizer ---


def test_only_matrices_decay():
    model = GPTForCausalLM(GPTConfig.preset("gpt2", **SMALL))
    decaying, plain = make_optimizer(model, 1e-3, weight_decay=0.1).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)].split(".")[-1] for p in plain["params"]} == {"weight", "bias", "in_proj_bias"}
    assert all("norm" in names[id(p)] for p in plain["params"] if names[id(p)].endswith("weight"))
    assert (decaying["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert decaying["fused"] and plain["fused"]
    # The tied output layer is there once.
    assert sum(p.numel() for group in (decaying, plain) for p in group["params"]) == model.num_parameters()


# --- metrics ---


@pytest.mark.parametrize("head", [GPTForCausalLM, GPTForMaskedLM], ids=["clm", "mlm"])
def test_lm_loss_weighs_every_predicted_token_the_same(head):
    """Batches of unequal sizes and unequal numbers of labels give the loss of one batch."""
    torch.manual_seed(0)
    model = head(GPTConfig.preset("gpt2", **SMALL, dropout=0.5))
    tokens = torch.randint(40, (7, 16))
    labels = tokens.masked_fill(torch.rand(7, 16) < torch.linspace(0.1, 0.9, 7)[:, None], -100)
    asked = labels[:, 1:] if head is GPTForCausalLM else labels
    parts = [
        Batch(tokens[i:j], labels[i:j], weight=int(asked[i:j].ne(-100).sum())) for i, j in ((0, 3), (3, 6), (6, 7))
    ]
    got = evaluation.lm_loss(model, parts)
    assert model.training
    logits = model.eval()(tokens).logits
    if head is GPTForCausalLM:
        logits, labels = logits[:, :-1], labels[:, 1:]
    wanted = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert got == pytest.approx(wanted.item(), rel=1e-5)


def test_classification_metrics():
    """Predictions 0 0 1 2 for labels 0 0 0 1 have an F1 of 0.8, 0 and 0 for the three classes."""
    logits = torch.eye(3)[[0, 0, 1, 2]] * 9
    metrics = evaluation.classification_metrics(logits, torch.tensor([0, 0, 0, 1]))
    assert metrics["accuracy"] == 0.5
    assert metrics["macro_f1"] == pytest.approx(0.8 / 3)
    assert metrics["micro_f1"] == 0.5
    # (c s - t·p) / sqrt((s² - p·p)(s² - t·t)) with c = 2 right of s = 4, predicted (2, 1, 1) and true (3, 1, 0)
    assert metrics["matthews"] == pytest.approx((2 * 4 - 7) / math.sqrt((16 - 6) * (16 - 10)))
    assert metrics["majority_accuracy"] == 0.75
    assert metrics["majority_macro_f1"] == pytest.approx((6 / 7) / 2)  # neither side has the third class
    assert metrics["examples"] == 4


def test_regression_metrics():
    metrics = evaluation.regression_metrics(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 3.0, 5.0]))
    assert metrics["mse"] == pytest.approx(2 / 3)
    assert metrics["mean_mse"] == pytest.approx(8 / 3)
    assert metrics["pearson"] == pytest.approx(0.981981, abs=1e-5)
    assert metrics["spearman"] == pytest.approx(1.0, abs=1e-5)
    assert "pearson" not in evaluation.regression_metrics(torch.ones(3), torch.tensor([1.0, 3.0, 5.0]))


# --- from text to a run ---

COLOURS = ("red", "green", "blue")
VERBS = {"fox": "runs", "crow": "flies", "wolf": "howls", "gull": "swims"}
BIRDS = ("crow", "gull")
SIZES = {"layers": 1, "heads": 2, "dim": 32, "seq_len": 32, "batch_size": 8}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "animals.txt"
    path.write_text("".join(f"{sentence(i)}\n" for i in range(900)), encoding="utf-8")
    return path


def sentence(i: int) -> str:
    draw = random.Random(i)
    animal = draw.choice(list(VERBS))
    return f"the {draw.choice(COLOURS)} {animal} {VERBS[animal]} {draw.randrange(10)} times"


@pytest.fixture(scope="module")
def language_runs(text, tmp_path_factory) -> dict[str, Path]:
    """Return a small run of each objective."""
    folder = tmp_path_factory.mktemp("runs")
    # A masked model predicts far fewer tokens of a window, so it needs more and larger updates.
    for objective, steps, batch_size in (("clm", 60, 8), ("mlm", 250, 32)):
        settings = pretrain.PretrainSettings(
            out=folder / objective,
            data=(text,),
            objective=objective,
            steps=steps,
            lr=5e-3,
            **(SIZES | {"batch_size": batch_size}),
        )
        pretrain.pretrain(settings, ignore, ignore)
    return {objective: folder / objective for objective in ("clm", "mlm")}


@pytest.mark.parametrize(("objective", "margin"), [("clm", 0.5), ("mlm", 0.1)])
def test_pretraining_learns_and_leaves_a_run(language_runs, objective, margin):
    run = language_runs[objective]
    assert {path.name for path in run.iterdir()} == runs.RUN_FILES
    record = runs.read_record(run)
    metrics = runs.read_metrics(run)
    assert metrics[-1]["step"] == record["steps"]
    assert metrics[-1]["valid_loss"] == record["valid_loss"]
    assert sum("valid_loss" in line for line in metrics) == 10
    assert record["valid_loss"] < record["unigram_entropy"] - margin
    model = evaluate.load_run(run, "cpu")
    assert model.num_parameters() == record["parameters"]
    tokenizer = evaluate.run_tokenizer(run, model)
    assert model.config.mask_token == tokenizer.token_to_id("<|mask|>")


def test_evaluating_a_language_model(language_runs, text, tmp_path):
    """On the held-out tenth of the text evaluation finds the loss that training logged last."""
    held_out = "".join(document.text for document in read_corpus([text]).valid)
    assert text.read_text().endswith(held_out) and 0.05 < len(held_out) / len(text.read_text()) < 0.15
    (tmp_path / "held_out.txt").write_text(held_out)
    for run in language_runs.values():
        result = evaluate.evaluate(run, tmp_path / "held_out.txt", None, None, "cpu")
        record = runs.read_record(run)
        assert result["loss"] == pytest.approx(record["valid_loss"], rel=1e-4)
        assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
        assert result["unigram_entropy"] == pytest.approx(record["unigram_entropy"], abs=0.1)


def test_bits_per_byte_do_not_depend_on_the_tokenizer(language_runs, tmp_path):
    (tmp_path / "t.txt").write_text("the red fox runs 7 times\n" * 40)
    run = language_runs["clm"]
    result = evaluate.evaluate(run, tmp_path / "t.txt", None, None, "cpu")
    ids = evaluate.run_tokenizer(run, evaluate.load_run(run, "cpu")).encode("the red fox runs 7 times\n" * 40).ids
    bits = result["loss"] / math.log(2) * (len(ids) + 1)
    assert result["bits_per_byte"] == pytest.approx(bits / (25 * 40))


@pytest.mark.parametrize(("first", "then", "steps", "batch_size"), [("clm", "mlm", 200, 32), ("mlm", "clm", 60, 16)])
def test_going_on_with_the_other_objective_learns(language_runs, text, tmp_path, first, then, steps, batch_size):
    """The loss falls by more than a nat, and to more than a nat below the unigram entropy."""
    settings = pretrain.PretrainSettings(
        out=tmp_path / "run", data=(text,), source=language_runs[first], objective=then, steps=steps, lr=5e-3,
        batch_size=batch_size,
    )  # fmt: skip
    record = pretrain.pretrain(settings, ignore, ignore)
    losses = [line["valid_loss"] for line in runs.read_metrics(tmp_path / "run") if "valid_loss" in line]
    assert losses[-1] < losses[0] - 1, losses
    assert losses[-1] < record["unigram_entropy"] - 1, losses
    assert isinstance(evaluate.load_run(tmp_path / "run", "cpu"), pretrain.OBJECTIVES[then])


def test_training_is_reproducible(text, tmp_path):
    losses = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        settings = pretrain.PretrainSettings(
            out=tmp_path / name, data=(text,), tokenizer="byte", steps=3, dropout=0.2, seed=seed, **SIZES
        )
        losses.append(pretrain.pretrain(settings, ignore, ignore)["train_loss"])
    assert losses[0] == losses[1] != losses[2]


def test_validation_masks_are_fixed(language_runs, text):
    """Two calls mask the same tokens and give the same loss, whatever torch's generator drew in between."""
    run = language_runs["mlm"]
    model = evaluate.load_run(run, "cpu")
    tokenizer = evaluate.run_tokenizer(run, model)
    mask = masker(tokenizer, model.config)
    stream = TokenStream([np.array(tokenizer.encode(text.read_text()).ids)])
    made = [pretrain.validation_batches(stream, 16, 8, mask, None) for _ in range(2)]
    assert all(torch.equal(a.labels, b.labels) for a, b in zip(*made, strict=True))
    first = pretrain.validation(model, made[0], World())
    torch.rand(5)
    assert pretrain.validation(model, made[1], World()) == first


# --- from a table to a run ---


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> Path:
    """Return a folder with two tables of different sentences. Each row has a kind, bird or beast, and a number."""
    folder = tmp_path_factory.mktemp("tables")
    for name, seeds in (("train", range(2000, 2240)), ("valid", range(3000, 3060))):
        with (folder / f"{name}.csv").open("w") as file:
            file.write("line,kind,times\n")
            for line in map(sentence, seeds):
                kind = "bird" if line.split()[2] in BIRDS else "beast"
                file.write(f"{line},{kind},{line.split()[4]}\n")
    return folder


def test_fine_tuning_beats_the_constant_answer(language_runs, tables, tmp_path):
    settings = finetune.FinetuneSettings(
        source=language_runs["clm"],
        out=tmp_path / "run",
        train=tables / "train.csv",
        valid=tables / "valid.csv",
        text_column="line",
        label_column="kind",
        epochs=6,
        batch_size=16,
        lr=5e-3,
    )
    record = finetune.finetune(settings, ignore, ignore)
    assert record["labels"] == ["beast", "bird"]
    assert record["majority_accuracy"] < 0.65
    assert record["valid_accuracy"] > 0.9
    result = evaluate.evaluate(tmp_path / "run", tables / "valid.csv", "line", "kind", "cpu")
    for name in ("accuracy", "macro_f1", "loss"):
        assert result[name] == pytest.approx(record[f"valid_{name}"], rel=1e-5)
    assert {path.name for path in (tmp_path / "run").iterdir()} == runs.RUN_FILES | {"confusion.png"}


def test_fine_tuning_a_regression(language_runs, tables, tmp_path):
    """Without --valid, a tenth of the rows is held out."""
    settings = finetune.FinetuneSettings(
        source=language_runs["clm"],
        out=tmp_path / "run",
        train=tables / "train.csv",
        text_column="line",
        label_column="times",
        task="regression",
        epochs=12,
        batch_size=16,
        lr=5e-3,
    )
    record = finetune.finetune(settings, ignore, ignore)
    assert (record["train_rows"], record["valid_rows"]) == (216, 24)
    assert record["valid_mse"] < 0.8 * record["mean_mse"]
    result = evaluate.evaluate(tmp_path / "run", tables / "valid.csv", "line", "times", "cpu")
    assert result["task"] == "regression"
    assert result["examples"] == 60


def test_defaults_that_depend_on_the_run(language_runs, tables, tmp_path):
    """The rate is a quarter of pre-training's. λ is 0 if pre-training did not predict the next token."""
    settings = finetune.FinetuneSettings(
        source=language_runs["mlm"],
        out=tmp_path / "run",
        train=tables / "valid.csv",
        text_column="line",
        label_column="kind",
        epochs=1,
    )
    record = finetune.finetune(settings, ignore, ignore)
    assert (record["lr"], record["lm_weight"]) == (5e-3 / 4, 0)


def test_some_rows():
    """The seed draws the rows, which keep the table's order."""
    table = Table("t", [str(i) for i in range(100)], ["a", "b"] * 50)
    some = finetune.some_rows(table, 20, 1)
    assert len(some) == 20
    assert some.texts == sorted(some.texts, key=int)
    assert some.texts == finetune.some_rows(table, 20, 1).texts != finetune.some_rows(table, 20, 2).texts
    assert [table.labels[int(text)] for text in some.texts] == some.labels
    assert finetune.some_rows(table, 100, 1).texts == table.texts
    with pytest.raises(ValueError, match="--rows 101: t has 100 to train on"):
        finetune.some_rows(table, 101, 1)


# --- comparison with the reference ---


def test_difference():
    """The result is the largest over all tensors. Each tensor has its own scale, and a tensor of zeros has none."""
    got = [torch.tensor([1.0, 2.5]), torch.tensor([[100.5]]), torch.zeros(2)]
    wanted = [torch.tensor([1.0, 2.0]), torch.tensor([[100.0]]), torch.zeros(2)]
    assert difference(got, wanted) == {"largest": 0.5, "relative": 0.25}


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_compare(language_runs, objective):
    steps = []
    result = compare(language_runs[objective], "cpu", 2, 2, lambda done, total: steps.append((done, total)))
    assert result["logits"]["relative"] < 1e-4
    assert result["gradients"]["relative"] < 1e-3
    assert result["speedup"] == result["fused_tokens_per_second"] / result["reference_tokens_per_second"]
    assert steps == [(0, 2), (1, 2), (2, 2)]
