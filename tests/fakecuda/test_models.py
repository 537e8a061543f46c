"""Test training steps of whole models on `cuda`: eager, compiled and captured, of this library and accelerated."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gpt_fast
from gpt_fast import GPTConfig, GPTForCausalLM, GPTForMaskedLM, GPTForSequenceClassification
from gpt_fast.training.engine.optimizer import make_optimizer
from tests.fakecuda.small import SIZES
from tools.fakecuda.record import LAUNCHES, Seen

if os.environ.get("FAKECUDA_CAPABILITY", "90") != "90":
    pytest.skip("whole models run as sm_90", allow_module_level=True)

TABLE = Path(__file__).with_name("launches.json")
B, T = 2, 32


def check_launches(name: str, seen: Seen) -> None:
    """Compare the launches of a step with the committed table; FAKECUDA_UPDATE=1 writes the table instead."""
    counts = {kind: count for kind, count in seen.counts().items() if kind in LAUNCHES}
    table = json.loads(TABLE.read_text("utf-8")) if TABLE.exists() else {}
    if os.environ.get("FAKECUDA_UPDATE") == "1":
        table[name] = counts
        TABLE.write_text(json.dumps(dict(sorted(table.items())), indent=1) + "\n", encoding="utf-8")
    assert sum(counts.values()) <= sum(table[name].values()), f"{counts}; expected at most {table[name]}"


def own(preset: str, device: torch.device, head: type = GPTForCausalLM, **changes: Any) -> nn.Module:
    with torch.device(device):
        return head(GPTConfig.preset(preset, **{**SIZES, "dropout": 0.1, **changes}))


def tokens(device: torch.device, T: int = T) -> Tensor:
    return torch.zeros(B, T, dtype=torch.int64, device=device)


def training_step(
    model: nn.Module, device: torch.device, loss: Callable[[], Tensor], dtype: torch.dtype | None = torch.bfloat16
) -> Callable[[], None]:
    optimizer = make_optimizer(model, 1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            value = loss()
        value.backward()
        optimizer.step()

    return step


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("preset", ["notes", "gpt1", "gpt2"])
def test_an_eager_step(preset: str, dtype: torch.dtype | None, device: torch.device, watched: Callable) -> None:
    model, ids = own(preset, device), tokens(device)
    step = training_step(model, device, lambda: model(ids, ids).loss, dtype)
    step()
    with watched() as seen:
        step()
    check_launches(f"eager {preset} {'float32' if dtype is None else str(dtype).removeprefix('torch.')}", seen)


def test_a_step_of_gpt2(device: torch.device, watched: Callable) -> None:
    """Train GPT-2 124M at T = 1,024, as the benchmark suite does."""
    with torch.device(device):
        model = GPTForCausalLM(GPTConfig.preset("gpt2"))
    ids = tokens(device, 1024)
    step = training_step(model, device, lambda: model(ids, ids).loss)
    step()
    with watched() as seen:
        step()
    check_launches("eager GPT-2 124M bfloat16", seen)


@pytest.mark.parametrize("options", ["lengths", "key_mask"])
def test_a_padded_step(options: str, device: torch.device, watched: Callable) -> None:
    model, ids = own("gpt2", device), tokens(device)
    padding: dict[str, Tensor] = {
        "lengths": torch.tensor([T, T // 2], device=device),
        "key_mask": torch.ones(B, T, dtype=torch.bool, device=device),
    }
    step = training_step(model, device, lambda: model(ids, ids, **{options: padding[options]}).loss)
    step()
    with watched():
        step()


@pytest.mark.parametrize("head", [GPTForMaskedLM, GPTForSequenceClassification])
def test_a_step_of_another_head(head: type, device: torch.device, watched: Callable) -> None:
    """The masked model counts its labelled positions and waits for the device once. The classifier does not wait."""
    model, ids = own("gpt2", device, head), tokens(device)
    labels = ids if head is GPTForMaskedLM else ids[:, 0]
    step = training_step(model, device, lambda: model(ids, labels).loss)
    step()
    with watched(waits=head is GPTForMaskedLM) as seen:
        step()
    assert len(seen.of("sync")) <= 1


def test_activation_checkpointing(device: torch.device, watched: Callable) -> None:
    model, ids = own("gpt2", device), tokens(device)
    model.trunk.checkpoint_activations = True  # type: ignore[union-attr]
    step = training_step(model, device, lambda: model(ids, ids).loss)
    step()
    with watched() as seen:
        step()
    check_launches("checkpointed gpt2 bfloat16", seen)


@pytest.mark.parametrize("preset", ["notes", "gpt1", "gpt2"])
def test_a_compiled_step(preset: str, device: torch.device, watched: Callable) -> None:
    model, ids = own(preset, device), tokens(device)
    compiled = torch.compile(lambda: model(ids, ids).loss, fullgraph=True, dynamic=False)
    step = training_step(model, device, compiled)
    step()
    step()
    with watched() as seen:
        step()
    check_launches(f"compiled {preset} bfloat16", seen)


def check_captured(model: nn.Module, loss: Callable[[], Tensor], device: torch.device, watched: Callable) -> None:
    """Capture forward, backward and the optimizer as one graph, and replay it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True, capturable=True)

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with watched(waits=True), torch.cuda.graph(graph, stream=side):
            step()
        with watched() as seen:
            graph.replay()
    assert len(seen.of("graph")) == 1
    assert len(seen.launches()) <= 3, "expected the graph, and the fills of the generator's seed and offset"


