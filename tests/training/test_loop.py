"""The training loop and its engine: logging, accumulation, precision, skipped updates, spikes."""

import dataclasses
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from gpt_fast import GPTConfig, GPTForCausalLM, GPTForMaskedLM
from gpt_fast.data.batches import Batch, causal_batch
from gpt_fast.heads import HEADS
from gpt_fast.training.engine.update import Engine, EngineSettings
from gpt_fast.training.loop import Loop, LoopSettings, LoopState, Progress, Spikes, intervals
from gpt_fast.training.runs import checkpoints
from gpt_fast.training.runs.folder import new_run, read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"num_tokens": 40, "hidden_dim": 16, "num_heads": 2, "num_layers": 2, "seq_len": 16}


def ignore(*_: object) -> None:
    """Stand in for a display."""


def constant(step: int) -> float:
    return 1.0


class Line(nn.Module):
    """Model of one number, whose loss is the number's squared distance from the mean label."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(1))
        self.trunk = SimpleNamespace()
        self.seen = 0

    def loss_counts(self, tokens, labels):
        return torch.tensor([float(len(labels))])

    def forward(self, tokens, labels, loss_weights):
        self.seen += 1
        return SimpleNamespace(loss=(self.x - labels.mean()).square().sum())


def batch(value: float) -> Batch:
    return Batch(torch.zeros(2, 3), torch.full((2,), value))


def train(folder: Path, values: list[float], model: nn.Module | None = None, **options) -> Loop:
    """Run the loop with one batch of each of `values` as labels, and return it with what it said and showed."""
    model = model or Line()
    given = {
        "steps": len(values),
        "lr": 0.1,
        "schedule": constant,
        "log_every": 1,
        "valid_every": 100,
    } | options
    said: list[str] = []
    shown: list[Progress] = []
    with new_run(folder) as run:
        loop = Loop(
            Engine(model, given["lr"], EngineSettings()),
            lambda step: [batch(values[step])],
            given.pop("validate", dict),
            LoopSettings(**given),
            run,
            shown.append,
            said.append,
        )
        loop.said, loop.shown = said, shown
        loop.run()
    return loop


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- logging ---


def test_loop_logs_and_validates(tmp_path):
    model = Line()
    loop = train(
        tmp_path / "a", [float(i) for i in range(7)], model, schedule=lambda step: 1 / (step + 1), log_every=3,
        valid_every=5, validate=lambda: {"valid_loss": 5.0},
    )  # fmt: skip
    logged = lines(tmp_path / "a")
    assert [line["step"] for line in logged] == [3, 5, 6, 7]
    assert ["valid_loss" in line for line in logged] == [False, True, False, True]
    assert [line["lr"] for line in logged] == pytest.approx([0.1 / 3, 0.1 / 5, 0.1 / 6, 0.1 / 7])
    assert loop.state.line == logged[-1]
    assert [progress.step for progress in loop.shown] == list(range(1, 8))
    assert [progress.logged for progress in loop.shown if progress.logged] == logged
    assert all(progress.tokens_per_second > 0 for progress in loop.shown)
    assert model.seen == 7
    assert all(line["tokens_per_second"] > 0 for line in logged)


@pytest.mark.parametrize("steps", [1, 7, 60, 125, 500, 1000, 100_000])
def test_intervals(steps):
    """Validations lie on logged steps, and there are about as many as asked for."""
    every = intervals(steps, validations=10)
    assert every["valid_every"] % every["log_every"] == 0
    assert min(steps, 8) // 2 <= steps // every["valid_every"] <= 12
    assert steps // every["log_every"] >= min(steps, 50)


def test_logged_loss_is_the_mean_since_the_last_line(tmp_path):
    train(tmp_path / "a", [1.0, 3.0], lr=0.0, log_every=2)
    assert lines(tmp_path / "a")[-1]["train_loss"] == pytest.approx((1 + 9) / 2)


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path / "a", [1.0, 3.0], trackers=("tensorboard",))
    events = EventAccumulator(str(tmp_path / "a" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train_loss")] == [1, 2]
    assert [event.value for event in events.Scalars("train_loss")] == pytest.approx(
        [line["train_loss"] for line in lines(tmp_path / "a")]
    )


# --- traces ---


def spans(folder: Path, name: str) -> list[dict]:
    """Return the complete events with `name` in theirs, in the order in which they began."""
    events = json.loads((folder / "profile.json").read_text("utf-8"))["traceEvents"]
    return sorted((e for e in events if e.get("ph") == "X" and name in e["name"]), key=lambda event: event["ts"])


@pytest.mark.parametrize(
    ("updates", "recorded"),
    [
        pytest.param(14, [7, 8, 9], id="the profiler ends before the run"),
        pytest.param(10, [7, 8, 9], id="the run ends with the profiler"),
        pytest.param(6, [3, 4, 5], id="a run without time to wait"),
        pytest.param(2, [0, 1], id="a run without time to warm up"),
    ],
)
@pytest.mark.filterwarnings("ignore:Profiler won't be using warmup")
def test_a_trace_of_a_few_updates(tmp_path, updates, recorded):
    """Each update is a span that holds the backward pass and the optimizer's step."""
    loop = train(tmp_path / "a", [1.0] * updates, profile=True)
    steps = [span for span in spans(tmp_path / "a", "ProfilerStep#") if span["cat"] == "user_annotation"]
    assert [span["name"] for span in steps] == [f"ProfilerStep#{step}" for step in recorded]
    for name in ("PowBackward0", "Optimizer.step#AdamW.step"):
        found = [span["ts"] for span in spans(tmp_path / "a", name)]
        assert all(any(step["ts"] <= at <= step["ts"] + step["dur"] for at in found) for step in steps), name
    assert [message for message in loop.said if "profile.json" in message] == [
        f"{tmp_path / 'a' / 'profile.json'}: a trace of updates; open it at https://ui.perfetto.dev or chrome://tracing"
    ]


