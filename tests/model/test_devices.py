"""Test whole models on every device: heads, dropout, autocast, compile, graphs, generation and accelerated models.

The exact result comes from the same model under `use_reference` in float64 on the CPU. The yardstick is the same model
under `use_reference` on the device. The benchmark suite runs these tests before it times a model on a GPU.
"""

import contextlib
import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gpt_fast
from gpt_fast import DecodeSession, GPTConfig, GPTForCausalLM, GPTModel, generate, use_reference
from gpt_fast.heads import HEADS
from tests import handwritten
from tests.numerics import assert_as_accurate

PRESETS = ("notes", "gpt1", "gpt2")
SIZES = {"num_tokens": 61, "hidden_dim": 48, "num_heads": 4, "num_layers": 2, "seq_len": 40}
B, T = 3, 20
CLASS_LABELS = {
    "GPTForSequenceClassification": lambda: torch.randint(0, 2, (B,)),
    "GPTForSimilarity": lambda: torch.randint(0, 2, (B,)),
    "GPTForMultipleChoice": lambda: torch.randint(0, 2, (B,)),
    "GPTForTokenClassification": lambda: torch.randint(0, 2, (B, T)),
    "GPTForQuestionAnswering": lambda: torch.randint(0, T, (B, 2)),
}

pytestmark = pytest.mark.usefixtures("one_thread")


def tokens_of(rows: int = B, length: int = T) -> Tensor:
    return torch.randint(0, SIZES["num_tokens"], (rows, length))


def check_three(
    model: nn.Module, device: str, results: Callable[[nn.Module, Callable], dict[str, Tensor]], dtype: torch.dtype
) -> None:
    """Compare each named result of `results(model, move)` on the device with the yardstick and the exact result.

    The float32 floor of every gradient is relative to the largest gradient. A small gradient may be a sum of large
    terms that cancel, and float32 rounds the terms.
    """
    got = results(copy.deepcopy(model).to(device, dtype), lambda x: x.to(device))
    with use_reference():
        yardstick = results(copy.deepcopy(model).to(device, dtype), lambda x: x.to(device))
        exact = results(copy.deepcopy(model).double(), lambda x: x)
    largest = max(value.abs().max().item() for name, value in exact.items() if name.startswith("gradient"))
    for name, wanted in exact.items():
        terms = largest if name.startswith("gradient") else 0.0
        assert_as_accurate(got[name].cpu(), yardstick[name].cpu(), wanted, terms=terms, label=name)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"gradient of {name}": parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize(
    ("name", "preset"), [*(("GPTForCausalLM", preset) for preset in PRESETS), *((name, "gpt2") for name in HEADS)]
)
def test_a_head_and_all_of_its_gradients(name: str, preset: str, device: str) -> None:
    """Check the logits and the gradient of the loss for every parameter. One row is padded."""
    model = HEADS[name](GPTConfig.preset(preset, **SIZES, dropout=0.0))
    tokens, lengths = tokens_of(), torch.tensor([T, 7, T])
    labels = CLASS_LABELS.get(name, tokens_of)()
    if name == "GPTForQuestionAnswering":
        lengths = torch.full((B,), T)  # an answer lies among the real tokens
    if name in ("GPTForSimilarity", "GPTForMultipleChoice"):  # two sequences for each example
        tokens, lengths = torch.stack([tokens, tokens_of()], 1), lengths[:, None].expand(B, 2)

    def results(model: nn.Module, move: Callable) -> dict[str, Tensor]:
        out = model(move(tokens), move(labels), lengths=move(lengths), logits=True)
        out.loss.backward()
        logits = out.logits
        if logits.shape[:2] == (B, T):
            logits = logits[move(torch.arange(T) < lengths[:, None])]
        return {"logits": logits.detach(), **gradients(model)}

    check_three(model, device, results, torch.float32)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_model_drops_what_the_reference_drops(preset: str, device: str) -> None:
    """With the same seed the dropout masks are the same on every device, in forward and backward."""
    model = GPTModel(GPTConfig.preset(preset, **SIZES, dropout=0.3))
    tokens, upstream, seed = tokens_of(), torch.randn(B, T, SIZES["hidden_dim"]), torch.tensor([99])

    def results(model: nn.Module, move: Callable) -> dict[str, Tensor]:
        hidden = model(move(tokens), seed=move(seed))
        hidden.backward(move(upstream).to(hidden.dtype))
        return {"hidden": hidden.detach(), **gradients(model)}

    check_three(model, device, results, torch.float32)


