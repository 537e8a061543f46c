"""Who runs a whole-model job: ours, the reference, a plain PyTorch model, transformers' GPT-2.

A training step is forward, backward and fused AdamW on float32 weights, under autocast where the case is bfloat16.
Prefill and decoding run weights in the case's dtype, greedily.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpt_fast
from benchmarks import counts
from benchmarks.cases import Case
from benchmarks.counts import Work
from benchmarks.peers import OURS, Peer
from benchmarks.plain_gpt import PlainGPT
from benchmarks.timing import available_memory
from gpt_fast.generation.steps import WEIGHTS
from gpt_fast.training.engine.optimizer import make_optimizer

Loss = Callable[..., Tensor]


class Job:
    """One call of a job, with the model it runs and, in training, the optimiser's state. `work` is what it cannot avoid
    where that is other than the case's, as with weights of another dtype."""

    def __init__(
        self,
        model: nn.Module,
        run: Callable[..., object],
        optimizer: torch.optim.Optimizer | None = None,
        work: Work | None = None,
    ):
        self.model = model
        self.run = run
        self.optimizer = optimizer
        self.work = work

    def __call__(self, *inputs: Tensor) -> object:
        return self.run(*inputs)

    def state_bytes(self) -> int:
        """What stays in memory between calls: parameters, moments, and a session that `generate` keeps."""
        kept = getattr(self.model, "_kept_session", None)
        packed = 0
        if kept is not None:
            packed = kept.cache.keys.nbytes + kept.cache.values.nbytes
            if kept.kind in WEIGHTS and kept.kind != str(next(self.model.parameters()).dtype).removeprefix("torch."):
                packed += kept._step.weights.bytes
        return packed + sum(tensor.nbytes for tensor in self._state())

    def _state(self) -> Iterator[Tensor]:
        yield from {tensor.data_ptr(): tensor for tensor in self.model.state_dict().values()}.values()
        if self.optimizer:
            for state in self.optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))


# ---- training


def _training(case: Case, model: nn.Module, loss: Loss) -> Job:
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


def _ours(case: Case) -> tuple[nn.Module, Loss]:
    model = gpt_fast.GPTForCausalLM(case.config).to(case.device)
    return model, lambda tokens: model(tokens, tokens).loss


def _plain(case: Case) -> tuple[nn.Module, Loss]:
    model = PlainGPT(case.config).to(case.device)
    return model, model.loss


def _hf(attention: str, case: Case) -> tuple[nn.Module, Loss]:
    model = hf_model("GPT2LMHeadModel", case, attention).to(case.device)
    return model, lambda tokens: model(tokens, labels=tokens, use_cache=False).loss


def _our_classifier(case: Case) -> tuple[nn.Module, Loss]:
    model = gpt_fast.GPTForSequenceClassification(case.config).to(case.device)
    return model, lambda tokens, labels: model(tokens, labels).loss


class PlainClassifier(nn.Module):
    def __init__(self, case: Case):
        super().__init__()
        self.trunk = PlainGPT(case.config)
        self.dropout = nn.Dropout(case.config.classifier_dropout)
        self.classifier = nn.Linear(case.config.hidden_dim, case.config.num_labels)

    def loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.classifier(self.dropout(self.trunk.hidden_states(tokens)[:, -1])), labels)


def _plain_classifier(case: Case) -> tuple[nn.Module, Loss]:
    model = PlainClassifier(case).to(case.device)
    return model, model.loss


def _hf_classifier(attention: str, case: Case) -> tuple[nn.Module, Loss]:
    model = hf_model("GPT2ForSequenceClassification", case, attention).to(case.device)
    return model, lambda tokens, labels: model(tokens, labels=labels, use_cache=False).loss


def hf_model(name: str, case: Case, attention: str) -> Any:
    """transformers' GPT-2 of the case's configuration, with random weights."""
    import transformers

    config = case.config
    theirs = transformers.GPT2Config(
        vocab_size=config.num_tokens,
        n_positions=config.seq_len,
        n_embd=config.hidden_dim,
        n_layer=config.num_layers,
        n_head=config.num_heads,
        embd_pdrop=case.dropout,
        attn_pdrop=case.dropout,
        resid_pdrop=case.dropout,
        pad_token_id=config.num_tokens - 1,
        bos_token_id=None,
        eos_token_id=None,
    )
    return getattr(transformers, name)._from_config(theirs, attn_implementation=attention)


def _referenced(step: Callable[..., object]) -> Callable[..., object]:
    def run(*inputs: Tensor) -> object:
        with gpt_fast.use_reference():
            return step(*inputs)

    return run


Build = Callable[[Case], tuple[nn.Module, Loss]]


def _trains(name: str, build: Build, missing: Callable[[Case], str | None] = lambda case: None) -> tuple[Peer, Peer]:
    """A model trained as it is, and its loss compiled."""

    def eager(case: Case) -> Job:
        return _training(case, *build(case))

    def compiled(case: Case) -> Job:
        model, loss = build(case)
        return _training(case, model, torch.compile(loss, dynamic=False))

    return Peer(name, eager, missing), Peer(f"{name} compiled", compiled, missing, compiles=True)


