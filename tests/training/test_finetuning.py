"""Options of fine-tuning: early stopping, class weights, frozen layers, LoRA, repeated runs."""

import copy
import json
import shutil
from pathlib import Path

import numpy
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gpt_fast import (
    GPTConfig,
    GPTForCausalLM,
    GPTForMultipleChoice,
    GPTForSequenceClassification,
    GPTForTokenClassification,
)
from gpt_fast.config import SPECIAL_TOKENS
from gpt_fast.data.batches import Batch
from gpt_fast.data.example_batches import Example
from gpt_fast.interrupts import Interrupted, Stop
from gpt_fast.training import adaptation, evaluate, finetune, pretrain, repeats, table_examples, tasks
from gpt_fast.training.engine.update import Engine, EngineSettings
from gpt_fast.training.runs.adapters import Adapter
from gpt_fast.training.runs.examine import examine_run
from gpt_fast.training.runs.folder import read_metrics, read_record
from gpt_fast.training.runs.load import adapter_base, load_run
from gpt_fast_settings.finetune import FinetuneSettings
from gpt_fast_settings.pretrain import PretrainSettings
from tests import numerics
from tests.command_line import succeed

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"num_tokens": 40, "hidden_dim": 16, "num_heads": 2, "num_layers": 3, "seq_len": 16, "dropout": 0.0}


def ignore(*_: object) -> None:
    """Stand in for a display."""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finetuning")
    (folder / "text.txt").write_text("".join(f"the {'red' if i % 3 else 'blue'} fox {i % 7}\n" for i in range(300)))
    settings = PretrainSettings(
        out=folder / "lm", data=(folder / "text.txt",), tokenizer="byte", layers=3, heads=2, dim=16, seq_len=24,
        steps=4, batch_size=4,
    )  # fmt: skip
    pretrain.pretrain(settings, ignore, ignore)
    return folder / "lm"


