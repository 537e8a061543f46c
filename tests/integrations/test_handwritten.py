"""accelerate() on hand-written GPT-2s: recognition of parts, results, and models that it leaves as written."""

import collections
import copy
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import gpt_fast
from gpt_fast import ops
from gpt_fast.integrations.handwritten import forwards
from gpt_fast.integrations.handwritten.deferred import Deferred
from tests import handwritten, two_ranks
from tests.handwritten import CHANGES, MODELS, V, look_alike, loss_of, make

NAMES = list(MODELS)


def tokens(B: int = 3, T: int = 17, seed: int = 0) -> Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def twins(name: str, dropout: float = 0.0) -> tuple[nn.Module, nn.Module]:
    """Return a model and an accelerated twin, which is no deepcopy because that would share the lambda of `masked`."""
    plain, fast = make(name, dropout), make(name, dropout)
    fast.load_state_dict(plain.state_dict())
    report = gpt_fast.accelerate(fast, strict=name != "own")
    assert report.replaced
    return plain, fast


class Operators(TorchDispatchMode):
    """Dispatch mode that counts the calls of each operator, PyTorch's and this library's."""

    def __init__(self) -> None:
        super().__init__()
        self.count: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[str(func).removesuffix(".default")] += 1
        return func(*args, **(kwargs or {}))


# ---- recognition -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(gpt_fast.build_info() is None, reason="the reference serves: no operator is called")
@pytest.mark.parametrize("name", ["packed", "masked", "separate", "single"])
def test_a_training_pass_is_fused_as_a_whole(name):
    """Attention, MLPs, norms, additions and the loss run as this library's operators instead of PyTorch's."""
    _, fast = twins(name, dropout=0.1)
    with Operators() as seen:
        loss_of(fast, tokens(), tokens(seed=1)).backward()
    ours = {
        op.removeprefix("gpt_fast."): n for op, n in seen.count.items() if op.startswith("gpt_fast") and "forward" in op
    }
    L = handwritten.LAYERS
    projections = 4 if name == "separate" else 2
    assert ours == {
        "layer_norm_forward": L + 1, "add_layer_norm_forward": 2 * L,
        "attention_forward": L, "linear_forward": projections * L, "mlp_forward": L, "linear_cross_entropy_forward": 1,
    }  # fmt: skip
    theirs = ("native_layer_norm", "softmax", "scaled_dot_product", "gelu", "mm.")
    assert not [op for op in seen.count if op.startswith("aten.") and any(part in f"{op}." for part in theirs)]


def test_the_report_names_the_parts():
    report = gpt_fast.accelerate(make("packed"), strict=True)
    assert not report.left
    found = {(entry.name, entry.op) for entry in report.replaced}
    assert {
        ("transformer.h.0.ln_1", "layer_norm"), ("transformer.h.2.ln_2", "add_layer_norm"),
        ("transformer.h.1.attn", "attention"), ("transformer.h.1.attn.c_attn", "linear"),
        ("transformer.h.1.mlp", "mlp"), ("transformer.ln_f", "layer_norm"),
        ("lm_head", "linear_cross_entropy"),
    } <= found  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_look_alikes_are_left_alone(change):
    """A block with the same parts and one difference keeps its code, and the report gives a reason."""
    model = look_alike(change)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    report = gpt_fast.accelerate(model)
    assert not report.replaced
    assert [entry.kind for entry in report.left] == ["Changeable"]
    assert len(report.left[0].reason.split()) > 3
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all("forward" not in vars(module) for module in model.modules())


def test_the_block_without_a_change_is_recognised():
    """The block from which each look-alike differs is recognised, so its one change is why a look-alike is not."""
    report = gpt_fast.accelerate(look_alike("none"), strict=True)
    assert {entry.op for entry in report.replaced} >= {"attention", "mlp", "add_layer_norm", "linear_cross_entropy"}