def _trained_reference(build: Build) -> Peer:
    def referenced(case: Case) -> Job:
        job = _training(case, *build(case))
        job.run = _referenced(job.run)
        return job

    return Peer("reference", referenced)


def _cuda_only(case: Case) -> str | None:
    return None if case.device == "cuda" else "measured on GPUs only"


def _no_transformers(case: Case) -> str | None:
    return "transformers is not installed" if importlib.util.find_spec("transformers") is None else None


def _accelerated(build: Build) -> Build:
    """What `gpt_fast.accelerate` makes of it."""

    def run(case: Case) -> tuple[nn.Module, Loss]:
        model, loss = build(case)
        gpt_fast.accelerate(model, strict=True)
        return model, loss

    return run


def _training_peers(ours: Build, plain: Build, hf: Callable[[str, Case], tuple[nn.Module, Loss]]) -> tuple[Peer, ...]:
    eager_hf, _ = _trains("Hugging Face eager", partial(hf, "eager"), _no_transformers)
    sdpa_hf, compiled_hf = _trains("Hugging Face sdpa", partial(hf, "sdpa"), _no_transformers)
    accelerated_hf, _ = _trains("Hugging Face accelerated", _accelerated(partial(hf, "sdpa")), _no_transformers)
    eager, compiled = _trains(OURS, ours)
    peers = (
        eager,
        dataclasses.replace(compiled, missing=_cuda_only),
        *_trains("plain", plain),
        eager_hf,
        sdpa_hf,
        accelerated_hf,
        dataclasses.replace(compiled_hf, name="Hugging Face compiled"),
        _trained_reference(ours),
    )
    return tuple(dataclasses.replace(peer, missing=_where_it_fits(peer.missing)) for peer in peers)


def _where_it_fits(missing: Callable[[Case], str | None]) -> Callable[[Case], str | None]:
    """Missing too where weights, gradients and AdamW's moments leave no room for a quarter of them in activations."""

    def either(case: Case) -> str | None:
        need = 16 * counts.parameters(case.config)
        if 1.25 * need > available_memory(case.device):
            return f"needs more than {need / 2**30:.1f} GiB"
        return missing(case)

    return either


# ---- generation


def _new_tokens(case: Case) -> int:
    return case.size.get("new", 1)


def _eval(case: Case, model: Any) -> Any:
    return model.to(device=case.device, dtype=case.dtype).eval()


def _our_generation(case: Case, weights: str | None = None) -> Job:
    model = _eval(case, gpt_fast.GPTForCausalLM(case.config))
    new = _new_tokens(case)
    work = None
    if weights is not None:
        element = {"bfloat16": 2, "int8": 1}[weights]
        work = counts.decode(case.config, case.size["B"], case.size["prompt"], new, element, cache_element=2)

    def run(tokens: Tensor) -> Tensor:
        return gpt_fast.generate(model, tokens, max_new_tokens=new, temperature=0, weights=weights)

    return Job(model, run, work=work)


def _packed_missing(case: Case) -> str | None:
    if case.device != "cpu" or gpt_fast.build_info() is None:
        return "weights are packed on the CPU only, by the C++ extension"
    return None


def _reference_generation(case: Case) -> Job:
    job = _our_generation(case)
    job.run = _referenced(job.run)
    return job


def _plain_generation(case: Case) -> Job:
    model = _eval(case, PlainGPT(case.config))
    new = _new_tokens(case)
    return Job(model, torch.inference_mode()(lambda tokens: model.generate(tokens, new)))


def _plain_missing(case: Case) -> str | None:
    if case.device == "cpu" and case.size["B"] * _new_tokens(case) > 32:
        return "computes the whole context again for each token: left to the shortest case on a CPU"
    return None


def _hf_generation(case: Case, attention: str, static: bool = False) -> Job:
    model = _eval(case, hf_model("GPT2LMHeadModel", case, attention))
    new = _new_tokens(case)
    options: dict[str, Any] = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new}
    if static:  # transformers then compiles its forward pass by itself
        options["cache_implementation"] = "static"
    return Job(
        model, lambda tokens: model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    )  # fmt: skip


def _static_missing(case: Case) -> str | None:
    return _no_transformers(case) or (
        None if case.device == "cuda" else "transformers compiles its static cache on GPUs only"
    )


_GENERATION = (
    Peer(OURS, _our_generation),
    Peer("plain", _plain_generation, _plain_missing),
    Peer("Hugging Face eager", partial(_hf_generation, attention="eager"), _no_transformers),
    Peer("Hugging Face sdpa", partial(_hf_generation, attention="sdpa"), _no_transformers),
    Peer(
        "Hugging Face compiled", partial(_hf_generation, attention="sdpa", static=True), _static_missing, compiles=True
    ),
    Peer("reference", _reference_generation),
)

_PACKED = tuple(
    Peer(f"{OURS} {weights} weights", partial(_our_generation, weights=weights), _packed_missing)
    for weights in ("bfloat16", "int8")
)

MODEL_PEERS: dict[str, tuple[Peer, ...]] = {
    "training_step": _training_peers(_ours, _plain, _hf),
    "finetuning_step": _training_peers(_our_classifier, _plain_classifier, _hf_classifier),
    "prefill": _GENERATION,
    "generation": (_GENERATION[0], *_PACKED, *_GENERATION[1:]),
}