def test_no_trace_unless_asked_for(tmp_path):
    train(tmp_path / "a", [1.0, 1.0])
    assert not (tmp_path / "a" / "profile.json").exists()


def test_a_traced_run_trains_the_same(tmp_path):
    traced, plain = Line(), Line()
    train(tmp_path / "a", [1.0, 2.0, 3.0, 4.0], traced, profile=True)
    train(tmp_path / "b", [1.0, 2.0, 3.0, 4.0], plain)
    assert torch.equal(traced.x, plain.x)


# --- updates that cannot be made ---


def test_an_update_that_is_not_finite_changes_nothing(tmp_path):
    """The weights, both moments and the optimizer's step count are those of a run without that batch."""
    losses = [1.0, math.inf, 2.0, math.nan, 3.0]
    skipping, clean = Line(), Line()
    loop = train(tmp_path / "a", losses, skipping)
    other = train(tmp_path / "b", [1.0, 2.0, 3.0], clean)
    assert skipping.x.item() == clean.x.item() != 0
    for name, tensor in other.engine.state().items():
        assert torch.equal(loop.engine.state()[name], tensor), name
    assert [line["skipped"] for line in lines(tmp_path / "a")] == [0, 1, 1, 2, 2]
    # JSON has no NaN: a strict reader takes the file, and the curve has gaps.
    text = (tmp_path / "a" / "metrics.jsonl").read_text()
    strict = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert [line["train_loss"] is None for line in strict] == [False, True, False, True, False]
    assert [math.isnan(line["train_loss"]) for line in read_metrics(tmp_path / "a")] == [
        line["train_loss"] is None for line in strict
    ]
    assert [message for message in loop.said if "skipped" in message] == [
        "update 2: skipped, its loss (inf) or its gradient is not finite",
        "update 4: skipped, its loss (nan) or its gradient is not finite",
    ]


def test_too_many_skips_in_a_row_end_the_run_and_save_the_batch(tmp_path):
    with pytest.raises(ValueError, match=r"loss is inf .* at step 3, and 1 more .* try a smaller --lr than 0\.1"):
        train(tmp_path / "a", [1.0, 2.0, math.inf, math.inf, 1.0], max_skips=1)
    saved = load_file(tmp_path / "a" / "bad-batch.safetensors")
    assert saved["labels.0"].tolist() == [math.inf, math.inf]
    assert saved["tokens.0"].shape == (2, 3)


def test_skips_that_are_not_in_a_row_go_on(tmp_path):
    loop = train(tmp_path / "a", [math.inf, 1.0] * 5, max_skips=1)
    assert (loop.state.skipped, loop.state.step) == (5, 10)


def test_a_gradient_that_is_not_finite_is_skipped_too():
    class Root(Line):
        def forward(self, tokens, labels, loss_weights):
            return SimpleNamespace(loss=self.x.sqrt().sum())  # 0, with an infinite slope

    engine = Engine(Root(), 0.1, EngineSettings())
    outcome = engine.update([batch(1.0)], 0.1)
    assert outcome.loss == 0
    assert outcome.skipped == 1
    assert engine.model.x.item() == 0


