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
    """Return the bytes of float32 weights, gradients and AdamW's two moments of the case's model: 16 a parameter."""
    return STATE_BYTES * parameters(case.config)


def pair_bytes(case: Case) -> int:
    """Return the least memory in bytes to train two copies of the case's model at the same time.

    It is 2.5 times the bytes of one model's weights, gradients and AdamW's moments, because activations need at least a
    quarter of these.
    """
    return int(2 * ACTIVATIONS * state_bytes(case))


def training_peers(ours: Build, plain: Build, hf: Callable[[str, Case], tuple[nn.Module, Loss]]) -> tuple[Peer, ...]:
    """Return the implementations (`Peer`) of a training step: gpt_fast, plain PyTorch, transformers and the reference.

    gpt_fast's model runs eagerly, compiled and as one CUDA graph, the plain model eagerly and compiled. transformers'
    model runs with its "eager" and "sdpa" attention, with "sdpa" also compiled and after `gpt_fast.accelerate`. The
    reference is gpt_fast's model with every op in plain PyTorch. An implementation counts as missing if training does
    not fit into memory. gpt_fast's compiled step and its CUDA graph are for GPUs only.

    `ours` and `plain` take a case and return (model, function of the case's inputs that computes the loss). `hf`
    returns the same and takes, before the case, the attention implementation.
    """
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
    """Return three implementations (`Peer`) of a hand-written model's training step.

    They are the model after `gpt_fast.accelerate`, named "gpt_fast", the model "as written", and "as written compiled",
    whose loss function is compiled. An implementation counts as missing if training does not fit into memory. `build`
    takes a case and returns (model, function of the case's inputs that computes the loss).
    """
    as_written, compiled = _trains("as written", build)
    accelerated, _ = _trains(OURS, _accelerated(build, strict=False))
    peers = (accelerated, as_written, compiled)
    return tuple(dataclasses.replace(peer, missing=_where_it_fits(peer.missing)) for peer in peers)


def _job(case: Case, model: nn.Module, loss: Loss) -> Job:
    """Return the `Job` of one training step: loss, backward and AdamW, under autocast unless the case is in float32.

    `loss` takes the case's inputs and returns the loss of `model`. Only the loss is computed under autocast. Each call
    of the job takes the inputs, updates the model's weights, and returns the loss before the update, detached.
    """
    optimizer = make_optimizer(model, lr=1e-4)
    half = case.dtype != torch.float32

    def step(*inputs: Tensor) -> Tensor:
        """Run one training step on the case's inputs. Return the loss before the update, detached.

        The model's gradients are replaced, and its weights updated. The optimizer, the loss function and the case come
        from the enclosing function.
        """
        with torch.autocast(case.device, case.dtype) if half else nullcontext():
            value = loss(*inputs)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        return value.detach()

    return Job(model, step, optimizer)


def _trains(name: str, build: Build, missing: Callable[[Case], str | None] = lambda case: None) -> tuple[Peer, Peer]:
    """Return two implementations (`Peer`) of a training step, named `name` and "`name` compiled".

    The second compiles the function of the loss by `torch.compile`, for fixed shapes. `build` takes a case and returns
    (model, function of the case's inputs that computes the loss). `missing` returns the reason why a case cannot run,
    or None.
    """

    def eager(case: Case) -> Job:
        return _job(case, *build(case))

    def compiled(case: Case) -> Job:
        model, loss = build(case)
        return _job(case, model, torch.compile(loss, dynamic=False))

    return Peer(name, eager, missing), Peer(f"{name} compiled", compiled, missing, compiles=True)


def _as_one_graph(build: Build) -> Peer:
    """Return the implementation (`Peer`) that replays gpt_fast's whole training step as one CUDA graph.

    The optimizer's update is in the graph too. `build` takes a case and returns (model, function of the case's inputs
    that computes the loss). On a CPU the implementation counts as missing.
    """

    def run(case: Case) -> Job:
        """Return the job of a case whose training step is captured as a CUDA graph in its first call, and replayed.

        The model and its loss come from `build` of the enclosing function. The job's optimizer is set to be capturable.
        """
        job = _job(case, *build(case))
        assert job.optimizer is not None
        for group in job.optimizer.param_groups:
            group["capturable"] = True
        job.run = captured_step(job.run)
        return job

    return Peer(f"{OURS} as one graph", run, _cuda_only)


def captured_step(step: Callable[..., object]) -> Callable[..., object]:
    """Return a function that captures `step` as a CUDA graph in its first call, and replays the graph in every call.

    The function takes the inputs of `step`, tensors that must keep their shapes: they are copied into tensors of its
    own, which the graph reads. It returns the result of the captured `step`, the same tensor each time, which the next
    call overwrites. Before the capture, the first call also runs `step` twice, which counts as two more training steps.
    """
    graph = torch.cuda.CUDAGraph()
    held: list[Tensor] = []  # the inputs that the graph reads
    losses: list[object] = []

    def run(*inputs: Tensor) -> object:
        """Copy `inputs` into the graph's tensors, replay the graph, and return the loss, which each call overwrites.

        The first call runs the training step of the enclosing function twice and captures it before that.
        """
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
    """Return the implementation (`Peer`) that trains gpt_fast's model with every op run by its reference in PyTorch.

    `build` takes a case and returns (model, function of the case's inputs that computes the loss). The implementation
    does not count when gpt_fast is compared with the fastest other.
    """

    def run(case: Case) -> Job:
        job = _job(case, *build(case))
        job.run = referenced(job.run)
        return job

    return Peer("reference", run, rival=False)


def _accelerated(build: Build, strict: bool = True) -> Build:
    """Return a function of a case that builds the model by `build` and applies `gpt_fast.accelerate` to it, in place.

    `build` takes a case and returns (model, function of the case's inputs that computes the loss). The returned
    function does the same. With `strict` it raises `ValueError` if a module of the model cannot be replaced. Otherwise
    such a module stays as it is.
    """

    def run(case: Case) -> tuple[nn.Module, Loss]:
        model, loss = build(case)
        gpt_fast.accelerate(model, strict=strict)
        return model, loss

    return run


def _cuda_only(case: Case) -> str | None:
    """Return the reason why a case on a CPU is not measured, or None for a case on a GPU."""
    return None if case.device == "cuda" else "measured on GPUs only"


def _where_it_fits(missing: Callable[[Case], str | None]) -> Callable[[Case], str | None]:
    """Return a check, a function from a case to the reason why it cannot run or None.

    It gives a reason if training the case's model needs more memory than is available, else the result of `missing`,
    which is a check too. Training needs its state, which is weights, gradients and moments, and at least a quarter of
    that for activations.
    """

    def either(case: Case) -> str | None:
        """Return the reason why the case does not fit into memory, else what the check `missing` returns for it.

        `missing` is the argument of the enclosing function. It returns a reason why the case cannot run, or None.
        """
        need = state_bytes(case)
        if ACTIVATIONS * need > available_memory(case.device):
            return f"needs more than {need / 2**30:.1f} GiB"
        return missing(case)

    return either