def training_pass(model: GPTForCausalLM, tokens: Tensor, forward: Callable | None = None) -> list[Tensor]:
    """Return the loss and every gradient."""
    model.zero_grad(set_to_none=True)
    loss = (forward or model)(tokens, tokens).loss
    loss.backward()
    return [loss.detach(), *gradients(model).values()]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_pass_repeats_its_bits(preset: str, device: str) -> None:
    """The same seed gives the same bits, with dropout and autocast."""
    model, tokens = GPTForCausalLM(GPTConfig.preset(preset, **SIZES, dropout=0.1)).to(device), tokens_of().to(device)
    passes = []
    for _ in range(2):
        torch.manual_seed(3)
        with torch.autocast(device, torch.bfloat16):
            passes.append(training_pass(model, tokens))
    for first, second in zip(*passes, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("preset", PRESETS)
def test_activation_checkpointing_repeats_the_bits(preset: str, device: str) -> None:
    model, tokens = GPTForCausalLM(GPTConfig.preset(preset, **SIZES, dropout=0.1)).to(device), tokens_of().to(device)
    passes = []
    for checkpoints in (False, True):
        model.trunk.checkpoint_activations = checkpoints
        torch.manual_seed(3)
        passes.append(training_pass(model, tokens))
    for first, second in zip(*passes, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("preset", ["notes", "gpt2"])
def test_a_compiled_model_is_as_accurate(preset: str, device: str) -> None:
    """The model compiles to one graph, on a GPU by Inductor.

    Inductor's code rounds in other places than eager mode, so the bits may differ.
    """
    model, tokens = GPTForCausalLM(GPTConfig.preset(preset, **SIZES, dropout=0.0)), tokens_of()
    backend = "inductor" if device == "cuda" else "aot_eager"

    def results(model: nn.Module, move: Callable) -> dict[str, Tensor]:
        moved = move(tokens)
        compiles = next(model.parameters()).dtype != torch.float64
        forward = torch.compile(model, fullgraph=True, dynamic=False, backend=backend) if compiles else model
        forward(moved, moved).loss.backward()
        with torch.no_grad():
            logits = model(moved).logits
        return {"logits": logits, **gradients(model)}

    check_three(model, device, results, torch.float32)


@pytest.mark.cuda
@pytest.mark.parametrize("preset", PRESETS)
def test_a_captured_pass_repeats_the_bits(preset: str) -> None:
    """A CUDA graph of forward and backward, replayed with other tokens, gives the bits of eager mode for them."""
    model = GPTForCausalLM(GPTConfig.preset(preset, **SIZES, dropout=0.0)).cuda()
    tokens, others = tokens_of().cuda(), tokens_of().cuda()
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            training_pass(model, tokens)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph, stream=side):
        captured = training_pass(model, tokens)
    tokens.copy_(others)
    graph.replay()
    replayed = [value.clone() for value in captured]
    for first, second in zip(replayed, training_pass(model, others), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("preset", PRESETS)
def test_greedy_generation_takes_the_most_probable_tokens(preset: str, device: str) -> None:
    """Generation in steps with a cache, on a GPU by a captured graph, gives the argmax of one pass over all tokens."""
    model = GPTForCausalLM(GPTConfig.preset(preset, **SIZES)).to(device).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # weights so large that the choice depends on the context
            parameter.normal_(std=0.3) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    out = generate(model, tokens_of(2, 5).to(device), max_new_tokens=30, temperature=0)
    with use_reference(), torch.no_grad():
        predicted = model(out).logits.argmax(-1)
    assert torch.equal(out[:, 5:], predicted[:, 4:-1])


@pytest.mark.parametrize("preset", PRESETS)
def test_a_session_continues_a_prompt(preset: str, device: str) -> None:
    """The logits after a prompt and after each of three more tokens agree with one pass over all tokens."""
    model, tokens = GPTForCausalLM(GPTConfig.preset(preset, **SIZES)).eval(), tokens_of(2, 12)

    session = DecodeSession(copy.deepcopy(model).to(device), batch=2)
    moved = tokens.to(device)
    steps = [session.prefill(moved[:, :9]), *(session.step(moved[:, i].contiguous()) for i in range(9, 12))]
    with use_reference(), torch.no_grad():
        yardstick = copy.deepcopy(model).to(device)(moved).logits[:, 8:]
        exact = copy.deepcopy(model).double()(tokens).logits[:, 8:]
    assert_as_accurate(torch.stack(steps, 1).cpu(), yardstick.cpu(), exact)


@pytest.mark.parametrize("name", ["packed", "separate"])
def test_an_accelerated_handwritten_model(name: str, device: str) -> None:
    """Every gradient of an accelerated hand-written GPT-2 is as accurate as that of the original model."""
    tokens = torch.randint(handwritten.V, (B, T))
    plain = handwritten.make(name)
    fast = copy.deepcopy(plain)
    assert gpt_fast.accelerate(fast, strict=True).replaced
    found = {}
    for kind, model, dtype, place in (
        ("got", fast, torch.float32, device),
        ("yardstick", plain, torch.float32, device),
        ("exact", plain, torch.float64, "cpu"),
    ):
        twin = copy.deepcopy(model).to(place, dtype)
        with use_reference() if kind != "got" else contextlib.nullcontext():
            handwritten.loss_of(twin, tokens.to(place), tokens.to(place)).backward()
        found[kind] = gradients(twin)
    largest = max(gradient.abs().max().item() for gradient in found["exact"].values())
    for parameter, exact in found["exact"].items():
        got, yardstick = (found[kind][parameter].cpu() for kind in ("got", "yardstick"))
        assert_as_accurate(got, yardstick, exact, terms=largest, label=parameter)