@pytest.fixture
def table(tmp_path) -> Path:
    """Return a table of forty rows, three of four of them red."""
    path = tmp_path / "t.jsonl"
    rows = [
        {"text": f"the {'red' if i % 4 else 'blue'} fox {i}", "label": "warm" if i % 4 else "cold"} for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(source: Path, table: Path, out: Path, say=ignore, **options) -> dict:
    given = {"epochs": 1, "batch_size": 4, "lr": 1e-3} | options
    return finetune.finetune(FinetuneSettings(source=source, train=table, out=out, **given), ignore, say)


# --- early stopping ---


def test_a_run_ends_where_validations_stop_getting_better(source, table, tmp_path, monkeypatch):
    """The run ends after two validations without a better macro F1. More epochs and patience resume it."""
    scores = [0.2, 0.9, 0.9, 0.3, 0.5, 0.95, 0.1, 0.1, 0.1, 0.1]
    called = []

    def validation(*_):
        called.append(1)
        accuracy = {"valid_accuracy": len(called), "majority_accuracy": 0.1}
        return {"valid_macro_f1": scores[len(called) - 1], "valid_loss": 1.0} | accuracy

    monkeypatch.setattr(finetune, "validation", validation)
    said = []
    options = {"metric": "macro_f1", "valid_every": 2, "patience": 2}
    record = run(source, table, tmp_path / "run", said.append, epochs=3, **options)
    assert (record["best_step"], record["last_step"], record["metric"]) == (4, 8, "macro_f1")
    assert [line["step"] for line in read_metrics(tmp_path / "run") if "valid_loss" in line] == [2, 4, 6, 8]
    assert "ended after update 8 of 27: none of the last 2 validations was better than that of update 4" in said
    longer = options | {"patience": 4, "epochs": 4, "resume": True}
    record = run(source, table, tmp_path / "run", **longer)
    assert (record["best_step"], record["last_step"]) == (12, 20)
    assert read_record(tmp_path / "run")["valid_macro_f1"] == 0.95


def test_which_validation_is_better():
    """Scores should be large and errors small. The loss decides between equals. A missing correlation is worst."""
    lines = [
        {"valid_accuracy": 0.5, "valid_loss": 2.0, "valid_mse": 1.0},
        {"valid_accuracy": 0.5, "valid_loss": 1.0, "valid_mse": 2.0, "valid_pearson": -0.9},
    ]
    for metric, best in (("accuracy", 1), ("loss", 1), ("mse", 0), ("pearson", 1)):
        assert max((0, 1), key=lambda i: tasks.better(metric, lines[i])) == best, metric


def test_a_metric_that_the_task_does_not_measure(source, tmp_path):
    """The error comes before any table is read."""
    with pytest.raises(
        ValueError, match="--metric mse: classification does not measure it; expected accuracy or macro"
    ):
        run(source, tmp_path / "none.csv", tmp_path / "run", metric="mse")


# --- class weights ---


def make(head=GPTForSequenceClassification, **options):
    torch.manual_seed(0)
    return head(GPTConfig.preset("gpt2", **SIZES, pad_token=0, classifier_dropout=0.0, num_labels=3, **options))


def rows(B: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 40, (B, 9), generator=generator)
    return Batch(tokens, torch.arange(B) % 3, torch.full((B,), 9), weight=B)


WEIGHTS = (0.1, 0.02, 0.3)


def test_weighted_classes_are_those_of_torch():
    model, batch = make(), rows()
    plain = model(batch.tokens, batch.labels, lengths=batch.lengths)
    assert torch.equal(plain.loss, nn.functional.cross_entropy(plain.logits, batch.labels))
    model.weigh_classes(WEIGHTS)
    loss, logits = model(batch.tokens, batch.labels, lengths=batch.lengths)
    expected = nn.CrossEntropyLoss(weight=torch.tensor(WEIGHTS, dtype=torch.float64))(logits.double(), batch.labels)
    numerics.assert_rounded_once(loss, expected)
    model.weigh_classes(None)
    assert torch.equal(model(batch.tokens, batch.labels, lengths=batch.lengths).loss, plain.loss)
    assert "class_weights" not in model.state_dict()


def test_weighted_tokens_are_those_of_torch():
    model, batch = make(GPTForTokenClassification), rows()
    labels = torch.randint(0, 3, batch.tokens.shape, generator=torch.Generator().manual_seed(2))
    labels[:, 3:] = -100
    model.weigh_classes(WEIGHTS)
    loss, logits = model(batch.tokens, labels)
    cross_entropy = nn.CrossEntropyLoss(weight=torch.tensor(WEIGHTS, dtype=torch.float64))
    numerics.assert_rounded_once(loss, cross_entropy(logits.double().flatten(0, 1), labels.flatten()))


@pytest.mark.parametrize("lm_weight", [0.0, 0.5])
def test_weighted_gradients_do_not_depend_on_how_a_batch_is_divided(lm_weight):
    """The weights of these rows sum to less than 1, unlike any number of predictions."""
    gradients = []
    batch = rows()
    parts = [batch], [Batch(*(x[i::3] for x in batch[:3]), weight=2) for i in range(3)]
    for batches in parts:
        model = make(lm_weight=lm_weight)
        model.weigh_classes(WEIGHTS)
        Engine(model, 0.0, EngineSettings(max_grad_norm=1e9)).update(batches, 0.0)
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-7)
    assert model.classifier.bias.grad.abs().max() > 0.01


def test_weights_that_a_head_cannot_take():
    with pytest.raises(ValueError, match=r"class_weights is \[1.0\]; expected 3 numbers of 0 or more"):
        make().weigh_classes([1.0])
    with pytest.raises(ValueError, match="GPTForMultipleChoice: has no classes to weigh; expected a classifier"):
        make(GPTForMultipleChoice).weigh_classes([1.0])


def test_balanced_weights_count_every_class_alike():
    """Weights are N / (K · rows of the class), as in scikit-learn, so that each class counts N / K in all."""
    names = ["a", "b", "c"]

    def weights(task: str, rows: list[Example]) -> list[float]:
        return adaptation.class_weights("balanced", names, rows, tasks.task_settings(task, None, None, None, False))

    def classes(*targets: int) -> list[Example]:
        return [Example([[1]], target) for target in targets]

    assert weights("classification", classes(0, 0, 0, 1, 2, 2)) == pytest.approx([6 / 9, 6 / 3, 6 / 6])
    assert weights("classification", classes(0, 2, 2, 2)) == pytest.approx([2, 1, 2 / 3])
    tagged = [Example([[1]], tags=[-100, 0, 0]), Example([[1]], tags=[0, 1, -100, 2, 2])]
    assert weights("token-classification", tagged) == pytest.approx([6 / 9, 6 / 3, 6 / 6])
    sets = [Example([[1]], [1.0, 0.0, 0.0]), Example([[1]], [1.0, 1.0, 0.0]), Example([[1]], [0.0, 1.0, 0.0])]
    assert weights("multi-label", [*sets, sets[0]]) == pytest.approx([1 / 3, 2 / 2, 1])  # rows without / with it


