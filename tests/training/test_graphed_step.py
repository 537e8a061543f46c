"""A training step as one CUDA graph: the captured step has the engine's bits, and some options are refused.

Captures run on a GPU. tests/fakecuda/test_graph.py captures on a stand-in for CUDA, which computes no values.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpt_fast import GPTConfig, GPTForCausalLM
from gpt_fast.data.batches import Batch, causal_batch
from gpt_fast.training import GraphedStep, pretrain
from gpt_fast.training.engine.graph import EAGER_CALLS, make_capturable
from gpt_fast.training.engine.update import Engine, EngineSettings
from gpt_fast_settings.pretrain import PretrainSettings

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES: dict[str, Any] = {"num_tokens": 40, "hidden_dim": 16, "num_heads": 2, "num_layers": 2, "seq_len": 16}
UPDATES = 20


def make(device: str = "cpu", **settings: Any) -> Engine:
    """Return an engine with dropout. The random generator has the same state after every call."""
    torch.manual_seed(0)
    with torch.device(device):
        model = GPTForCausalLM(GPTConfig.preset("gpt2", **SIZES, dropout=0.1))
    torch.manual_seed(1)
    return Engine(model, 1e-2, EngineSettings(**settings))


def batches(update: int) -> list[Batch]:
    """Return the two parts of an update. In every third update the second part has weight 0."""
    generator = torch.Generator().manual_seed(update)
    first, second = (causal_batch(torch.randint(40, (2, 16), generator=generator)) for _ in range(2))
    return [first, second._replace(weight=0 if update % 3 == 0 else second.weight)]


def rate(update: int) -> float:
    return 1e-2 / (update + 1)


def eager(engine: Engine) -> list[list[float]]:
    return [[float(x) for x in engine.update(batches(i), rate(i))] for i in range(UPDATES)]


def assert_same(engine: Engine, outcomes: list[list[float]], other: Engine, others: list[list[float]]) -> None:
    assert outcomes == others
    assert len({loss for loss, _, _ in outcomes}) == UPDATES
    states = engine.state(), other.state()
    assert states[0].keys() == states[1].keys()
    assert [name for name, x in states[0].items() if not torch.equal(x, states[1][name])] == []


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_the_captured_step_computes_what_an_update_computes(precision: str) -> None:
    """The step that a graph captures, with rates in tensors and inputs by name, has the bits of an update."""
    plain, engine = make(precision=precision), make(precision=precision)
    expected = eager(plain)
    torch.manual_seed(1)
    rates = make_capturable(engine.optimizer, engine.device)
    engine.model.train()
    outcomes = []
    for i in range(UPDATES):
        sent = engine.send(batches(i))
        for value in rates:
            value.fill_(rate(i))
        tensors = {f"{name} of part {j}": x for j, part in enumerate(sent.parts) for name, x in part.inputs().items()}
        outcomes.append(engine._compute_named(sent.counts, **tensors).tolist())
    assert_same(plain, expected, engine, outcomes)


@pytest.mark.cuda
@pytest.mark.parametrize("options", [{}, {"checkpoint_activations": True}], ids=str)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_twenty_updates_as_a_graph_are_twenty_updates(precision: str, options: dict) -> None:
    """The updates have dropout, accumulation and a falling rate. Two runs of the graph agree with the eager one."""
    plain = make("cuda", precision=precision, **options)
    expected = eager(plain)
    for _ in range(2):
        graphed = make("cuda", precision=precision, graph=True, **options)
        assert_same(plain, expected, graphed, eager(graphed))
    assert EAGER_CALLS < UPDATES


def test_a_scale_that_a_graph_reads_stays_in_its_place() -> None:
    """A float16 update changes the loss scale in place, because a graph reads it at a fixed address."""
    engine = make(precision="float16")
    scale, growth = engine.scale, engine.growth
    engine.model.output_layer.register_forward_hook(lambda module, args, out: out * float("inf"))
    hook = engine.model.trunk.register_forward_hook(lambda module, args, out: out * float("nan"))
    assert bool(engine.update(batches(1), 1e-2).skipped)
    hook.remove()
    assert (scale.item(), growth.item()) == (2.0**15, 0.0)
    assert engine.scale is scale and engine.growth is growth


def test_an_optimizer_that_no_graph_can_hold_is_named() -> None:
    weight = torch.nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="optimizer is a Muon, which no graph can hold; expected one with the option"):
        make_capturable(torch.optim.Muon([weight], lr=0.1), torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_without_cuda() -> None:
    with pytest.raises(ValueError, match="GraphedStep: this PyTorch sees no CUDA device; expected one"):
        GraphedStep(lambda: None)


def test_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "distributed", SimpleNamespace(is_initialized=lambda: True, get_world_size=lambda: 2))
    with pytest.raises(ValueError, match="the process group has 2 ranks; expected one process alone"):
        GraphedStep(lambda: None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cpu"}, "--graph: --device is cpu; expected cuda"),
        ({"optimizer": "muon"}, "--graph: --optimizer muon reads a value .*; expected adamw"),
        ({"objective": "mlm"}, "--graph: --objective mlm counts its labels .*; expected clm"),
        ({"pack": True}, "--graph: --pack gives updates of different shapes; expected one shape, without --pack"),
        ({"window_warmup": 0.5}, "--graph: --window-warmup gives updates of different shapes"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_that_a_graph_excludes(
    options: dict, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(pretrain, "resolve_device", lambda name: "cpu" if name == "cpu" else "cuda")
    with pytest.raises(ValueError, match=message):
        pretrain.check(PretrainSettings(out=tmp_path, graph=True, **options))


def test_a_graph_is_for_one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(pretrain, "resolve_device", lambda name: "cuda")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--graph: torchrun started 2 processes; expected one"):
        pretrain.check(PretrainSettings(out=tmp_path, graph=True, batch_size=16))