@pytest.mark.parametrize("wrong", ["outputs", "gradients"])
def test_a_model_that_disagrees_as_a_whole_is_left_alone(wrong, monkeypatch: pytest.MonkeyPatch):
    """The faulty forward is that of the last norm, so only the comparison of the whole model finds it."""
    right = forwards.norm_forward

    def faulty(self, x):
        y = right(self, x)
        return y * 1.01 if wrong == "outputs" else y.detach() + 0.99 * (y - y.detach())

    monkeypatch.setattr(forwards, "norm_forward", faulty)
    model = make("packed")
    report = gpt_fast.accelerate(model)
    assert not report.replaced
    assert [entry.reason for entry in report.left] == ["as a whole computes something else with these blocks"]
    assert all("forward" not in vars(module) for module in model.modules())


# ---- attention, MLPs and norms alone ---------------------------------------------------------------------------------


def partly(kind: str, dropout: float = 0.0) -> tuple[nn.Module, nn.Module]:
    plain = handwritten.PartlyFused(kind, dropout)
    fast = copy.deepcopy(plain)
    report = gpt_fast.accelerate(fast)
    expected = [*handwritten.PARTLY[kind], *["layer_norm"] * 4] * handwritten.LAYERS
    assert sorted(entry.op for entry in report.replaced) == sorted([*expected, "layer_norm", "linear_cross_entropy"])
    return plain, fast


def flat_loss(model: nn.Module, *args: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens(), *args).flatten(0, 1), tokens(seed=1).flatten())


@pytest.mark.parametrize("kind", handwritten.PARTLY)
def test_parts_of_other_blocks_are_fused(kind):
    """The loss and every gradient equal the plain model's. After `restore` the outputs do bit for bit."""
    plain, fast = partly(kind)
    mask = torch.zeros(17, 17, dtype=torch.bool)
    mask[:, 3] = True
    for args in ((), (mask,)):
        for model in (plain, fast):
            model.zero_grad()
        losses = [flat_loss(model, *args) for model in (plain, fast)]
        torch.testing.assert_close(losses[1], losses[0])
        for loss in losses:
            loss.backward()
        for (name, a), b in zip(fast.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)
    gpt_fast.restore(fast)
    assert torch.equal(fast(tokens()), plain(tokens()))
    assert all("forward" not in vars(module) for module in fast.modules())


@pytest.mark.skipif(gpt_fast.build_info() is None, reason="the reference serves: no operator is called")
@pytest.mark.parametrize("kind", handwritten.PARTLY)
def test_parts_run_as_ops(kind):
    _, fast = partly(kind, dropout=0.1)
    with Operators() as seen:
        flat_loss(fast).backward()
    L, ops_of = handwritten.LAYERS, handwritten.PARTLY[kind]
    assert seen.count["gpt_fast.attention_forward"] == L * ops_of.count("attention")
    assert seen.count["gpt_fast.mlp_forward"] == L * ops_of.count("mlp")
    norms = 4 if kind == "sandwich" else 2
    assert seen.count["gpt_fast.layer_norm_forward"] == L * norms + 1


@pytest.mark.parametrize("kind", ["parallel", "gated", "rotary"])
def test_parts_drop_at_the_same_rates(kind):
    """The mean loss over seeds is PyTorch's within four standard errors, and evaluation drops nothing."""
    plain, fast = partly(kind, dropout=0.3)
    with torch.no_grad():
        a, b = (torch.stack([flat_loss(model) for _ in range(80)]) for model in (plain, fast))
        assert (a.mean() - b.mean()).abs() < 4 * (a.var() / 80 + b.var() / 80).sqrt()
        assert 0.5 < a.std() / b.std() < 2
        torch.testing.assert_close(flat_loss(fast.eval()), flat_loss(plain.eval()))


def test_a_projection_of_the_width_of_a_table_is_no_output_layer():
    """With as many positions as channels, attention's output layer is not mistaken for the model's output layer."""
    plain = handwritten.PartlyFused("rotary")
    plain.positions = nn.Embedding(32, 32)
    fast = copy.deepcopy(plain)
    report = gpt_fast.accelerate(fast)
    assert [entry.name for entry in report.replaced if entry.op == "linear_cross_entropy"] == ["output"]
    torch.testing.assert_close(fast(tokens()), plain(tokens()))


