"""PEFT adapters on accelerated models: called through, trained, merged and taken off again."""

import copy

import pytest
import torch

import gpt_fast
from tests.hf_models import LM_HEADS, inputs, make

peft = pytest.importorskip("peft", reason="the extra examples is not installed")

ALL = ["c_attn", "c_proj", "c_fc"]


def with_lora(model, targets: list[str] = ALL):
    config = peft.LoraConfig(target_modules=targets, r=2, lora_dropout=0.0, fan_in_fan_out=True, task_type="CAUSAL_LM")
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)  # lora_B starts at 0, which would hide code that bypasses the adapter
    return adapted


@pytest.mark.parametrize("order", ["accelerated first", "adapted first"])
@pytest.mark.parametrize("targets", [["c_attn"], ["c_fc"], ALL], ids=" ".join)
@pytest.mark.parametrize("name", LM_HEADS)
def test_adapters_are_called_and_trained(name: str, targets: list[str], order: str) -> None:
    model = make(name)
    original = with_lora(copy.deepcopy(model), targets)
    if order == "accelerated first":
        gpt_fast.accelerate(model)
        adapted = with_lora(model, targets)
    else:
        adapted = with_lora(model, targets)
        report = gpt_fast.accelerate(adapted)
        left = {entry.name.rsplit(".", 1)[-1] for entry in report.left}
        assert left == set(targets) - {"c_fc"} | ({"mlp"} if "c_fc" in targets else set())
        assert all("called through it" in entry.reason for entry in report.left)
    given = inputs(name, "right")
    wanted, got = original(**given), adapted(**given)
    torch.testing.assert_close(got.loss, wanted.loss)
    torch.testing.assert_close(got.logits, wanted.logits)
    got.loss.backward(), wanted.loss.backward()
    for (label, a), b in zip(adapted.named_parameters(), original.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) == ("lora" not in label), label
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=label)
    mask = given["attention_mask"].bool()
    with original.disable_adapter(), adapted.disable_adapter():
        torch.testing.assert_close(adapted(**given, logits=True).logits[mask], original(**given).logits[mask])
    merged, wanted_merged = adapted.merge_and_unload().eval(), original.merge_and_unload().eval()
    torch.testing.assert_close(merged(**given).logits[mask], wanted_merged(**given).logits[mask])
    gpt_fast.restore(merged)
    assert torch.equal(merged(**given).logits, wanted_merged(**given).logits)


def test_saved_adapters_load_into_a_model_without_them(tmp_path) -> None:
    model = make("GPT2LMHeadModel").eval()
    plain = copy.deepcopy(model)
    gpt_fast.accelerate(model)
    adapted = with_lora(model).eval()
    tokens = inputs("GPT2LMHeadModel")["input_ids"]
    wanted = adapted(tokens).logits
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    torch.testing.assert_close(loaded(tokens).logits, wanted)


def test_a_wrapped_output_layer_keeps_its_logits() -> None:
    """With lm_head wrapped by modules_to_save, the loss is transformers' own and the report lists lm_head."""
    config = peft.LoraConfig(
        target_modules=["c_attn"], modules_to_save=["lm_head"], r=2, fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    model = make("GPT2LMHeadModel", tie_word_embeddings=False)
    original = peft.get_peft_model(copy.deepcopy(model), config)
    adapted = peft.get_peft_model(model, config)
    adapted.load_state_dict(original.state_dict())
    report = gpt_fast.accelerate(adapted)
    assert sorted({entry.name.rsplit(".", 1)[-1] for entry in report.left}) == ["c_attn", "lm_head"]
    given = inputs("GPT2LMHeadModel")
    wanted, got = original(**given), adapted(**given)
    torch.testing.assert_close(got.loss, wanted.loss)
    got.loss.backward(), wanted.loss.backward()
    for (label, a), b in zip(adapted.named_parameters(), original.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=label)
