"""Implementations of a training step: ours, plain PyTorch, transformers' GPT-2 as it is and accelerated, the reference.

A step is forward, backward and fused AdamW on float32 weights, under autocast if the case is bfloat16.
"""

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

import gpt_fast
from benchmarks.measure.memory import available_memory
from benchmarks.models.counts import STATE_BYTES, parameters
from benchmarks.models.job import Job, no_transformers, referenced
from benchmarks.topic import OURS, Case, Peer
from gpt_fast.training.engine.optimizer import make_optimizer

Loss = Callable[..., Tensor]
Build = Callable[[Case], tuple[nn.Module, Loss]]
ACTIVATIONS = 1.25  # of the state's bytes: the least that a step needs


def state_bytes(case: Case) -> int:
    """Return the bytes of weights, gradients and AdamW's moments."""
    return STATE_BYTES * parameters(case.config)


def pair_bytes(case: Case) -> int:
    """Return the bytes that two models in training need at the same time."""
    return int(2 * ACTIVATIONS * state_bytes(case))


def training_peers(ours: Build, plain: Build, hf: Callable[[str, Case], tuple[nn.Module, Loss]]) -> tuple[Peer, ...]:
    """Return the implementations of a step, given how to build the model and the loss of each."""
    hf_eager, _ = _trains("Hugging Face eager", partial(hf, "eager"), no_transformers)
    hf_sdpa, hf_compiled = _trains("Hugging Face sdpa", partial(hf, "sdpa"), no_transformers)
    accelerated, _ = _trains("Hugging Face accelerated", _accelerated(partial(hf, "sdpa")), no_transformers)
    eager, compiled = _trains(OURS, ours)
    peers = (
        eager,
        dataclasses.replace(compiled, missing=_cuda_only),
        _as_one_graph(ours),
        *_trains("plain", plain),
        hf_eager,
        hf_sdpa,
        dataclasses.replace(accelerated, rival=False),
        dataclasses.replace(hf_compiled, name="Hugging Face compiled"),
        _reference(ours),
    )
    return tuple(dataclasses.replace(peer, missing=_where_it_fits(peer.missing)) for peer in peers)


def written_peers(build: Build) -> tuple[Peer, ...]:
    """Return the implementations of a step of a hand-written model: accelerated (ours), as it is, and compiled."""
    as_written, compiled = _trains("as written", build)
    accelerated, _ = _trains(OURS, _accelerated(build, strict=False))
    peers = (accelerated, as_written, compiled)
    return tuple(dataclasses.replace(peer, missing=_where_it_fits(peer.missing)) for peer in peers)


def _job(case: Case, model: nn.Module, loss: Loss) -> Job:
    optimizer = make_optimizer(model, lr=1e-4)
    half = case.dtype != torch.float32

    def step(*inputs: Tensor) -> Tensor:
        with torch.autocast(case.device, case.dtype) if half else nullcontext():
            value = loss(*inputs)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        return value.detach()

    return Job(model, step, optimizer)


def _trains(name: str, build: Build, missing: Callable[[Case], str | None] = lambda case: None) -> tuple[Peer, Peer]:
    """Return two implementations: the model trained as it is, and with its loss compiled."""

    def eager(case: Case) -> Job:
        return _job(case, *build(case))

    def compiled(case: Case) -> Job:
        model, loss = build(case)
        return _job(case, model, torch.compile(loss, dynamic=False))

    return Peer(name, eager, missing), Peer(f"{name} compiled", compiled, missing, compiles=True)


def _as_one_graph(build: Build) -> Peer:
    """Return the implementation that captures a step, the optimizer included, and replays it as one CUDA graph."""

    def run(case: Case) -> Job:
        job = _job(case, *build(case))
        assert job.optimizer is not None
        for group in job.optimizer.param_groups:
            group["capturable"] = True
        job.run = captured_step(job.run)
        return job

    return Peer(f"{OURS} as one graph", run, _cuda_only)


def captured_step(step: Callable[..., object]) -> Callable[..., object]:
    """Return `step` as a graph that its first call captures. The loss of a call is overwritten by the next one."""
    graph = torch.cuda.CUDAGraph()
    held: list[Tensor] = []  # the inputs that the graph reads
    losses: list[object] = []

    def run(*inputs: Tensor) -> object:
        if not held:
            held.extend(value.clone() for value in inputs)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):  # kernels are compiled and memory is allocated outside the capture
                    step(*held)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph, stream=side):
                losses.append(step(*held))
        for place, value in zip(held, inputs, strict=True):
            place.copy_(value)
        graph.replay()
        return losses[0]

    return run


def _reference(build: Build) -> Peer:
    def run(case: Case) -> Job:
        job = _job(case, *build(case))
        job.run = referenced(job.run)
        return job

    return Peer("reference", run, rival=False)


def _accelerated(build: Build, strict: bool = True) -> Build:
    """Return the same model after `gpt_fast.accelerate`."""

    def run(case: Case) -> tuple[nn.Module, Loss]:
        model, loss = build(case)
        gpt_fast.accelerate(model, strict=strict)
        return model, loss

    return run


def _cuda_only(case: Case) -> str | None:
    return None if case.device == "cuda" else "measured on GPUs only"


def _where_it_fits(missing: Callable[[Case], str | None]) -> Callable[[Case], str | None]:
    """Add a reason: the state leaves no room for a quarter of its bytes in activations."""

    def either(case: Case) -> str | None:
        need = state_bytes(case)
        if ACTIVATIONS * need > available_memory(case.device):
            return f"needs more than {need / 2**30:.1f} GiB"
        return missing(case)

    return either