def test_linear_layers_in_a_model_without_norms_are_nobodys():
    with pytest.raises(TypeError, match="expected one of"):
        gpt_fast.accelerate(nn.Sequential(nn.Linear(8, 2), nn.ReLU(), nn.Linear(2, 8)))


def test_a_probe_leaves_no_trace():
    """accelerate() leaves training flags, dropout rates, buffers, gradients and the random state unchanged."""
    model = make("masked", dropout=0.3)
    model.transformer["h"][1].eval()
    flags = [module.training for module in model.modules()]
    rates = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    buffers = [buffer.clone() for buffer in model.buffers()]
    state = torch.get_rng_state()
    gpt_fast.accelerate(model, strict=True)
    assert [module.training for module in model.modules()] == flags
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == rates
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


# ---- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradients(name):
    plain, fast = twins(name)
    batch, labels = tokens(), tokens(seed=1)
    a, b = loss_of(plain, batch, labels), loss_of(fast, batch, labels)
    torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
    a.backward()
    b.backward()
    for (label, p), (_, q) in zip(plain.named_parameters(), fast.named_parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-5, msg=lambda m, label=label: f"{label}: {m}")


@pytest.mark.parametrize("name", NAMES)
def test_twenty_steps_have_the_same_losses(name):
    plain, fast = twins(name)
    losses = []
    for model in (plain, fast):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses.append([])
        for step in range(20):
            optimizer.zero_grad()
            loss = loss_of(model, tokens(seed=step), tokens(seed=step + 100))
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_in_every_mode(name):
    """Logits agree in training and evaluation, with and without gradients, for one token and for all positions."""
    plain, fast = twins(name)
    for T in (1, 5, handwritten.P):
        for training in (True, False):
            for grad in (True, False):
                with torch.set_grad_enabled(grad):
                    got, expected = (model.train(training)(tokens(T=T)) for model in (fast, plain))
                    got, expected = (
                        one["logits"] if isinstance(one, dict) else one[0] if isinstance(one, tuple) else one
                        for one in (got, expected)
                    )
                torch.testing.assert_close(got + 0, expected + 0, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_dropout_has_the_same_rates_at_the_same_places(name):
    """Mean losses agree within five standard errors. A rate that is changed later takes effect at the next pass."""
    plain, fast = twins(name, dropout=0.2)
    batch, labels = tokens(2, 9), tokens(2, 9, seed=1)

    def losses(model: nn.Module) -> Tensor:
        torch.manual_seed(1)
        with torch.no_grad():
            return torch.stack([loss_of(model.train(), batch, labels) for _ in range(400)])

    a, b = losses(plain), losses(fast)
    assert (a.mean() - b.mean()).abs() < 5 * ((a.var() + b.var()) / 400).sqrt()
    assert 0.7 < a.std() / b.std() < 1.4
    for module in fast.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if "dropout" in vars(module):
            module.dropout = 0.0
    assert len(losses(fast).unique()) == 1


@pytest.mark.parametrize("name", ["packed", "separate", "own", "single"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(name, dtype):
    plain, fast = twins(name)
    with torch.autocast("cpu", dtype=dtype):
        a, b = (loss_of(model, tokens(), tokens(seed=1)) for model in (plain, fast))
    assert a.dtype == b.dtype == torch.float32
    torch.testing.assert_close(b, a, rtol=2e-2, atol=2e-2)


# ---- logits that nobody has read -------------------------------------------------------------------------------------


def test_logits_are_a_tensor_for_whoever_reads_them():
    plain, fast = twins("separate")
    expected, got = plain(tokens()), fast(tokens())
    assert isinstance(got, Deferred) and isinstance(got, Tensor)
    assert got.shape == expected.shape and got.dtype == expected.dtype and got.requires_grad
    torch.testing.assert_close(got.argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(got[:, -1, :], expected[:, -1, :], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(copy.copy(fast(tokens()).detach()), expected.detach(), rtol=1e-4, atol=1e-5)
    assert got.tolist() == got.detach().numpy().tolist()
    got.sum().backward()
    assert fast.out_head.weight.grad is not None


@pytest.mark.parametrize(
    "options",
    [
        {"ignore_index": 3}, {"reduction": "sum"}, {"reduction": "none"}, {"label_smoothing": 0.1},
        {"weight": torch.linspace(0.5, 2, V)},
    ],
    ids=str,
)  # fmt: skip
def test_every_option_of_the_loss(options):
    plain, fast = twins("separate")
    labels = tokens(seed=1)
    expected, got = (F.cross_entropy(m(tokens()).flatten(0, 1), labels.flatten(), **options) for m in (plain, fast))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    rows, other = (F.cross_entropy(m(tokens()).transpose(1, 2), labels, **options) for m in (plain, fast))
    torch.testing.assert_close(other, rows, rtol=1e-4, atol=1e-5)


def test_logits_read_after_an_update_are_refused():
    _, fast = twins("separate")
    logits = fast(tokens())
    F.cross_entropy(logits.flatten(0, 1), tokens(seed=1).flatten()).backward()
    torch.optim.SGD(fast.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match="gpt_fast.accelerate: logits has weights or hidden states that changed"):
        logits.sum()


def test_logits_are_saved_as_a_tensor(tmp_path: Path):
    _, fast = twins("separate")
    torch.save(fast(tokens()).detach(), tmp_path / "logits.pt")
    assert type(torch.load(tmp_path / "logits.pt")) is Tensor


# ---- PyTorch's tools -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_restore_is_bit_for_bit(name):
    plain, fast = twins(name)
    gpt_fast.restore(fast)
    assert torch.equal(loss_of(fast, tokens(), tokens(seed=1)), loss_of(plain, tokens(), tokens(seed=1)))
    assert vars(fast).keys() == vars(plain).keys()
    assert all(a.keys() == b.keys() for a, b in zip(map(vars, fast.modules()), map(vars, plain.modules()), strict=True))


@pytest.mark.parametrize("name", ["packed", "separate", "own", "single"])
def test_compile_deepcopy_and_state_dicts(name):
    plain, fast = twins(name)
    batch, labels = tokens(), tokens(seed=1)
    expected = loss_of(plain, batch, labels)
    torch._dynamo.reset()
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    got = loss_of(compiled, batch, labels)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    got.backward()
    expected.backward()
    for p, q in zip(plain.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-5)
    twin = copy.deepcopy(fast)
    assert fast.state_dict().keys() == plain.state_dict().keys()
    larger = {key: value * 1.1 if value.is_floating_point() else value for key, value in plain.state_dict().items()}
    for model in (plain, twin):
        model.load_state_dict(larger)
    torch.testing.assert_close(loss_of(twin, batch, labels), loss_of(plain, batch, labels), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing(reentrant, dropout):
    """Outputs and gradients equal those without checkpointing, dropout included."""
    _, fast = twins("packed", dropout)
    x = torch.randn(2, 7, handwritten.C, requires_grad=True)
    blocks = fast.transformer["h"]

    def run(call) -> list[Tensor]:
        torch.manual_seed(3)
        y = x
        for block in blocks:
            y = call(block, y)
        y = fast.transformer["ln_f"](y)
        x.grad = None
        fast.zero_grad(set_to_none=True)
        y.square().sum().backward()
        return [y.detach(), x.grad, *(parameter.grad for parameter in blocks.parameters())]

    plain = run(lambda block, y: block(y))
    repeated = run(lambda block, y: checkpoint(block, y, use_reentrant=reentrant))
    for a, b in zip(plain, repeated, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "where",
    [
        "transformer.h.1", "transformer.h.1.attn", "transformer.h.1.mlp.c_fc", "transformer.h.1.ln_2", "lm_head",
        "transformer.h.1.attn.resid_dropout", "transformer.wte", "transformer.drop", "transformer.ln_f",
    ],
)  # fmt: skip
def test_hooks_take_effect(where):
    plain, fast = twins("packed")
    for model in (plain, fast):
        model.get_submodule(where).register_forward_hook(lambda module, args, output: output * 1.5)
    a, b = (loss_of(model, tokens(), tokens(seed=1)) for model in (plain, fast))
    torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
    a.backward()
    b.backward()
    for p, q in zip(plain.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-5)


def test_adapters_take_effect():
    peft = pytest.importorskip("peft", reason="the extra examples is not installed")
    losses = []
    for model in twins("separate"):
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules=["W_query", "out_proj", "layers.0"], init_lora_weights=False)
        adapted = peft.get_peft_model(model, config).get_base_model()
        losses.append(loss_of(adapted, tokens(), tokens(seed=1)))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)


def test_accelerating_twice_changes_nothing():
    _, fast = twins("packed")
    report = gpt_fast.accelerate(fast)
    assert not report.replaced and "accelerated already" in str(report)


def test_within_use_reference():
    plain, fast = twins("packed")
    with gpt_fast.use_reference(), torch.no_grad():
        got = loss_of(fast, tokens(), tokens(seed=1))
    torch.testing.assert_close(got, loss_of(plain, tokens(), tokens(seed=1)).detach(), rtol=1e-5, atol=1e-6)
    assert ops.serving("mlp", "cpu") in ("cpp", "triton", "reference")


# ---- changes after accelerate ----------------------------------------------------------------------------------------


def heads(model: nn.Module) -> None:
    for block in model.transformer["h"]:
        block.attn.n_head = 2


CHANGED = {
    "heads": heads,
    "eps": lambda m: setattr(m.transformer["h"][0].ln_1, "eps", 0.5),
    "same_class_other_options": lambda m: setattr(m.transformer["h"][0], "ln_2", nn.LayerNorm(handwritten.C, eps=0.5)),
    "mask": lambda m: m.transformer["h"][1].attn.bias.fill_(1),
    "last_norm": lambda m: setattr(m.transformer["ln_f"], "eps", 0.5),
    "hook_on_a_module_that_is_not_called": lambda m: m.transformer["h"][0].attn.attn_dropout.register_forward_hook(
        lambda module, args, output: output * 2
    ),
    "another_block": lambda m: m.transformer["h"].__setitem__(1, nn.Identity()),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_changes_after_accelerate_take_effect(change):
    plain, fast = twins("masked")
    before = loss_of(fast, tokens(), tokens(seed=1)).detach()
    for model in (plain, fast):
        change(model)
    a, b = (loss_of(model, tokens(), tokens(seed=1)).detach() for model in (plain, fast))
    torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
    assert not torch.equal(a, before)


@pytest.mark.skipif(gpt_fast.build_info() is None, reason="the reference serves: no operator is called")
@pytest.mark.parametrize("change", ["rate", "hook", "forward"])
def test_a_head_that_is_not_as_the_others_runs_its_block_as_written(change):
    """A block with one module per head runs as written if one head has another rate, a hook or its own forward."""
    plain, fast = twins("single", dropout=0.1)
    head = fast.transformer["h"][1].talk.heads[2]
    seen = []
    if change == "rate":
        head.drop.p = 0.9
    elif change == "hook":
        head.register_forward_hook(lambda *_: seen.append(1))
    else:
        head.forward = lambda x: seen.append(1) or type(head).forward(head, x)
    with Operators() as operators:
        loss_of(fast, tokens(), tokens(seed=1))
    assert operators.count["gpt_fast.attention_forward"] == handwritten.LAYERS - 1
    assert seen == ([] if change == "rate" else [1])
    torch.testing.assert_close(loss_of(fast.eval(), tokens(), tokens()), loss_of(plain.eval(), tokens(), tokens()))


def test_a_loaded_state_keeps_blocks_fused():
    """`load_state_dict` writes the same mask again, which is no change."""
    _, fast = twins("masked")
    fast.load_state_dict(copy.deepcopy(fast.state_dict()))
    with Operators() as seen:
        loss_of(fast, tokens(), tokens(seed=1))
    if gpt_fast.build_info() is not None:
        assert seen.count["gpt_fast.attention_forward"] == handwritten.LAYERS


def test_views_of_logits_share_what_is_written_into_them():
    plain, fast = twins("separate")
    losses = []
    for model in (plain, fast):
        logits = model(tokens())
        rows = logits.flatten(0, 1)
        logits[..., 0] = 100.0
        losses.append(F.cross_entropy(rows, tokens(seed=1).flatten()))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)


def test_a_loss_after_an_update_is_refused():
    _, fast = twins("separate")
    rows = fast(tokens()).flatten(0, 1)
    F.cross_entropy(rows, tokens(seed=1).flatten()).backward()
    torch.optim.AdamW(fast.parameters(), lr=0.1, fused=True).step()
    with pytest.raises(RuntimeError, match="logits has weights or hidden states that changed after the pass"):
        F.cross_entropy(rows, tokens(seed=1).flatten())


class Twice(torch.autograd.Function):
    """Autograd function, which receives the tensor as C++ sees it."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, dy):
        return dy * 2


@pytest.mark.parametrize("shape", [False, True], ids=["logits", "rows"])
def test_gradients_through_autograd_functions(shape):
    gradients = []
    for model in twins("separate"):
        logits = model(tokens())
        logits = logits.flatten(0, 1) if shape else logits
        Twice.apply(logits).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_has_the_dtype_that_pytorch_gives_it(dtype):
    plain, fast = twins("separate")
    a, b = (loss_of(model.to(dtype), tokens(), tokens(seed=1)) for model in (plain, fast))
    assert a.dtype == b.dtype == dtype
    torch.testing.assert_close(b, a, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_accelerate_in_any_gradient_mode(mode):
    plain, fast = make("packed"), make("packed")
    fast.load_state_dict(plain.state_dict())
    with mode():
        gpt_fast.accelerate(fast, strict=True)
    loss_of(fast, tokens(), tokens(seed=1)).backward()
    torch.testing.assert_close(loss_of(fast, tokens(), tokens(seed=1)), loss_of(plain, tokens(), tokens(seed=1)))


def test_a_norm_that_trains_otherwise_is_left_alone():
    class Straight(nn.LayerNorm):
        def forward(self, x):
            y = super().forward(x)
            return y + (y * 0.5).detach() - y.detach() * 0.5 + (y - y.detach()) if self.training else y

    model = make("packed")
    model.transformer["ln_f"] = Straight(handwritten.C)
    report = gpt_fast.accelerate(model)
    assert [entry.name for entry in report.left] == ["transformer.ln_f"]


RANK = """
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tests.integrations.test_handwritten import loss_of, tokens, twins

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
for name in ("packed", "separate", "own"):
    torch.manual_seed(0)
    plain, fast = twins(name)
    (sum(loss_of(plain, tokens(seed=r), tokens(seed=r + 2)) for r in range(2)) / 2).backward()
    for options in ({}, {"find_unused_parameters": True}, {"static_graph": True}):
        fast.zero_grad(set_to_none=True)
        wrapped = DistributedDataParallel(fast, **options)
        loss_of(wrapped, tokens(seed=rank), tokens(seed=rank + 2)).backward()
        for p, q in zip(plain.parameters(), fast.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-5, msg=f"{name} {options}")
dist.destroy_process_group()
print("done")
"""


def test_ddp_over_gloo(tmp_path: Path) -> None:
    """Both ranks have the mean of their gradients under each option of DDP, some of which search the outputs."""
    two_ranks.run(RANK, tmp_path)
