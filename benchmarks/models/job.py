"""A whole-model job as the suite calls it, and transformers' models for it."""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn, optim

import gpt_fast
from benchmarks.topic import Case, Work
from gpt_fast.generation.steps import CppStep


class Job:
    """Call of a job, with the model it runs and, in training, the optimizer. An engine keeps a model of its own.

    `work` is what the job cannot avoid, if that differs from the case's work, as with weights of another dtype.
    """

    def __init__(
        self,
        model: nn.Module | None,
        run: Callable[..., object],
        optimizer: optim.Optimizer | None = None,
        work: Work | None = None,
        session: gpt_fast.DecodeSession | None = None,
    ):
        """Store the function to time, and what it keeps in memory.

        Args:
            model: the model that runs, or None for an inference engine, which keeps a model of its own.
            run: the function to time; it takes the case's inputs.
            optimizer: the optimizer of a training step, or None.
            work: the job's unavoidable bytes and FLOPs, or None if they are the case's. They differ for weights of
                another dtype.
            session: the decode session that all calls use, or None.
        """
        self.model = model
        self.run = run
        self.optimizer = optimizer
        self.work = work
        self.session = session

    def __call__(self, *inputs: Tensor) -> object:
        """Call the job's function with the inputs of a case, and return its result."""
        return self.run(*inputs)

    def state_bytes(self) -> int | None:
        """Return the bytes that stay in memory between calls, or None for a job without a PyTorch model.

        They are the bytes of the model's parameters and buffers and of the optimizer's state. A decode session adds its
        cache of keys and values, and on a CPU the weights that it has packed for its steps. An inference engine such as
        OpenVINO has no PyTorch model, and does not tell its memory.
        """
        if self.model is None:
            return None
        kept = sum(tensor.nbytes for tensor in self._state())
        if self.session is not None:
            kept += self.session.cache.keys.nbytes + self.session.cache.values.nbytes
            if isinstance(self.session._step, CppStep):
                kept += self.session._step.weights.bytes
        return kept

    def _state(self) -> Iterator[Tensor]:
        """Yield the model's parameters and buffers, then the tensors of the optimizer's state if there is an optimizer.

        Tensors of the model that begin at the same address, such as tied weights, are yielded once. Raise
        `AssertionError` if the job has no model.
        """
        assert self.model is not None
        yield from {tensor.data_ptr(): tensor for tensor in self.model.state_dict().values()}.values()
        if self.optimizer:
            for state in self.optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))


def referenced(run: Callable[..., object]) -> Callable[..., object]:
    """Return a function of positional arguments that calls `run` while every op of gpt_fast runs its reference.

    The reference of an op is its definition in plain PyTorch.
    """

    def run_reference(*inputs: Tensor) -> object:
        with gpt_fast.use_reference():
            return run(*inputs)

    return run_reference


def no_transformers(case: Case) -> str | None:
    """Return "transformers is not installed" if that is so, else None. The case does not matter."""
    return "transformers is not installed" if importlib.util.find_spec("transformers") is None else None


def hf_model(name: str, case: Case, attention: str) -> Any:
    """Return a GPT-2 of transformers with the case's configuration and dropout, and with random weights, on the CPU.

    `name` is the model's class, such as "GPT2LMHeadModel". `attention` is its attention implementation, "eager" or
    "sdpa". Raise `ImportError` if transformers is not installed.
    """
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