def test_spikes():
    """Noise raises no alarm, a jump does, and so does the next one; a slow rise does not."""
    generator = torch.Generator().manual_seed(0)
    noise = (4 + 0.1 * torch.randn(400, generator=generator)).tolist()
    spikes = Spikes()
    assert not any(spikes.see(loss) for loss in noise)
    assert spikes.see(6.0)
    assert spikes.see(6.0)
    assert not any(spikes.see(loss) for loss in noise)
    assert not any(spikes.see(4 + 0.001 * i + noise[i] - 4) for i in range(300))
    assert not spikes.see(math.nan)


def test_spikes_are_logged(tmp_path):
    loop = train(tmp_path / "a", [1.0] * 60 + [50.0, 1.0], lr=0.0)
    assert [line["spikes"] for line in lines(tmp_path / "a")][-3:] == [0, 1, 1]
    assert any(message.startswith("update 61: the loss jumped to 2500") for message in loop.said)


# --- the engine ---


def make(head=GPTForCausalLM, settings: EngineSettings | None = None, **config) -> Engine:
    torch.manual_seed(0)
    return Engine(
        head(GPTConfig.preset("gpt2", **(SIZES | {"dropout": 0.0} | config))), 1e-2, settings or EngineSettings()
    )


def tokens(rows: int) -> torch.Tensor:
    return torch.randint(40, (rows, 16), generator=torch.Generator().manual_seed(1))


def masked(rows: slice) -> Batch:
    labels = tokens(8).masked_fill(torch.rand(8, 16, generator=torch.Generator().manual_seed(2)) > 0.3, -100)[rows]
    return Batch(tokens(8)[rows], labels, weight=int(labels.ne(-100).sum()))


