"""Test the other inference engines in the suite: their check, missing packages, and which of them are targets."""

import importlib.util

import pytest
import torch

from benchmarks import catalogue
from benchmarks.engines import check, peers
from benchmarks.engines.cached_gpt import CachedGPT, greedy
from benchmarks.measure import runner
from benchmarks.measure.timing import Budget
from benchmarks.models.plain_gpt import PlainGPT
from benchmarks.topic import LEFT, OURS, Case
from gpt_fast import GPTConfig

SMALL = GPTConfig.preset("gpt2", num_tokens=61, hidden_dim=16, num_heads=2, num_layers=2, seq_len=32)
CASE = Case("generation", "cpu", (("model", "gpt2"), ("B", 2), ("prompt", 4), ("new", 5)), torch.float32)


@pytest.fixture(scope="module")
def model():
    return check.small_model()


def plain(model, precision="float32"):
    return check.yardstick(PlainGPT(model.config).copy_weights(model).eval(), precision)


def prompts():
    torch.manual_seed(1)
    return torch.randint(check.SMALL.num_tokens, (check.ROWS, check.PROMPT))


# ---- the check


@pytest.mark.parametrize("precision", peers.PRECISIONS)
def test_the_plain_model_passes_in_every_precision(model, precision):
    with torch.inference_mode():
        check.judge(model, precision, prompts(), plain(model, precision).generate)


def test_the_texts_depend_on_what_was_read(model):
    """The model's texts vary. A model that repeats its last token would pass the check whatever the cache holds."""
    with torch.inference_mode():
        text = plain(model).generate(prompts(), check.NEW)
    assert all(len(set(row.tolist())) > check.NEW // 4 for row in text[:, check.PROMPT :])


@pytest.mark.parametrize("precision", peers.PRECISIONS)
def test_an_engine_that_reads_another_prompt_fails(model, precision):
    """The check fails if one row of the batch continues another row's text, as if an engine mixed up its cache."""
    generator = plain(model, precision)

    def generate(tokens, new):
        wrong = tokens.clone()
        wrong[1] = tokens[0]
        return torch.cat([tokens, generator.generate(wrong, new)[:, tokens.shape[1] :]], dim=1)

    with torch.inference_mode(), pytest.raises(ValueError, match="logits of chosen tokens"):
        check.judge(model, precision, prompts(), generate)


@pytest.mark.parametrize(("claimed", "computed"), [("float32", "bfloat16"), ("bfloat16", "int4"), ("int8", "int4")])
def test_an_engine_of_a_lower_precision_than_it_claims_fails(model, claimed, computed):
    with torch.inference_mode(), pytest.raises(ValueError, match="logits of chosen tokens"):
        check.judge(model, claimed, prompts(), plain(model, computed).generate)


def test_an_engine_that_forgets_the_place_fails(model):
    """The check fails if all new tokens get the position of the prompt's last token."""
    wrong = plain(model)
    with torch.no_grad():
        wrong.pos_emb.weight[check.PROMPT :] = wrong.pos_emb.weight[check.PROMPT - 1]
    with torch.inference_mode(), pytest.raises(ValueError, match="logits of chosen tokens"):
        check.judge(model, "int8", prompts(), wrong.generate)


def test_a_text_of_another_length_fails(model):
    with pytest.raises(ValueError, match=r"check: tokens \[5, 20\]; expected the prompt and 30 more"):
        check.judge(model, "int8", prompts(), lambda tokens, new: tokens)


def test_the_model_with_its_cache_computes_the_plain_one(model):
    expected = plain(model)
    cached, tokens = CachedGPT(expected, masks=True), prompts()
    heads, size = check.SMALL.num_heads, check.SMALL.hidden_dim // check.SMALL.num_heads
    past = [torch.zeros(check.ROWS, heads, 0, size)] * (2 * check.SMALL.num_layers)

    def logits(read):
        nonlocal past
        found, *past = cached(read, *past)
        return found

    with torch.inference_mode():
        assert greedy(logits, tokens, 9).equal(expected.generate(tokens, 9))


# ---- as peers


@pytest.mark.parametrize(("engine", "precision"), peers._KINDS)
def test_an_engine_computes_ours_and_does_its_job(engine, precision, monkeypatch):
    reason = peers.missing(CASE, engine, precision)
    if reason:
        pytest.skip(reason)
    config = check.SMALL if precision == "int4" else SMALL  # int4 needs groups of 128
    monkeypatch.setattr(Case, "config", config)
    job = peers.build(CASE, engine, precision)  # runs the engine's check first
    tokens = torch.randint(61, (2, 4))
    out = job(tokens)
    assert out.shape == (2, 9)
    assert out[:, :4].equal(tokens)
    assert job.state_bytes() is None


def test_an_engine_that_fails_its_check_is_reported_and_not_timed(monkeypatch):
    def fail(engine, precision):
        raise ValueError("check: logits of chosen tokens are at most 9 below the best; expected 1 or less")

    monkeypatch.setattr(peers, "checked", fail)
    peer = next(peer for peer in peers.ENGINE_PEERS if peer.name == "ONNX Runtime float32")
    records, failed = runner.measure(catalogue.topics()["generation"], CASE, [peer], Budget(0.0, 1))
    assert records == []
    assert [reason for _, reason in failed] == [
        "check: logits of chosen tokens are at most 9 below the best; expected 1 or less"
    ]


def test_engines_that_are_not_installed_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for job in ("generation", "prefill"):
        reasons = {peer.name: peer.missing(CASE) for peer in catalogue.topics()[job].peers}
        assert reasons["OpenVINO int8"] == "openvino, nncf are not installed"
        assert reasons["CTranslate2 float32"] == "ctranslate2, transformers, tokenizers are not installed"
        assert reasons["ONNX Runtime float32"] == "onnxruntime, onnx, onnxscript are not installed"
        assert reasons["llama.cpp"] == "llama-cpp-python is not installed"


def test_ours_is_held_against_engines_of_the_same_or_a_higher_precision():
    found = {(target.who, target.busy): target for target in peers.rivals({"bfloat16": 1.3})}
    ours = f"{OURS} bfloat16 weights"
    assert found[ours, False].times == 1.3
    assert found[ours, False].products == "bf16_products"
    assert set(found[ours, False].peer) == {
        "OpenVINO float32", "OpenVINO bfloat16", "CTranslate2 float32", "CTranslate2 bfloat16", "ONNX Runtime float32",
    }  # fmt: skip
    assert found[ours, True].peer == f"{ours}, {LEFT}"  # of the two targets of busy runs, `found` keeps the last
    assert found[ours, True].times == 0.8