@pytest.mark.parametrize("preset", ["notes", "gpt1", "gpt2"])
def test_a_captured_step(preset: str, device: torch.device, watched: Callable) -> None:
    model, ids = own(preset, device), tokens(device)
    check_captured(model, lambda: model(ids, ids).loss, device, watched)


# --- accelerated models


def accelerated(name: str) -> nn.Module:
    import transformers

    sizes = {"n_layer": 2, "n_embd": 128, "n_head": 2, "vocab_size": 512, "n_positions": 64}
    if name.startswith("GPT2"):
        padding = {"pad_token_id": 0} if "Sequence" in name else {}
        config = transformers.GPT2Config(**sizes, **padding, bos_token_id=1, eos_token_id=1)
    else:
        config = transformers.OpenAIGPTConfig(**sizes)
    model = getattr(transformers, name)(config)
    gpt_fast.accelerate(model)
    return model


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "OpenAIGPTLMHeadModel", "GPT2ForSequenceClassification"])
def test_an_accelerated_model(name: str, compiled: bool, device: torch.device, watched: Callable) -> None:
    pytest.importorskip("transformers")
    if compiled and "Sequence" in name:
        pytest.skip("transformers reads the padding's place from the tokens, which no graph holds")
    model, ids = accelerated(name).to(device), tokens(device)
    labels = ids[:, 0] if "Sequence" in name else ids
    forward: Any = torch.compile(model, dynamic=False) if compiled else model
    step = training_step(model, device, lambda: forward(ids, labels=labels).loss)
    step()
    step()
    # transformers looks for the padding token at both ends of a row if the configuration has one.
    with watched(waits="Sequence" in name) as seen:
        step()
    assert seen.of("triton")
    check_launches(f"{'compiled' if compiled else 'eager'} {name} bfloat16", seen)


@pytest.mark.parametrize("dtype", [None, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "OpenAIGPTLMHeadModel"])
def test_an_accelerated_model_in_another_precision(
    name: str, dtype: torch.dtype | None, device: torch.device, watched: Callable
) -> None:
    pytest.importorskip("transformers")
    model, ids = accelerated(name).to(device), tokens(device)
    step = training_step(model, device, lambda: model(ids, labels=ids).loss, dtype)
    step()
    with watched() as seen:
        step()
    check_launches(f"eager {name} {'float32' if dtype is None else str(dtype).removeprefix('torch.')}", seen)


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "OpenAIGPTLMHeadModel"])
def test_a_captured_step_of_an_accelerated_model(name: str, device: torch.device, watched: Callable) -> None:
    pytest.importorskip("transformers")
    model, ids = accelerated(name).to(device), tokens(device)
    check_captured(model, lambda: model(ids, labels=ids).loss, device, watched)


def test_activation_checkpointing_of_an_accelerated_model(device: torch.device, watched: Callable) -> None:
    pytest.importorskip("transformers")
    model, ids = accelerated("GPT2LMHeadModel").to(device).train(), tokens(device)
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    step = training_step(model, device, lambda: model(ids, labels=ids, use_cache=False).loss)
    step()
    with watched() as seen:
        step()
    check_launches("checkpointed GPT2LMHeadModel bfloat16", seen)


def test_an_accelerated_model_with_a_mask(device: torch.device, watched: Callable) -> None:
    """With a mask the host waits for the device, because transformers itself checks the mask for padding."""
    pytest.importorskip("transformers")
    model, ids = accelerated("GPT2LMHeadModel").to(device), tokens(device)
    step = training_step(model, device, lambda: model(ids, attention_mask=torch.ones_like(ids), labels=ids).loss)
    step()
    with watched(waits=True) as seen:
        step()
    assert seen.of("triton")


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_pytorchs_own_attention(p: float, device: torch.device, watched: Callable) -> None:
    from gpt_fast.integrations import sdpa

    q = torch.zeros(2, 3, 40, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    sdpa.activate()
    try:
        with watched() as seen:
            out = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True, dropout_p=p)
            out.backward(torch.ones_like(out))
    finally:
        sdpa.restore()
    assert {entry.name for entry in seen.of("triton")} >= {"_fwd_kernel"}
