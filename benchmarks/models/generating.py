"""Implementations of prompts and new tokens: ours, a plain PyTorch model, transformers' GPT-2, the reference.

Weights are in the case's dtype, and tokens are chosen greedily.
"""

import dataclasses
from functools import partial
from typing import Any

import torch
from torch import Tensor

import gpt_fast
from benchmarks.models import counts
from benchmarks.models.job import Job, hf_model, no_transformers, referenced
from benchmarks.models.plain_gpt import PlainGPT
from benchmarks.topic import OURS, Case, Peer, Work
from gpt_fast.generation.steps import WEIGHTS

ELEMENT = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int8-a16": 1.0, "int4": 0.5}  # bytes of a weight


def _new_tokens(case: Case) -> int:
    """Return how many tokens the case generates: its size "new", or 1 if it has none, as in prefill."""
    return case.size.get("new", 1)


def work_with(case: Case, weights: str) -> Work:
    """Return the least bytes and FLOPs of a prefill or generation case as a `Work`, with weights in a given precision.

    `weights` is that precision, a key of ELEMENT such as "int8". "int8-a16" has int8 weights too, but rounds the inputs
    of products to 16 bits, not 8. A case with the size "new" counts its decode steps, any other the reading of its
    prompt. Keys and values in the cache have 4 bytes with "float32", else 2.

    The case's speed limit follows from the fastest measured rate of matrix products. Besides float32, the rate of the
    result's `product` counts: "bfloat16", or "" (none) with "float32" weights. No rate of int8 products is measured.
    """
    size, element = case.size, ELEMENT[weights]
    if "new" in size:
        cache = 4 if weights == "float32" else 2
        found = counts.decoding(case.config, size["B"], size["prompt"], size["new"], element, cache)
    else:
        found = counts.prompt(case.config, size["B"], size["T"], element)
    return dataclasses.replace(found, product="" if weights == "float32" else "bfloat16")


def _eval(case: Case, model: Any) -> Any:
    """Return the model, moved to the case's device and dtype in place, and set to eval mode."""
    return model.to(device=case.device, dtype=case.dtype).eval()


def _ours(case: Case, weights: str | None = None) -> Job:
    """Return a `Job` that generates greedily with gpt_fast: it takes a prompt [B, T], and returns it with new tokens.

    The number of new tokens is the case's size "new", by default 1. The model has random weights in the case's dtype.
    `weights` names the precision in which the decode session packs the weights, one of WEIGHTS, such as "int8". With
    None they stay in the model's dtype.

    The session is made here and reused by all calls, because the other engines also convert their weights once.
    """
    model = _eval(case, gpt_fast.GPTForCausalLM(case.config))
    new = _new_tokens(case)
    work = None if weights is None else work_with(case, weights)
    length = (case.size["prompt"] if "prompt" in case.size else case.size["T"]) + new
    # The engines hold their weights from one call to the next, so ours does: `generate` alone compares them each time.
    session = gpt_fast.DecodeSession(model, batch=case.size["B"], length=length, weights=weights)

    def run(tokens: Tensor) -> Tensor:
        session.reset()
        return gpt_fast.generate(model, tokens, max_new_tokens=new, temperature=0, session=session)

    return Job(model, run, work=work, session=session)


def _packed_missing(case: Case) -> str | None:
    """Return the reason why packed weights cannot be measured on the case, or None if they can.

    They need a CPU, the C++ extension and a float32 case.
    """
    if case.device != "cpu" or gpt_fast.build_info() is None:
        return "weights are packed on the CPU only, by the C++ extension"
    if case.dtype != torch.float32:
        return "packed from a float32 model: beside the float32 case"
    return None


def _reference(case: Case) -> Job:
    """Return a `Job` that generates greedily with gpt_fast, while every op runs its reference in plain PyTorch.

    It takes a prompt [B, T], and returns it with the new tokens, as many as the case's size "new" (by default 1).
    """
    job = _ours(case)
    job.run = referenced(job.run)
    return job


def _plain(case: Case) -> Job:
    """Return a `Job` that generates greedily with a plain PyTorch model, which has no cache.

    It takes a prompt [B, T], and returns it with the new tokens, as many as the case's size "new" (by default 1). The
    model has random weights in the case's dtype.
    """
    model = _eval(case, PlainGPT(case.config))
    new = _new_tokens(case)
    return Job(model, torch.inference_mode()(lambda tokens: model.generate(tokens, new)))


def _plain_missing(case: Case) -> str | None:
    """Return the reason why generating without a cache is not measured on the case, or None if it is.

    On a CPU it is measured only if the case generates at most 32 tokens, added up over its rows. On a GPU it always is.
    """
    if case.device == "cpu" and case.size["B"] * _new_tokens(case) > 32:
        return "computes the whole context again for each token: left to the shortest case on a CPU"
    return None


def _hf(case: Case, attention: str, static: bool = False) -> Job:
    """Return a `Job` that generates greedily with transformers' GPT-2.

    It takes a prompt [B, T], and returns it with the new tokens, as many as the case's size "new" (by default 1).
    `attention` is transformers' attention implementation, "eager" or "sdpa". With `static` transformers uses its static
    cache, and on a GPU compiles the forward pass by itself.
    """
    model = _eval(case, hf_model("GPT2LMHeadModel", case, attention))
    new = _new_tokens(case)
    options: dict[str, Any] = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new}
    if static:  # transformers then compiles its forward pass by itself
        options["cache_implementation"] = "static"
    return Job(
        model, lambda tokens: model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    )  # fmt: skip


def _static_missing(case: Case) -> str | None:
    """Return the reason why transformers' static cache is not measured on the case, or None if it is.

    The reason is that transformers is not installed, or that the case is on a CPU, where transformers does not compile.
    """
    return no_transformers(case) or (
        None if case.device == "cuda" else "transformers compiles its static cache on GPUs only"
    )


PEERS = (
    Peer(OURS, _ours),
    Peer("plain", _plain, _plain_missing),
    Peer("Hugging Face eager", partial(_hf, attention="eager"), no_transformers),
    Peer("Hugging Face sdpa", partial(_hf, attention="sdpa"), no_transformers),
    Peer("Hugging Face compiled", partial(_hf, attention="sdpa", static=True), _static_missing, compiles=True),
    Peer("reference", _reference, rival=False),
)
PACKED_PEERS = tuple(
    Peer(f"{OURS} {weights} weights", partial(_ours, weights=weights), _packed_missing)
    for weights in WEIGHTS
    if weights != "float32"
)