def test_class_weights_of_a_run(source, table, tmp_path):
    said: list[str] = []
    run(source, table, tmp_path / "a", said.append, class_weights="balanced")
    assert "class weights: cold 2.25, warm 0.643" in said  # 8 of the 36 training rows are cold
    for given, message in (
        ("1,2,3", "--class-weights 1,2,3: the classes are cold, warm; expected 2 numbers in this order"),
        ("1,x", "--class-weights 1,x: expected balanced, or numbers of 0 or more with commas between them"),
    ):
        with pytest.raises(ValueError) as raised:
            run(source, table, tmp_path / "b", class_weights=given)
        assert str(raised.value) == message


# --- frozen layers, and rates by layer ---


@pytest.mark.parametrize(
    ("freeze", "frozen"),
    [
        ("embeddings", ("trunk.token_emb", "trunk.pos_emb")),
        ("2", ("trunk.token_emb", "trunk.pos_emb", "trunk.decoders.0", "trunk.decoders.1")),
        ("trunk", ("trunk.",)),
    ],
)
def test_frozen_layers_stay_as_they_are(source, table, tmp_path, freeze, frozen):
    run(source, table, tmp_path / "run", freeze=freeze, lr=1e-2)
    before, after = (dict(load_run(folder, "cpu").named_parameters()) for folder in (source, tmp_path / "run"))
    for name, parameter in after.items():
        if name in before:
            assert torch.equal(parameter, before[name]) == name.startswith(frozen), name
    assert read_record(tmp_path / "run")["lm_weight"] == (0 if freeze == "trunk" else 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze": "4"}, "expected trunk, embeddings or 1 to 3"),
        ({"freeze": "all"}, "expected trunk, embeddings or 1 to 3"),
        ({"freeze": "1", "scratch": True}, "--scratch draws the weights anew; expected one of the two"),
        ({"freeze": "trunk", "task": "generation"}, "--freeze trunk: generation has no head of its own to train"),
        ({"class_weights": "balanced", "task": "regression"}, "--class-weights balanced: regression has no classes"),
    ],
)
def test_what_contradicts_the_model_or_the_task_is_told_before_data_is_read(source, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(source, tmp_path / "none.csv", tmp_path / "run", **options)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_rate_of_each_layer(optimizer):
    """Adam's first step is the rate times the sign of the gradient, so the largest step shows the rate.

    Muon's step is as many times smaller as the rate is.
    """
    steps = {}
    for decay in (1.0, 0.5):
        model = make()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        settings = EngineSettings(weight_decay=0.0, layer_decay=decay, optimizer=optimizer)
        Engine(model, 1e-3, settings).update([rows()], 1e-3)
        for name, parameter in model.named_parameters():
            steps[name, decay] = float((parameter.detach() - before[name]).abs().max())
    factors = {"classifier": 1, "trunk.final_norm": 1, "trunk.decoders.2": 0.5, "trunk.decoders.1": 0.25}
    factors |= {"trunk.decoders.0": 0.125, "trunk.token_emb": 0.0625, "trunk.pos_emb": 0.0625}
    for name in before:
        (factor,) = (value for prefix, value in factors.items() if name.startswith(prefix))
        assert steps[name, 0.5] == pytest.approx(factor * steps[name, 1.0], rel=1e-2), name
        if optimizer == "adamw":
            assert steps[name, 0.5] == pytest.approx(1e-3 * factor, rel=1e-2), name


# --- LoRA ---


@pytest.fixture(scope="module")
def adapted(source, tmp_path_factory) -> Path:
    """Return a classifier's run with an adapter. Its source lacks the task's tokens, like another library's model."""
    folder = tmp_path_factory.mktemp("lora")
    foreign = shutil.copytree(source, folder / "foreign")
    (foreign / "run.json").unlink()
    shutil.rmtree(foreign / "checkpoints")
    model = load_run(foreign, "cpu")
    model.config = model.trunk.config = model.config.replace(**dict.fromkeys(SPECIAL_TOKENS))
    model.resize_embeddings(256)
    model.save_pretrained(foreign)
    path = folder / "t.csv"
    path.write_text("text,label\n" + "".join(f"the {'red' if i % 2 else 'blue'} fox {i},{i % 2}\n" for i in range(40)))
    run(foreign, path, folder / "run", lora_rank=2, lr=1e-2, epochs=6)
    return folder / "run"


def test_an_adapter_is_trained_and_saved_alone(adapted, capsys):
    files = {path.name for path in adapted.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "config.json", "tokenizer.json", "run.json"} <= files
    assert not files & {"model.safetensors", "best"}
    names = {name.split("decoders.")[-1] for name in load_file(adapted / "adapter_model.safetensors")}
    parts = ("multihead_attn", "ff.0", "ff.3")
    assert names == {f"{i}.{part}.lora_{x}.weight" for i in range(3) for part in parts for x in "AB"} | {
        "base_model.model.classifier.weight",
        "base_model.model.classifier.bias",
    }
    record = read_record(adapted)
    assert record["lora"]["rank"] == 2 and record["lora"]["alpha"] == 4
    assert record["valid_accuracy"] > 0.9
    assert examine_run(adapted)["problems"] == []


def test_the_merge_is_pefts(adapted):
    """PEFT merges the adapter into a base whose classifier is drawn anew, because the adapter holds the classifier."""
    ours = load_run(adapted, "cpu").eval()
    config = ours.config
    base = adapter_base(
        GPTForSequenceClassification, adapted.parent / "foreign", num_labels=2, label_names=config.label_names,
        pooling="extract", lm_weight=0.5,
    )  # fmt: skip
    nn.init.normal_(base.classifier.weight)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), adapted).eval()
    tokens = torch.tensor([[config.start_token, *b"the red fox", config.extract_token]])
    assert (theirs(tokens).logits - base.eval()(tokens).logits).abs().max() > 0.1
    torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-4, atol=1e-5)
    merged = theirs.merge_and_unload().state_dict()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-6, atol=1e-7, msg=name)