@pytest.mark.parametrize("head", [GPTForCausalLM, GPTForMaskedLM], ids=["clm", "mlm"])
def test_accumulation_is_the_same_update(head):
    """Parts with unequal numbers of predictions have the loss and gradient of the mean over all predictions."""
    make_batch = masked if head is GPTForMaskedLM else lambda rows: causal_batch(tokens(8)[rows])
    whole, parts = make(head), make(head)
    for _ in range(3):
        a = whole.update([make_batch(slice(0, 8))], 1e-3)
        b = parts.update([make_batch(slice(0, 2)), make_batch(slice(2, 5)), make_batch(slice(5, 8))], 1e-3)
        torch.testing.assert_close(a.loss, b.loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(a.norm, b.norm, rtol=1e-5, atol=0)


JOINT = ["GPTForSequenceClassification", "GPTForSimilarity", "GPTForMultipleChoice", "GPTForTokenClassification",
         "GPTForQuestionAnswering"]  # fmt: skip


def labelled_batch(name: str, rows: slice) -> Batch:
    """Return rows of very unequal lengths, so that a part's share of the tokens is not its share of the rows."""
    generator = torch.Generator().manual_seed(1)
    shape = {"GPTForSimilarity": (8, 2, 16), "GPTForMultipleChoice": (8, 2, 16)}.get(name, (8, 16))
    batch = torch.randint(40, shape, generator=generator)
    lengths = torch.tensor([16, 3, 2, 9, 2, 16, 5, 12])
    if len(shape) == 3:
        lengths = lengths[:, None].expand(8, 2)
    labels = torch.arange(8) % 2
    if name == "GPTForTokenClassification":
        labels = (batch % 2).masked_fill(torch.rand(shape, generator=generator) > 0.4, -100)
    if name == "GPTForQuestionAnswering":
        labels = torch.tensor([[0, 1], [-100, -100], [0, -100], [1, 2], [-100, 1], [3, 4], [0, 0], [-100, -100]])
    return Batch(batch[rows], labels[rows], lengths[rows], weight=len(labels[rows]))


@pytest.mark.parametrize("parts", [2, 4, 8])
@pytest.mark.parametrize("name", JOINT)
def test_a_joint_loss_does_not_depend_on_the_division(name, parts):
    """The task's loss is a mean over rows, the language model's over tokens: each is divided by its own total."""
    whole, divided = (make(HEADS[name], lm_weight=0.5, num_labels=2) for _ in range(2))
    size = 8 // parts
    batches = [labelled_batch(name, slice(i, i + size)) for i in range(0, 8, size)]
    spare = labelled_batch(name, slice(0, 1))._replace(weight=0)  # as a rank with fewer rows than parts repeats one
    a = whole.update([labelled_batch(name, slice(0, 8))], 1e-3)
    b = divided.update([*batches, spare], 1e-3)
    torch.testing.assert_close(b.loss, a.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(b.norm, a.norm, rtol=1e-5, atol=0)
    inputs = labelled_batch(name, slice(0, 8)).inputs()
    fresh = make(HEADS[name], lm_weight=0.5, num_labels=2).model
    torch.testing.assert_close(a.loss, fresh(**inputs).loss.detach(), rtol=1e-5, atol=0)


def test_loss_weights_of_another_number_of_terms():
    model = make().model
    with pytest.raises(ValueError, match=r"gpt_fast.GPTForCausalLM: loss_weights has shape \[2\]; expected \[1\]"):
        model(tokens(2), labels=tokens(2), loss_weights=torch.ones(2))


def test_clipping():
    loose, tight = make(), make(settings=EngineSettings(max_grad_norm=1e-3))
    for engine in (loose, tight):
        norm = engine.update([causal_batch(tokens(4))], 0.0).norm
        clipped = nn.utils.get_total_norm([p.grad for p in engine.model.parameters()])
        torch.testing.assert_close(clipped, norm.clamp(max=engine.settings.max_grad_norm), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_checkpointed_activations_change_no_bit(dropout):
    plain = make(dropout=dropout)
    checkpointed = make(settings=EngineSettings(checkpoint_activations=True), dropout=dropout)
    for engine in (plain, checkpointed):
        torch.manual_seed(7)
        for _ in range(3):
            engine.update([causal_batch(tokens(4))], 1e-2)
    for a, b in zip(plain.model.parameters(), checkpointed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_checkpointed_activations_store_less():
    stored = {}
    for flag in (False, True):
        engine = make(settings=EngineSettings(checkpoint_activations=flag), num_layers=6)
        seen = set()

        def pack(x, seen=seen):
            seen.add((x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()))
            return x

        engine.model.train()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = engine.model(tokens(8), tokens(8)).loss
        del loss
        weights = {p.untyped_storage().data_ptr() for p in engine.model.parameters()}
        stored[flag] = sum(size for pointer, size in seen if pointer not in weights)
    assert stored[True] < 0.4 * stored[False]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_learns_what_float32_learns(precision):
    """The curve stays within 2 % of float32's, with float16's loss scale too, and the weights stay float32."""
    curves = []
    for name in ("float32", precision):
        engine = make(settings=EngineSettings(precision=name))
        curves.append(torch.stack([engine.update([causal_batch(tokens(8))], 1e-2).loss for _ in range(25)]))
        assert {p.dtype for p in engine.model.parameters()} == {torch.float32}
    assert curves[0][-1] < curves[0][0] - 0.5
    assert not torch.equal(*curves)
    torch.testing.assert_close(curves[1], curves[0], rtol=0.02, atol=0)


def test_the_loss_scale_halves_after_an_overflow_and_the_update_is_skipped():
    engine = make(settings=EngineSettings(precision="float16"))
    engine.scale.fill_(2.0**120)
    before = [p.detach().clone() for p in engine.model.parameters()]
    assert engine.update([causal_batch(tokens(4))], 1e-2).skipped
    assert engine.scale == 2.0**119
    assert all(torch.equal(a, b) for a, b in zip(before, engine.model.parameters(), strict=True))


def test_the_loss_scale_doubles_after_2000_good_updates():
    engine = make(settings=EngineSettings(precision="float16"))
    engine.growth.fill_(1999)
    assert not engine.update([causal_batch(tokens(4))], 1e-2).skipped
    assert (engine.scale, engine.growth) == (2.0**17, 0)


@pytest.mark.slow
def test_compile():
    """An engine with torch.compile has the same curve."""
    curves = []
    for flag in (False, True):
        engine = make(settings=EngineSettings(compile=flag))
        curves.append(torch.stack([engine.update([causal_batch(tokens(4))], 1e-2).loss for _ in range(4)]))
    torch.testing.assert_close(*curves, rtol=1e-4, atol=0)


# --- checkpoints ---


STATE = dataclasses.asdict(LoopState(losses=[1.25])) | {"data": {"rows": 3}, "record": {}}  # as in a checkpoint


def engine_with_state(steps: int = 2) -> Engine:
    engine = make()
    for _ in range(steps):
        engine.update([causal_batch(tokens(4))], 1e-2)
    return engine


def test_a_checkpoint_gives_every_tensor_back(tmp_path):
    engine, other = engine_with_state(), make()
    checkpoints.save(tmp_path, 2, engine.state(), STATE, 3, engine.world)
    (path,) = checkpoints.newest_first(tmp_path)
    assert checkpoints.read(path)["state"] == STATE
    checkpoints.load(path, other.state(), other.world)
    for name, tensor in engine.state().items():
        assert torch.equal(other.state()[name], tensor), name
    a, b = (e.update([causal_batch(tokens(4))], 1e-2) for e in (engine, other))
    assert torch.equal(a.loss, b.loss)


def test_the_last_k_are_kept_and_latest_names_the_newest(tmp_path):
    engine = engine_with_state(0)
    for step in (2, 10, 30, 100):
        checkpoints.save(tmp_path, step, engine.state(), STATE, 2, engine.world)
    assert [path.name for path in checkpoints.newest_first(tmp_path)] == ["step-000000100", "step-000000030"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000000030", "step-000000100"]
    assert (tmp_path / "latest").read_text() == "step-000000100\n"


def test_a_hidden_folder_of_another_program_is_kept(tmp_path):
    """Half-written checkpoints and those that were about to be removed go; no other folder does."""
    engine = engine_with_state(0)
    for name in (".ipynb_checkpoints", ".step-000000007.partial", ".step-000000008.removed"):
        (tmp_path / name).mkdir()
    checkpoints.save(tmp_path, 9, engine.state(), STATE, 1, engine.world)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".ipynb_checkpoints", "latest", "step-000000009"]


def test_latest_moves_when_the_checkpoint_is_whole_and_none_is_gone_yet(tmp_path, monkeypatch):
    engine, seen, write_text = engine_with_state(0), [], checkpoints.write_text

    def moving(path, text):
        folder, latest = path.parent, path.read_text().strip() if seen else None
        seen.append((checkpoints.read(folder / text.strip())["step"], latest, len(list(folder.glob("step-*")))))
        write_text(path, text)

    monkeypatch.setattr(checkpoints, "write_text", moving)
    for step in (1, 2, 3):
        checkpoints.save(tmp_path, step, engine.state(), STATE, 1, engine.world)
    assert seen == [(1, None, 1), (2, "step-000000001", 2), (3, "step-000000002", 2)]


def test_every_flipped_byte_is_noticed(tmp_path):
    """Flips in the tensors and in the manifest are noticed, in names of fields and in their values."""
    engine = engine_with_state(0)
    checkpoints.save(tmp_path, 1, engine.state(), STATE, 2, engine.world)
    (path,) = checkpoints.newest_first(tmp_path)
    checkpoints.read(path)
    for file in path.iterdir():
        whole = file.read_bytes()
        for place in torch.linspace(0, len(whole) - 1, 60).long().tolist():
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
            try:
                manifest = checkpoints.read(path)
            except checkpoints.Damaged:
                continue
            # White space is all that may change without harm.
            assert whole[place : place + 1].isspace(), (file.name, place)
            assert manifest["state"] == STATE
        file.write_bytes(whole[:-2])
        with pytest.raises(checkpoints.Damaged):
            checkpoints.read(path)
        file.write_bytes(whole)


def test_a_missing_or_foreign_file_is_noticed(tmp_path):
    engine = engine_with_state(0)
    checkpoints.save(tmp_path, 1, engine.state(), STATE, 2, engine.world)
    (path,) = checkpoints.newest_first(tmp_path)
    (path / "more").write_text("")
    with pytest.raises(checkpoints.Damaged, match="more"):
        checkpoints.read(path)
    (path / "more").unlink()
    next(path.glob("*.safetensors")).unlink()
    with pytest.raises(checkpoints.Damaged, match="shard"):
        checkpoints.read(path)


def test_a_failed_write_leaves_the_ones_before(tmp_path, monkeypatch):
    engine = engine_with_state(0)
    checkpoints.save(tmp_path, 1, engine.state(), STATE, 2, engine.world)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(tmp_path, 2, engine.state(), STATE, 2, engine.world)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000000001"]
    checkpoints.read(tmp_path / "step-000000001")


def test_a_checkpoint_of_other_sizes(tmp_path):
    engine = engine_with_state(0)
    checkpoints.save(tmp_path, 1, engine.state(), STATE, 2, engine.world)
    with pytest.raises(ValueError, match="does not fit this model"):
        checkpoints.load(tmp_path / "step-000000001", make(hidden_dim=32).state(), engine.world)
