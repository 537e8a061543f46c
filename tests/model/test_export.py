"""Test exported graphs: `torch.jit.trace`, `torch.export`, decompositions into PyTorch's own operators, and ONNX."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from torch import Tensor

import gpt_fast
from gpt_fast import GPTConfig, ops
from tests import hf_models

# The ops compare shapes while they are traced, so PyTorch warns that a trace keeps them as constants. That is allowed.
pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning"),
]

SIZES = {"num_tokens": 61, "hidden_dim": 32, "num_heads": 4, "num_layers": 1, "seq_len": 20, "num_labels": 3}


def own(head: str = "GPTForCausalLM", preset: str = "gpt2", **options) -> nn.Module:
    return getattr(gpt_fast, head)(GPTConfig.preset(preset, **SIZES | options, dropout=0.0))


def accelerated(name: str = "GPT2LMHeadModel") -> nn.Module:
    model = hf_models.make(name, 0.0, use_cache=False, n_layer=1)
    gpt_fast.accelerate(model, strict=True)
    return model


class Call(nn.Module):
    """Module whose forward is `function(model, *inputs)`."""

    def __init__(self, model: nn.Module, function: Callable):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self.model, *inputs)


def tokens(T: int = 11, B: int = 2) -> Tensor:
    return torch.randint(8, 61, (B, T))


def operators(program: torch.export.ExportedProgram) -> set[str]:
    """Return the names of the operators in a program and in its inner graphs."""
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    return {str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_function"}


def ours(program: torch.export.ExportedProgram) -> set[str]:
    return {name for name in operators(program) if name.startswith("gpt_fast")}


# ---- torch.jit.trace -------------------------------------------------------------------------------------------------

ONES, PADDED = torch.ones(2, 11, dtype=torch.int64), hf_models.padding("left", 2, 11)
COUNTED, PACKED = torch.arange(11).expand(2, 11), torch.tensor([[*range(11)], [*range(4), *range(7)]])
CAUSAL = torch.ones(11, 11, dtype=torch.bool).triu(1)  # True hides a key
TRACED = {
    "mask": (
        accelerated, lambda model, x, mask: model(x, attention_mask=mask).logits, (ONES, PADDED)
    ),
    "mask_gpt1": (
        lambda: accelerated("OpenAIGPTLMHeadModel"), lambda model, x, mask: model(x, attention_mask=mask).logits,
        (ONES, PADDED),
    ),
    "packed_positions": (
        accelerated, lambda model, x, positions: model(x, position_ids=positions).logits, (COUNTED, PACKED)
    ),
    "labels": (  # in a graph the logits must be computed at once, because none can be computed when they are read
        lambda: accelerated().train(), lambda model, x, labels: torch.stack(
            [(out := model(x, labels=labels)).loss, out.logits.sum()]
        ), (tokens(), tokens()),
    ),
    "own_key_mask": (
        own, lambda model, x, mask: model(x, key_mask=mask).logits, (ONES.bool(), PADDED.bool())
    ),
    "own_lengths": (
        own, lambda model, x, lengths: model(x, lengths=lengths).logits, (torch.tensor([11, 11]), torch.tensor([11, 4]))
    ),
    "own_classifier": (
        lambda: own("GPTForSequenceClassification"), lambda model, x, lengths: model(x, lengths=lengths).logits,
        (torch.tensor([11, 11]), torch.tensor([11, 4])),
    ),
    "own_labels": (
        own, lambda model, x, labels: model(x, labels).loss, (tokens(), tokens().masked_fill(PADDED == 0, -100))
    ),
    "own_packed": (
        own, lambda model, x, ends: model(x[:1], cu_seqlens=ends).logits,
        (torch.tensor([0, 5, 11], dtype=torch.int32), torch.tensor([0, 8, 11], dtype=torch.int32)),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "function", "inputs"), TRACED.values(), ids=TRACED)
def test_a_trace_holds_for_other_values(make, function, inputs) -> None:
    """A trace gives correct results for other values.

    A value that Python reads during a trace becomes a constant of the graph, so the model must not read any.
    """
    model, first, second = Call(make(), function), *inputs
    model.train(model.model.training) if function is TRACED["labels"][1] else model.eval()
    x, other = tokens(), tokens()
    with torch.no_grad():
        traced = torch.jit.trace(model, (x, first))
        torch.testing.assert_close(traced(x, first), model(x, first))
        torch.testing.assert_close(traced(other, second), model(other, second))


def test_a_trace_of_an_encoder_layer_holds_for_other_masks() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True).eval()
    model = Call(layer, lambda layer, x, mask: layer(x, src_mask=mask))
    gpt_fast.accelerate(layer, strict=True)
    x = torch.randn(2, 11, 32)
    with torch.no_grad():
        traced = torch.jit.trace(model, (x, CAUSAL))
        for mask in (CAUSAL, CAUSAL.roll(1, 1) & CAUSAL):
            torch.testing.assert_close(traced(x, mask), model(x, mask))


# ---- torch.export ----------------------------------------------------------------------------------------------------

LOGITS = {
    "gpt2": own,
    "gpt1": lambda: own(preset="gpt1"),
    "accelerated_gpt2": accelerated,
    "accelerated_gpt1": lambda: accelerated("OpenAIGPTLMHeadModel"),
}
LOSSES = LOGITS | {
    "masked_lm": lambda: own("GPTForMaskedLM"),
    "tagging_and_lm": lambda: own("GPTForTokenClassification", lm_weight=0.5),
}


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x, labels=x % 3 if hasattr(model, "classifier") else x).loss


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).logits


def export(model: nn.Module, *, strict: bool = False) -> torch.export.ExportedProgram:
    length = torch.export.Dim("T", min=2, max=SIZES["seq_len"])
    return torch.export.export(model, (tokens(),), dynamic_shapes={"inputs": ({1: length},)}, strict=strict)


def assert_same_at_every_length(program: torch.export.ExportedProgram, model: nn.Module) -> None:
    for T in (2, 11, 20):
        batch = tokens(T)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(batch), model(batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)
def test_a_loss_is_exported_with_rows_of_two_tokens_and_more(make) -> None:
    """A loss is exported for every T from 2 on. Labels of T - 1 columns would make the program refuse T = 2."""
    model = Call(make(), loss_of)
    program = export(model)
    assert "gpt_fast.linear_cross_entropy_forward.default" in ours(program)
    assert_same_at_every_length(program, model)


# ---- decompositions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "function", "strict"),
    [
        *(pytest.param(make, logits_of, False, id=f"logits_{name}") for name, make in LOGITS.items()),
        *(pytest.param(make, loss_of, False, id=f"loss_{name}") for name, make in LOSSES.items()),
        pytest.param(accelerated, loss_of, True, id="loss_traced_by_dynamo"),
    ],
)
def test_a_decomposed_program_has_pytorchs_operators_only(make, function, strict: bool) -> None:
    model = Call(make(), function).train(function is loss_of)
    program = export(model, strict=strict)
    assert ours(program) or strict  # Dynamo puts autograd functions into graphs of their own
    decomposed = program.run_decompositions(ops.decompositions())
    assert ours(decomposed) == set()
    assert_same_at_every_length(decomposed, model)


def test_every_operator_has_a_decomposition() -> None:
    """Every operator has a decomposition. That of a backward operator raises an error."""
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("gpt_fast::")}
    assert names == {operator.name() for operator in ops.decompositions()}


def rounded(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


X, SEED = torch.randn(2, 5, 16), torch.tensor([7])
Q, K, TARGET = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, 8), torch.tensor([[0, -100, 2, 3, 4], [5, 6, -100, 8, 9]])
KEYS = torch.tensor([[True, True, False, True, True], [True, False, True, True, True]])
NO_MASKS = (None, None, None, None)
CALLS = {
    "layer_norm": ("layer_norm", (X, torch.randn(16), torch.randn(16), 1e-5)),
    "layer_norm_bfloat16": ("layer_norm", (rounded(2, 5, 16), torch.randn(16), None, 1e-3)),
    "add_layer_norm_dropout": (
        "add_layer_norm", (X, torch.randn(2, 5, 16), torch.randn(16), torch.randn(16), 1e-5, 0.3, SEED, 4)
    ),
    "attention_causal_dropout": ("attention", (Q, K, K, *NO_MASKS, True, None, 0.3, SEED, 2, 0.5)),
    "attention_keys_and_window": ("attention", (Q, K, K, None, KEYS, None, None, False, 2, 0.0, None, 0, 0.3)),
    "attention_lengths": (
        "attention", (Q, K, K, torch.tensor([5, 0]), None, None, None, True, None, 0.0, None, 0, 0.3)
    ),
    "attention_packed": (
        "attention",
        (Q[:1], K[:1], K[:1], None, None, None, torch.tensor([0, 2, 5]), True, None, 0.3, SEED, 1, 0.3),
    ),
    "decode_attention": (
        "decode_attention", (Q[:, :, 0], torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8), torch.tensor([9, 3]))
    ),
    "embedding_dropout": (
        "embedding", (tokens(5), torch.randn(61, 16), torch.randn(20, 16), torch.arange(5), 0.3, SEED, 1)
    ),
    "linear_bfloat16": ("linear", (rounded(2, 5, 16), rounded(7, 16), rounded(7))),
    "mlp_relu_dropout": (
        "mlp", (X, torch.randn(24, 16), None, torch.randn(16, 24), None, "relu", 0.3, SEED, 3, True)
    ),
    "mlp_gelu": (
        "mlp",
        (X, torch.randn(24, 16), torch.randn(24), torch.randn(16, 24), torch.randn(16), "gelu", 0.0, None, 0, False),
    ),
    **{
        f"linear_cross_entropy_{reduction}": (
            "linear_cross_entropy",
            (X, torch.randn(12, 16), TARGET, torch.randn(12), -100, 0.1, reduction, True, True, True),
        )
        for reduction in ("mean", "sum", "none")
    },
    "linear_cross_entropy_without_targets": (
        "linear_cross_entropy",
        (X, torch.randn(12, 16), torch.full((2, 5), -100), None, -100, 0.0, "mean", False, False, False),
    ),
}  # fmt: skip
RESULTS = {"add_layer_norm": 2, "linear_cross_entropy": 2}  # number of results that a forward pass uses; else 1


@pytest.mark.skipif(gpt_fast.build_info() is None, reason="the operators have no kernel for the CPU: not built")
@pytest.mark.parametrize(("op", "args"), CALLS.values(), ids=CALLS)
def test_a_decomposition_computes_what_its_operator_computes(op: str, args: tuple) -> None:
    operator = getattr(torch.ops.gpt_fast, f"{op}_forward").default
    wanted, got = operator(*args), ops.decompositions()[operator](*args)
    if isinstance(wanted, Tensor):
        wanted, got = (wanted,), (got,)
    assert len(got) == len(wanted)
    for a, b in list(zip(got, wanted, strict=True))[: RESULTS.get(op, 1)]:
        torch.testing.assert_close(a, b)


def test_a_program_of_a_backward_pass_is_refused() -> None:
    def gradient(model: nn.Linear, x: Tensor) -> Tensor:
        return torch.ops.gpt_fast.linear_backward(x, x, model.weight, True, False, False)[0]

    program = torch.export.export(Call(nn.Linear(4, 4, bias=False), gradient), (torch.randn(2, 4),))
    with pytest.raises(NotImplementedError, match=r"gpt_fast\.linear: .*linear_backward, which has no decomposition"):
        program.run_decompositions(ops.decompositions())


ELSEWHERE = """
import sys, torch
batch, expected = torch.load(sys.argv[1] + "/example.pt")
program = torch.export.load(sys.argv[1] + "/decomposed.pt2")
torch.testing.assert_close(program.module()(batch), expected)
print("gpt_fast" in sys.modules)
"""


@pytest.mark.slow
def test_a_decomposed_program_runs_without_this_library(tmp_path: Path) -> None:
    model, batch = Call(own(), logits_of).eval(), tokens(7)
    torch.export.save(export(model).run_decompositions(ops.decompositions()), tmp_path / "decomposed.pt2")
    torch.save((batch, model(batch).detach()), tmp_path / "example.pt")
    run = [sys.executable, "-c", ELSEWHERE, str(tmp_path)]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# ---- ONNX ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", LOGITS.values(), ids=LOGITS)
def test_the_onnx_exporter_meets_pytorchs_operators_only(make, monkeypatch: pytest.MonkeyPatch) -> None:
    """During an ONNX export the model runs the reference, so the graph has only PyTorch's operators.

    The test sets the flag of `torch.onnx.export`, which itself would need more packages.
    """
    from torch.onnx._internal.exporter import _flags

    model = Call(make(), logits_of).eval()
    monkeypatch.setattr(_flags, "_is_onnx_exporting", True)
    assert torch.onnx.is_in_onnx_export()
    program = export(model)
    with torch.no_grad():
        traced = torch.jit.trace(model, (tokens(),))
    monkeypatch.undo()
    assert ours(program) == set()
    assert not [node.kind() for node in traced.inlined_graph.nodes() if node.kind().startswith("gpt_fast")]
    assert_same_at_every_length(program, model)


@pytest.mark.parametrize("make", LOGITS.values(), ids=LOGITS)
@pytest.mark.parametrize("decomposed", [False, True], ids=["model", "decomposed_program"])
@pytest.mark.filterwarnings("ignore")
def test_an_onnx_file_computes_the_same_logits(make, decomposed: bool, tmp_path: Path) -> None:
    """PyTorch's exporter writes the file, with free batch size and length, and onnxruntime runs it."""
    pytest.importorskip("onnxscript", reason="the extra dev is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra dev is not installed")
    model = Call(make(), logits_of).eval()
    sizes = {"inputs": ({0: torch.export.Dim("B", min=1, max=64), 1: torch.export.Dim("T", min=2, max=20)},)}
    given = (torch.randint(61, (3, 9)),)
    if decomposed:
        program = torch.export.export(model, given, dynamic_shapes=sizes)
        onnx = torch.onnx.export(program.run_decompositions(ops.decompositions()), (), dynamo=True, verbose=False)
    else:
        onnx = torch.onnx.export(model, given, dynamic_shapes=sizes, dynamo=True, verbose=False)
    onnx.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (name,) = [argument.name for argument in session.get_inputs()]
    for B, T in ((1, 2), (4, 20), (2, 11)):
        batch = torch.randint(61, (B, T))
        got = torch.from_numpy(session.run(None, {name: batch.numpy()})[0])
        with torch.no_grad():
            torch.testing.assert_close(got, model(batch), rtol=1e-5, atol=1e-5)