def test_the_base_of_an_adapter_leaves_every_generator_as_it_is(adapted, monkeypatch):
    """GPUs' generators are not seeded, which `fork_rng` without devices would not restore."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail(f"the GPUs were seeded with {seed}"))
    before = torch.get_rng_state()
    options = {"num_labels": 2, "pooling": "extract"}
    first, second = (
        adapter_base(GPTForSequenceClassification, adapted.parent / "foreign", **options) for _ in range(2)
    )
    assert torch.equal(first.classifier.weight, second.classifier.weight)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_merged_adapter_is_a_run_of_its_own(adapted, tmp_path, cli):
    """The merged run evaluates as the run with the adapter does."""
    succeed(cli("convert", "--from", adapted, "--to", "gpt-fast", "--out", tmp_path / "merged"))
    table = adapted.parent / "t.csv"
    one, other = (evaluate.evaluate(folder, table, None, None, "cpu") for folder in (adapted, tmp_path / "merged"))
    assert one == other
    assert examine_run(tmp_path / "merged")["problems"] == []
    assert "lora" not in read_record(tmp_path / "merged")
    refused = cli("convert", "--from", adapted, "--to", "nanogpt", "--out", tmp_path / "ckpt.pt")
    assert refused.code == 2 and "GPTForSequenceClassification" in refused.err


def test_an_adapter_whose_base_changed_is_refused(adapted, tmp_path):
    moved = tmp_path / "runs"
    shutil.copytree(adapted, moved / "run")
    record = read_record(adapted)
    record["from"] = str(moved / "foreign")
    (moved / "run" / "run.json").write_text(json.dumps(record))
    with pytest.raises(FileNotFoundError, match="an adapter of .*foreign, which is no run folder"):
        load_run(moved / "run", "cpu")
    shutil.copytree(adapted.parent / "foreign", moved / "foreign")
    assert load_run(moved / "run", "cpu").config.num_labels == 2
    model = load_run(moved / "foreign", "cpu")
    nn.init.zeros_(model.trunk.pos_emb)
    model.save_pretrained(moved / "foreign")
    with pytest.raises(ValueError, match="foreign: has other weights than the adapter in .*run was trained on"):
        load_run(moved / "run", "cpu")


def test_a_damaged_adapter_is_refused(adapted, tmp_path):
    folder = shutil.copytree(adapted, tmp_path / "run")
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.trunk.decoders.1.ff.0.lora_A.weight"
    record = read_record(folder)
    for changed, message in (
        (
            {name: tensors[name][:1].contiguous()},
            rf"adapter_model.safetensors: {name} has shape \[1, 16\]; expected \[2, 16\]",
        ),
        ({"more": torch.zeros(1)}, "adapter_model.safetensors: holds more, which an adapter of this model does not"),
    ):
        save_file(tensors | changed, folder / "adapter_model.safetensors")
        del record["weights"]
        (folder / "run.json").write_text(json.dumps(record))
        record["weights"] = {}
        with pytest.raises(ValueError, match=message):
            load_run(folder, "cpu")


def test_a_stopped_run_with_an_adapter_is_read_and_resumed(source, table, tmp_path):
    """The resumed run ends with the adapter of a run that was not stopped."""
    options = {"lora_rank": 2, "epochs": 2, "checkpoint_every": 6, "valid_every": 6, "lr": 1e-2}
    run(source, table, tmp_path / "whole", **options)
    stop = Stop()

    def show(now):
        if now.step == 7:
            stop.signum = 15

    given = options | {"source": source, "train": table, "batch_size": 4}
    with pytest.raises(Interrupted):
        finetune.finetune(FinetuneSettings(out=tmp_path / "run", **given), show, ignore, stop)
    with pytest.warns(UserWarning, match="a stopped run; its weights after update 8"):
        stopped = load_run(tmp_path / "run", "cpu")
    base = load_run(source, "cpu").trunk.decoders[0].multihead_attn.in_proj_weight
    assert not torch.equal(stopped.trunk.decoders[0].multihead_attn.in_proj_weight, base)
    assert torch.equal(stopped.trunk.token_emb.weight, load_run(source, "cpu").trunk.token_emb.weight)
    run(source, table, tmp_path / "run", **options, resume=True)
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "run")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"lora_rank": 2, "scratch": True},
            "--scratch: --lora-rank 2 trains an adapter of frozen weights; expected one of the two options",
        ),
        ({"lora_rank": 2, "freeze": "1"}, "--freeze 1: --lora-rank 2 trains an adapter of frozen weights"),
        ({"lora_rank": 2, "strategy": "fsdp"}, "--strategy fsdp: --lora-rank 2 trains an adapter, .* --strategy ddp"),
        ({"lora_alpha": 2.0}, "--lora-alpha 2: no --lora-rank; expected both, or none"),
    ],
)
def test_what_an_adapter_cannot_stand_beside(source, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(source, tmp_path / "none.csv", tmp_path / "run", **options)


def test_attention_dropout_reaches_an_adapted_model():
    """A model whose only dropout is attention's applies it although PEFT wraps the attention."""
    torch.manual_seed(0)
    sizes = SIZES | {"dropout": None}
    config = GPTConfig.preset("gpt2", **sizes, embedding_dropout=0.0, residual_dropout=0.0, attention_dropout=0.5)
    model = Adapter(2, None, Path("base")).attach(GPTForCausalLM(config))
    tokens = torch.randint(40, (2, 8))
    assert not torch.equal(model(tokens).logits, model(tokens).logits)
    model.eval()
    assert torch.equal(model(tokens).logits, model(tokens).logits)


