"""gpt_fast.accelerate on `nn.TransformerEncoderLayer` and on the notes' module."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gpt_fast
from gpt_fast import reference
from tests import numerics

pytestmark = pytest.mark.filterwarnings("error:gpt_fast")

C, H, FF, T, B = 32, 4, 48, 9, 3


def shaken(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module.train()


def layer(**options) -> nn.TransformerEncoderLayer:
    return shaken(nn.TransformerEncoderLayer(C, H, FF, **{"dropout": 0.0, "batch_first": True} | options))


def run(module: nn.Module, x: torch.Tensor, *masks, real=None, **named) -> dict[str, torch.Tensor]:
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    out = module(x, *masks, **named)
    real = torch.ones(out.shape[:2], dtype=torch.bool) if real is None else real
    upstream = torch.randn(out[real].shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    (out[real] * upstream).sum().backward()
    return {"out": out[real].detach(), "x": x.grad} | {n: p.grad.clone() for n, p in module.named_parameters()}


def assert_same(module: nn.Module, accelerated: nn.Module, *masks, real=None, **named) -> None:
    x = torch.randn(B, T, C)
    wide = [mask.double() if mask is not None and mask.is_floating_point() else mask for mask in masks]
    exact = run(copy.deepcopy(module).double(), x.double(), *wide, real=real, **named)
    yardstick, got = (run(each, x, *masks, real=real, **named) for each in (module, accelerated))
    floor = 1e-2 * max(value.abs().max() for value in exact.values())  # some gradients are 0 apart from rounding
    scales = {name: value.abs().max().clamp(min=floor) for name, value in exact.items()}

    def pooled(values: dict) -> torch.Tensor:
        return torch.cat([(values[name].double() / scale).flatten() for name, scale in scales.items()])

    numerics.assert_as_accurate(pooled(got), pooled(yardstick), pooled(exact))


CAUSAL = nn.Transformer.generate_square_subsequent_mask(T)
LAYERS = [
    pytest.param({}, id="post_norm"),
    pytest.param({"norm_first": True}, id="pre_norm"),
    pytest.param({"activation": "gelu", "bias": False}, id="gelu_no_bias"),
    pytest.param({"activation": nn.GELU(approximate="tanh"), "layer_norm_eps": 1e-3}, id="gelu_tanh_module"),
]


@pytest.mark.parametrize("options", LAYERS)
def test_encoder_layer(options: dict) -> None:
    module = layer(**options)
    accelerated = copy.deepcopy(module)
    report = gpt_fast.accelerate(accelerated, strict=True)
    assert {entry.op for entry in report.replaced} == {"attention", "linear", "mlp", "add_layer_norm"} | (
        {"layer_norm"} if "norm_first" in options else set()
    )
    assert_same(module, accelerated, CAUSAL, is_causal=True)
    assert_same(module, accelerated, CAUSAL)
    assert_same(module, accelerated)
    assert_same(module, accelerated, CAUSAL == -torch.inf)
    mask = torch.rand(B * H, T, T) < 0.4
    mask &= ~torch.eye(T, dtype=torch.bool)
    assert_same(module, accelerated, mask)
    for left in (False, True):
        padding = torch.zeros(B, T, dtype=torch.bool)
        padding[1, -3:], padding[2, -5:] = True, True
        padding = padding.flip(1) if left else padding
        assert_same(module, accelerated, CAUSAL == -torch.inf, padding, real=~padding)
        assert_same(module, accelerated, None, padding, real=~padding)


def test_encoder_of_layers_in_a_module_of_ones_own() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoder(layer(), 3, norm=nn.LayerNorm(C), enable_nested_tensor=False)

        def forward(self, x, mask):
            return self.encoder(x, mask)

    module = shaken(Mine())
    accelerated = copy.deepcopy(module)
    assert len(gpt_fast.accelerate(accelerated).replaced) == 15
    assert_same(module, accelerated, CAUSAL)
    module.eval(), accelerated.eval()
    x = torch.randn(B, T, C)
    with torch.no_grad():
        torch.testing.assert_close(accelerated(x, CAUSAL), module(x, CAUSAL))
    gpt_fast.restore(accelerated)
    assert torch.equal(accelerated(x, CAUSAL), module(x, CAUSAL))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"batch_first": False}, "no batch_first=True: given .* it attends over the batch"),
        ({"activation": F.silu}, "its activation is no ReLU or GELU"),
    ],
)
def test_what_is_left_alone(options: dict, reason: str) -> None:
    module = layer(**options)
    original = copy.deepcopy(module)
    with pytest.raises(ValueError, match=reason):
        gpt_fast.accelerate(module, strict=True)
    assert len(gpt_fast.accelerate(module).left) == 1
    assert_same(original, module)


def test_calls_that_go_back_to_pytorch() -> None:
    module = layer()
    original = copy.deepcopy(module)
    gpt_fast.accelerate(module)
    bias, soft_padding = torch.randn(T, T), torch.randn(B, T)
    x = torch.randn(B, T, C)
    for call in (lambda m: m(x, bias), lambda m: m(x[0]), lambda m: m(x, None, soft_padding)):
        with pytest.warns(UserWarning, match="TransformerEncoderLayer runs PyTorch's own forward for this call"):
            assert torch.equal(call(module), call(original))
    seen = []
    module.self_attn.register_forward_hook(lambda *args: seen.append(1))
    with pytest.warns(UserWarning, match="its attention has hooks"):
        module(x)
    assert seen


def test_dropout_is_applied_everywhere() -> None:
    x = torch.randn(B, T, C)
    for name in ("self_attn", "dropout", "dropout1", "dropout2"):
        module = layer()
        gpt_fast.accelerate(module)
        target = getattr(module, name)
        setattr(target, "dropout" if name == "self_attn" else "p", 0.5)
        a, b = module(x, CAUSAL, is_causal=True), module(x, CAUSAL, is_causal=True)
        assert not torch.equal(a, b), name
        torch.manual_seed(4), module.double()
        seed = gpt_fast.ops.new_seed("cpu")
        torch.manual_seed(4)
        got = module(x.double(), CAUSAL.double(), is_causal=True)
        torch.testing.assert_close(got, by_hand(module, x.double(), seed), rtol=1e-10, atol=1e-12)


def by_hand(m, x, seed):
    """Return the layer's output by the reference's ops, with dropout at sites 0 to 3."""
    attn = m.self_attn
    qkv = F.linear(x, attn.in_proj_weight, attn.in_proj_bias)
    out = reference.attention_qkv(qkv, H, dropout_p=attn.dropout, seed=seed, site=0)
    x, _ = reference.add_layer_norm(attn.out_proj(out), x, m.norm1.weight, m.norm1.bias, 1e-5, m.dropout1.p, seed, 1)
    out = reference.mlp(
        x, m.linear1.weight, m.linear1.bias, m.linear2.weight, m.linear2.bias, "relu", m.dropout.p, seed, 2
    )
    return reference.add_layer_norm(out, x, m.norm2.weight, m.norm2.bias, 1e-5, m.dropout2.p, seed, 3)[0]


# ---- the notes' module -----------------------------------------------------------------------------------------------


def notes_gpt(**options):
    sizes = {"num_tokens": 61, "hidden_dim": C, "num_heads": H, "num_layers": 2, "seq_len": T, "dropout": 0.0}
    return shaken(reference.GPT(**sizes | options))


def test_notes_module() -> None:
    module = notes_gpt()
    accelerated = copy.deepcopy(module)
    report = gpt_fast.accelerate(accelerated, strict=True)
    assert len(report.replaced) == 10
    tokens = torch.randint(61, (B, T))
    for each in (module, accelerated):
        F.nll_loss(each(tokens).log().flatten(0, 1), tokens.flatten()).backward()
    torch.testing.assert_close(accelerated(tokens), module(tokens))
    for (name, got), wanted in zip(accelerated.named_parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-4, atol=1e-6, msg=name)
    block, original = accelerated.decoders[0], module.decoders[0]
    for mask in (torch.ones(T, T, dtype=torch.bool).triu(1), torch.rand(T, T) < 0.3, CAUSAL):
        mask.fill_diagonal_(0)
        assert_same(original, block, mask)
    gpt_fast.restore(accelerated)
    assert torch.equal(accelerated(tokens), module(tokens))


def test_notes_module_as_it_was_written_attends_over_the_batch() -> None:
    module = notes_gpt()
    for decoder in module.decoders:
        decoder.multihead_attn.batch_first = False
    original = copy.deepcopy(module)
    report = gpt_fast.accelerate(module)
    assert [entry.name for entry in report.left] == ["decoders.0", "decoders.1"]
    assert all("attends over the batch" in entry.reason for entry in report.left) and not report.replaced
    tokens = torch.randint(61, (T, T))  # attention over the batch runs, as there are as many rows as tokens
    assert torch.equal(module(tokens), original(tokens))


@pytest.mark.parametrize("fault", ["scaled", "pre_norm", "fails"])
def test_a_block_with_the_notes_parts_and_another_function_is_left_alone(fault: str) -> None:
    class Other(reference.TransformerDecoder):
        def forward(self, x, mask):
            if fault == "scaled":
                return super().forward(x, mask) * 1.1
            if fault == "fails":
                raise ValueError("only on Tuesdays")
            x = x + self.multihead_attn(self.layer_norm1(x), x, x, attn_mask=mask)[0]
            return x + self.ff(self.layer_norm2(x))

    block = shaken(Other(C, H, FF, 0.1))
    modes = [module.training for module in block.modules()]
    report = gpt_fast.accelerate(block)
    assert [entry.reason for entry in report.left] == [
        "its forward(x, mask) fails: only on Tuesdays" if fault == "fails"
        else "its forward(x, mask) computes something else than the notes' block"
    ]  # fmt: skip
    assert [module.training for module in block.modules()] == modes and "forward" not in vars(block)


def test_both_kinds_beside_each_other_and_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpt_fast import _plain

    module = nn.ModuleList([layer(), shaken(reference.TransformerDecoder(C, H, FF, 0.0))])
    attach, count = _plain.attach, itertools.count()

    def failing(*args):
        if next(count) == 1:
            raise RuntimeError("half-way")
        attach(*args)

    monkeypatch.setattr(_plain, "attach", failing)
    with pytest.raises(RuntimeError, match="half-way"):
        gpt_fast.accelerate(module)
    assert not any(_plain.is_accelerated(child) or "forward" in vars(child) for child in module.modules())
    monkeypatch.undo()
    assert len(gpt_fast.accelerate(module).replaced) == 10