# --- repeated runs ---


def test_seeds_are_runs_of_their_own(source, table, tmp_path):
    """Each run is the run of its seed alone, and the summary has their mean and spread.

    A resumed command trains the missing seeds.
    """
    given = {"source": source, "train": table, "epochs": 1, "batch_size": 4, "lr": 1e-2}
    summary = repeats.repeat(FinetuneSettings(out=tmp_path / "all", seeds=3, **given), ignore, ignore)
    assert summary["runs"] == [str(tmp_path / "all" / f"seed-{seed}") for seed in range(3)]
    alone = finetune.finetune(FinetuneSettings(out=tmp_path / "one", seed=1, **given), ignore, ignore)
    assert alone["weights"] == read_record(tmp_path / "all" / "seed-1")["weights"]
    losses = [read_record(Path(run))["valid_loss"] for run in summary["runs"]]
    assert len(set(losses)) == 3
    of = summary["metrics"]["loss"]
    assert of.pop("values") == losses
    expected = {"mean": numpy.mean(losses), "sd": numpy.std(losses, ddof=1), "min": min(losses), "max": max(losses)}
    assert of == pytest.approx(expected)
    of["values"] = losses
    assert json.loads((tmp_path / "all" / "repeats.json").read_text()) == summary
    shutil.rmtree(tmp_path / "all" / "seed-2")
    kept = (tmp_path / "all" / "seed-0" / "run.json").stat().st_mtime_ns
    again = repeats.repeat(FinetuneSettings(out=tmp_path / "all", seeds=3, resume=True, **given), ignore, ignore)
    assert again == summary
    assert (tmp_path / "all" / "seed-0" / "run.json").stat().st_mtime_ns == kept


def test_every_row_is_held_out_by_one_fold(table):
    """Each fold holds its share of every class, as in scikit-learn's StratifiedKFold."""
    task = tasks.task_settings("classification", None, None, None, False)
    held = []
    for fold in range(1, 5):
        train, valid, _ = table_examples.read_tables(table, None, task, 3, fold=(fold, 4))
        assert sorted(train.texts + valid.texts) == sorted(
            f"the {'red' if i % 4 else 'blue'} fox {i}" for i in range(40)
        )
        assert sorted([valid.labels.count("cold"), valid.labels.count("warm")])[0] in (2, 3)
        held += valid.texts
    assert sorted(held) == sorted(train.texts + valid.texts)


def test_folds_and_seeds_from_the_command_line(source, table, tmp_path, cli):
    command = ["finetune", "--from", source, "--train", table, "--out", tmp_path / "folds", "--batch-size", 8]
    printed = succeed(cli(*command, "--epochs", 1, "--folds", 2, "--seeds", 2)).out
    assert "fine-tuned 4 times, on held-out rows" in printed and " ± " in printed
    names = {path.name for path in (tmp_path / "folds").iterdir()}
    assert names == {"repeats.json", *(f"seed-{seed}-fold-{fold}" for seed in (0, 1) for fold in (1, 2))}
    settings = (tmp_path / "folds" / "seed-1-fold-2" / "settings.yaml").read_text()
    assert "seed: 1\n" in settings and "fold: 2\n" in settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fold": 2}, "--fold 2: no --folds; expected the number of parts, too"),
        ({"folds": 3, "fold": 4}, "--fold 4: --folds is 3; expected 1 to 3"),
        ({"folds": 3, "fold": 1, "valid": Path("v.csv")}, "--folds 3: validates on parts of --train; expected --train"),
    ],
)
def test_folds_that_are_refused(source, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(source, tmp_path / "none.csv", tmp_path / "run", **options)


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("ddp", ["--lora-rank", 2, "--patience", 9]),
        ("fsdp", ["--freeze", 1, "--layer-decay", 0.5]),
        ("fsdp", ["--lr", 0, "--valid-every", 1, "--patience", 1]),
    ],
)
def test_two_ranks_train_what_one_trains(source, tmp_path, cli, strategy, options):
    """Without dropout two ranks have the weights of one process, and they end early together."""
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"fox {i % 5}", "answer": "red"}) + "\n" for i in range(40)))
    command = ["finetune", "--from", source, "--train", path, "--task", "generation", "--batch-size", 8, "--lr", 3e-3]
    command += ["--epochs", 2, *options]
    succeed(cli(*command, "--out", tmp_path / "one"))
    assert cli(*command, "--out", tmp_path / "two", "--strategy", strategy, ranks=2).codes == [0, 0]
    one, two = (read_record(tmp_path / name) for name in ("one", "two"))
    assert (two["best_step"], two["last_step"]) == (one["best_step"], one["last_step"])
    assert two["valid_loss"] == pytest.approx(one["valid_loss"], rel=1e-3)
    assert one["last_step"] == (2 if 0 in options else 10)  # nothing gets better at a rate of 0
    name = "adapter_model.safetensors" if strategy == "ddp" else "model.safetensors"
    weights, expected = (load_file(tmp_path / folder / name) for folder in ("two", "one"))
    for label, tensor in expected.items():
        torch.testing.assert_close(weights[label], tensor, rtol=1e-3, atol=2e-5, msg=label)
