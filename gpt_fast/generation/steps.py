"""The two ways to run a decode step, and which of them serves a model: the C++ extension, or the model's modules."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from torch import Tensor

from .. import _plain, ops
from ..model import GPT, _Trunk, evaluating, why_not_as_configured, why_not_plain
from ..ops._library import device_guard, has_kernel, profiled, runs_reference
from .cache import KVCache, StepPass
from .sampling import DAMAGED, Sampling, damaged, draw, sample

if TYPE_CHECKING:
    from ..heads import Head

WEIGHTS = ("float32", "bfloat16", "int8", "int8-a16")


class CppStep:
    """Decode step as one call into the C++ extension, with a copy of the weights in the precision `weights`.

    `weights` is one of `WEIGHTS`, "int8" for example. `cache` is the cache that the steps read and write.
    """

    def __init__(self, model: GPT | Head, cache: KVCache, weights: str):
        from .. import _C  # type: ignore[attr-defined]

        self._c = _C
        trunk, output_layer = parts(model)
        parameters = {name: value.detach() for name, value in trunk.named_parameters()}
        parameters |= {f"output_layer.{name}": value.detach() for name, value in output_layer.named_parameters()}
        config = trunk.config
        self.weights = _C.DecodeWeights(
            parameters, num_heads=config.num_heads, activation=config.activation, pre_norm=config.pre_norm,
            eps=config.layer_norm_eps, weights=weights,
        )  # fmt: skip
        self.copied = [parameters[name] for name in self.weights.copied]
        self.cache = cache
        self._session = _C.DecodeSession(self.weights, cache.keys, cache.values)
        self._every_row = torch.arange(cache.batch, device=cache.lengths.device)
        self.start_drawing(0)

    def advance(
        self,
        model: GPT | Head,
        tokens: Tensor,
        options: Sampling,
        live: Tensor | None,
        seen: Tensor | None,
        calls_modules: bool,
    ) -> Tensor:
        """Read `tokens` [B], one for each row of the cache, and return the next tokens [B] drawn with `options`.

        `live` [B], Bool, is True for the rows to run, None for all of them. For the other rows, the result repeats
        their entries of `tokens`. `seen` [B, V], Bool, is True for the tokens to which the repetition penalty applies,
        None for no penalty. The cache's lengths grow by 1 in the rows that run. `model` and `calls_modules` are unused
        here; `TorchStep.advance` has the same signature. Raise `ValueError` if logits are NaN or +inf; the lengths then
        stay.
        """
        lengths = self.cache.lengths
        if live is None or bool(live.all()):
            new = self._step(tokens, lengths, self._every_row, options, seen)
            lengths += 1
            return new
        rows = live.nonzero().squeeze(1)
        new = tokens.clone()
        new[rows] = self._step(tokens[rows], lengths[rows], rows, options, seen)
        lengths += live
        return new

    def _step(self, tokens: Tensor, lengths: Tensor, rows: Tensor, options: Sampling, seen: Tensor | None) -> Tensor:
        """Run one decode step of the C++ session for `rows` [n], indices into the cache. Return the next tokens [n].

        The `tokens` [n] are read at the positions `lengths` [n], and the next ones are drawn with `options`. `seen` [B,
        V], Bool, is True for the tokens of each of the cache's rows to which the repetition penalty applies, None for
        no penalty. `lengths` is not changed. Raise `ValueError` if logits are NaN or +inf.
        """
        with profiled("gpt_fast::decode_step"):
            return self._session.step(tokens, lengths, rows, self._sampling(options), seen)

    def read_prompt(self, tokens: Tensor, lengths: Tensor, first: int) -> Tensor:
        """Read a prompt into each of the cache's rows `first` to `first + B - 1`, behind the tokens that they hold.

        Of `tokens` [B, T] the first `lengths[b]` are row b's prompt. Return the logits [B, V], float32, after each
        prompt's last token. The caller has to add `lengths` [B] to the cache's `lengths`.
        """
        B, T = tokens.shape
        places = torch.arange(T, device=tokens.device)
        real = places < lengths[:, None]  # [B, T]
        rows = torch.arange(first, first + B, device=tokens.device)
        positions = self.cache.lengths[first : first + B, None] + places
        ends = lengths.cumsum(0) - 1
        with profiled("gpt_fast::decode_prompt"):
            return self._session.prefill(tokens[real], positions[real], rows[:, None].expand(B, T)[real], ends)

    def draw(self, logits: Tensor, options: Sampling, rows: Tensor, seen: Tensor | None) -> Tensor:
        """Return one token for each row of `logits` [n, V] float32, drawn with `options`: [n], int64.

        `rows` [n] are the cache's rows that the logits belong to. `seen` [B, V], Bool, is True for the tokens of each
        of the cache's rows to which the repetition penalty applies, None for no penalty. Raise `ValueError` if the
        logits hold NaN or +inf. Unless it is greedy, the draw is counted (see `start_drawing`).
        """
        return self._session.draw(logits, rows, self._sampling(options), seen)

    def start_drawing(self, seed: int) -> None:
        """Set the seed, a signed 64-bit integer, and start to count the draws from 0.

        The random numbers of a draw depend only on the seed, on this count and on the row, so the same seed gives the
        same draws.
        """
        self._seed, self._draws = seed, 0

    def logits(self, live: Tensor | None = None) -> Tensor:
        """Return the logits [batch, V], float32, after the last step, before penalty and limits.

        `live` [batch], Bool, has to be the mask with which that step was run, None if it ran all rows. The logits of
        rows that it did not run are 0.
        """
        logits = self._session.logits()
        if live is None or len(logits) == self.cache.batch:
            return logits
        return logits.new_zeros(self.cache.batch, logits.shape[1]).index_copy_(0, live.nonzero().squeeze(1), logits)

    def check_logits(self) -> None:
        """Do nothing: the C++ step raises `ValueError` itself if its logits hold NaN or infinity."""

    def _sampling(self, options: Sampling) -> Any:
        """Return `options` as the C++ extension's `Sampling`, with the seed and the number of the next draw.

        An option that is None gets the value that keeps all tokens: top_k 0, top_p 1, min_p 0. Unless the draw is
        greedy, this function first increases the number of draws by 1.
        """
        self._draws += options.temperature > 0
        return self._c.Sampling(
            temperature=options.temperature,
            top_k=min(options.top_k or 0, 2**31 - 1),
            top_p=1.0 if options.top_p is None else options.top_p,
            min_p=options.min_p or 0.0,
            penalty=options.repetition_penalty,
            seed=self._seed,
            draw=self._draws,
        )


class TorchStep:
    """Decode step on the model's modules: eager, or on CUDA as a captured graph.

    The step keeps its inputs and outputs in tensors whose addresses never change, as a graph requires. `cache` is the
    cache that the steps read and write.
    """

    copied: tuple[Tensor, ...] = ()  # the modules read their own parameters

    def __init__(self, model: GPT | Head, cache: KVCache):
        self.cache = cache
        batch, device = cache.batch, cache.keys.device
        with torch.inference_mode(False):  # tensors made in inference mode could not be written outside it
            self.tokens = torch.zeros(batch, dtype=torch.int64, device=device)
            self.live = torch.ones(batch, dtype=torch.bool, device=device)
            self.damaged = torch.zeros(batch, dtype=torch.bool, device=device)
            self.kept_logits = torch.zeros(batch, parts(model)[0].config.num_tokens, dtype=torch.float32, device=device)
        self.generator = torch.Generator(device)
        self._graph: Any = None
        self._captured: Any = None  # the options and marks that the graph was captured with

    def run(self, model: GPT | Head, options: Sampling, seen: Tensor | None) -> None:
        """Read `self.tokens` [B] and replace them, in place, by the next tokens drawn with `options`.

        Also store the logits in `kept_logits`, and mark live rows with NaN or +inf in `damaged`. The cache gets each
        row's key and value, and its lengths grow by 1 in the rows where `self.live` is True. `seen` [B, V], Bool, is
        True for the tokens to which the repetition penalty applies, None for no penalty. Nothing is raised for damaged
        rows.
        """
        trunk, output_layer = parts(model)
        hidden = continue_trunk(trunk, self.tokens[:, None], StepPass(self.cache))  # [B, 1, C]
        logits = output_layer(hidden[:, 0]).to(self.kept_logits.dtype)  # [B, V]
        self.kept_logits.copy_(logits)
        self.damaged |= damaged(logits) & self.live
        self.tokens.copy_(draw(logits, options, generator=self.generator, seen=seen))
        self.cache.lengths += self.live

    def advance(
        self,
        model: GPT | Head,
        tokens: Tensor,
        options: Sampling,
        live: Tensor | None,
        seen: Tensor | None,
        calls_modules: bool,
    ) -> Tensor:
        """Read `tokens` [B], one for each row of the cache, and return the next tokens [B] drawn with `options`.

        `live` [B], Bool, is True for the rows that are still generated, None for all of them. The next tokens of the
        other rows are arbitrary, and their lengths in the cache stay. `seen` [B, V], Bool, is True for the tokens to
        which the repetition penalty applies, None for no penalty. `calls_modules` is True if the model's modules have
        to be called, because of hooks for example. Otherwise the step may be a CUDA graph. Raise `ValueError` if the
        logits hold NaN or infinity; after a CUDA graph, `check_logits` does so.
        """
        self.tokens.copy_(tokens)
        self.live.copy_(live) if live is not None else self.live.fill_(True)
        # A graph would replay kernels in the reference's place, and would not run hooks.
        captures = not calls_modules and has_kernel("decode_attention", self.cache.keys)
        if captures and self.tokens.is_cuda and not ops.values_checked(self.tokens):
            with device_guard(self.tokens.get_device()):
                self._replay(model, options, seen)
        else:
            with evaluating(model) if calls_modules else contextlib.nullcontext():
                self.run(model, options, seen)
            self.check_logits()
        return self.tokens.clone()

    def forget_graph(self) -> None:
        """Drop the captured graph, so that the next step captures a new one.

        A graph reads parameters at the addresses that they had when it was captured.
        """
        self._graph = self._captured = None

    def _replay(self, model: GPT | Head, options: Sampling, seen: Tensor | None) -> None:
        """Replay the CUDA graph of `run`, which reads and replaces `self.tokens`.

        The graph is captured first if there is none, or if it was captured with other `options` or another tensor
        `seen`.
        """
        captured = (options, None if seen is None else seen.data_ptr())
        if self._captured != captured:
            self._capture(model, options, seen)
            self._captured = captured
        self._graph.replay()

    def _capture(self, model: GPT | Head, options: Sampling, seen: Tensor | None) -> None:
        """Capture `run(model, options, seen)` as a CUDA graph, in `self._graph`.

        `run` is called three times for this. Afterwards the tokens, the marks of damaged rows, the cache's lengths and
        the generator are as they were before. `kept_logits` and the cache's entries behind its lengths are overwritten.
        """
        state = (self.tokens, self.damaged, self.cache.lengths)
        before = [value.clone() for value in state]
        drawn = self.generator.get_state()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # kernels are compiled and libraries initialised outside the capture
                for value, saved in zip(state, before, strict=True):
                    value.copy_(saved)
                self.run(model, options, seen)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        self._graph.register_generator_state(self.generator)
        for value, saved in zip(state, before, strict=True):
            value.copy_(saved)
        # Without a stream of ours torch captures on one that belongs to the device of the process's first capture.
        with torch.cuda.graph(self._graph, stream=torch.cuda.Stream()):
            self.run(model, options, seen)
        self.generator.set_state(drawn)

    def draw(self, logits: Tensor, options: Sampling, rows: Tensor, seen: Tensor | None) -> Tensor:
        """Return one token for each row of `logits` [n, V], drawn with `options`: [n], int64.

        `rows` [n] are the cache's rows that the logits belong to. `seen` [B, V], Bool, is True for the tokens of each
        of the cache's rows to which the repetition penalty applies, None for no penalty. Raise `ValueError` if the
        logits hold NaN or +inf.
        """
        return sample(logits, options, generator=self.generator, seen=None if seen is None else seen[rows])

    def start_drawing(self, seed: int) -> None:
        """Seed the generator of the draws with `seed`, an integer, so that the same seed gives the same draws."""
        self.generator.manual_seed(seed)

    def logits(self, live: Tensor | None = None) -> Tensor:
        """Return a copy of the logits [batch, V], float32, after the last step, before penalty and limits.

        The logits of rows that the step did not run are arbitrary. `live` is ignored; `CppStep.logits` has the same
        signature.
        """
        return self.kept_logits.clone()

    def check_logits(self) -> None:
        """Raise `ValueError` if a step since the last call had NaN or +inf in the logits of a live row.

        The marks in `damaged` are cleared then. This waits for the device.
        """
        if bool(self.damaged.any()):
            self.damaged.zero_()
            raise ValueError(DAMAGED)


def parts(model: Any, function: str = "generate") -> tuple[_Trunk, nn.Module]:
    """Return (trunk, output layer) of a model that can generate text. The trunk computes the last hidden states.

    For a head such as `GPTForCausalLM` the result is (`model.trunk`, `model.output_layer`). For a `GPT`, which computes
    hidden states itself, it is (`model`, `model.output_layer`). Raise `ValueError`, which names `function`, for a model
    of another class, a head without an output layer, and a `GPTForMaskedLM`.
    """
    from ..heads import GPTForMaskedLM, Head

    if isinstance(model, GPT):
        return model, model.output_layer
    if isinstance(model, Head) and hasattr(model, "output_layer") and not isinstance(model, GPTForMaskedLM):
        return model.trunk, model.output_layer
    raise ValueError(f"gpt_fast.{function}: model is a {type(model).__name__}; expected a GPTForCausalLM or a GPT")


def unwrapped(model: Any, function: str = "generate") -> Any:
    """Return the model inside the wrappers of torch.compile, DataParallel, DistributedDataParallel and PEFT.

    Wrappers may be nested. PEFT's adapters inside the modules stay. Anything else comes back as it is.

    Returns:
        The model.

    Raises:
        ValueError: The parameters are sharded over ranks, or an adapter is no part of the modules, such as a trained
            prompt. The message names `function`.
    """
    while isinstance(model, nn.Module) and not isinstance(model, _Trunk):
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:  # of torch.compile
            model = model._modules["_orig_mod"]
        elif hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
            peft: Any = model
            if peft.active_peft_config.is_prompt_learning:
                raise ValueError(
                    f"gpt_fast.{function}: model has the adapter {peft.active_peft_config.peft_type}, which puts "
                    "trained vectors before the tokens; expected one that changes modules, such as LoRA"
                )
            model = peft.get_base_model()
        else:
            break
    if isinstance(model, nn.Module) and any(_is_sharded(module) for module in model.modules()):
        raise ValueError(
            f"gpt_fast.{function}: model is a {type(model).__name__} whose parameters are sharded over ranks; expected "
            "a whole model: load a full state dict into one that is not sharded"
        )
    return model


def _is_sharded(module: nn.Module) -> bool:
    """Return True for a module of FSDP1 or FSDP2, whose class's name begins with "FSDP" or "FullyShardedDataParallel".

    The name decides, because importing FSDP takes seconds.
    """
    return type(module).__name__.startswith(("FSDP", "FullyShardedDataParallel"))


def step_kind(model: GPT | Head, weights: str | None) -> str:
    """Return what runs the decode step of a model: the C++ step with weights of some precision, or the model's modules.

    `weights` is the precision that the user asked for, one of `WEIGHTS`, or None for the model's own. The C++ step runs
    on a CPU with the extension built, unless `use_reference()` or float64 rules it out. It copies parameters by name,
    so it serves only plain models: no hooks, no replaced modules, no subclasses.

    Returns:
        "float32", "bfloat16", "int8" or "int8-a16" for the C++ step with these weights, else "torch". For None the C++
        step has "bfloat16" for a bfloat16 model and "float32" for any other.

    Raises:
        ValueError: `weights` is none of `WEIGHTS` or None, or it is not the model's own precision and the C++ step does
            not serve this model.
    """
    if weights is not None and not (isinstance(weights, str) and weights in WEIGHTS):
        raise ValueError(f"gpt_fast.generate: weights is {weights!r}; expected one of {', '.join(WEIGHTS)}")
    place = parts(model)[0].pos_emb
    own = str(place.dtype).removeprefix("torch.")
    reason = why_called(model)
    if (
        reason is None
        and device_has_cpp_step(place.device)
        and not runs_reference("decode_attention", place, *model.parameters())
    ):
        return weights or ("bfloat16" if own == "bfloat16" else "float32")
    if weights not in (None, own):
        raise ValueError(
            f"gpt_fast.generate: weights {weights!r} of a {own} model on {place.device.type}"
            f"{f' whose {reason}' if reason else ''}; other weights than its own need the C++ step, which runs plain "
            "models on a CPU with the extension built, in float32, bfloat16 or float16"
        )
    return "torch"


def why_not_reached(model: Any) -> str | None:
    """Return a sentence on user code of the model that generation would not run, or None if there is none.

    Generation calls the trunk and the output layer, not the model around them. So it does not run forward or backward
    hooks on a head or on a `GPT` itself, nor the `forward` of a subclass or of the instance. `model` is a `GPT` or a
    head.
    """
    from ..heads import HEADS

    known = {GPT, *HEADS.values()}
    kind: Any = next(kind for kind in type(model).__mro__ if kind in known)
    if _plain.is_hooked_itself(model):
        return f"hooks of the {type(model).__name__} itself do not run; hooks of its trunk and output layer do"
    if type(model).forward is not kind.forward or "forward" in vars(model):
        return f"the forward of {type(model).__name__} does not run: generation calls its trunk and output layer"
    return None


def device_has_cpp_step(device: torch.device) -> bool:
    """Return True if `device` is a CPU and the C++ extension is built and enabled, so that it can run decode steps."""
    return device.type == "cpu" and ops.serving("decode_attention", "cpu") == "cpp"


def why_called(model: Any) -> str | None:
    """Return why generation has to call the model's modules, or None if the C++ step could compute the same instead.

    The reason is a clause such as "decoders.0.ff.0 has hooks". There is one if a module has hooks, is of another class
    or has its own forward, or if the modules differ from the configuration.
    """
    trunk, output_layer = parts(model)
    reason = why_not_plain({**dict(trunk.named_modules()), "output_layer": output_layer})
    return why_not_as_configured(trunk) if reason is None else reason


def continue_trunk(trunk: Any, tokens: Tensor, cache: Any) -> Tensor:
    """Return the trunk's hidden states [B, T, C] of `tokens` [B, T] that follow those in the cache.

    `cache` is a `StepPass` or a `PromptPass`, through which the attention layers read the cache and write the tokens'
    keys and values. The cache's lengths stay. A trunk that is not a `GPT` is called, so its hooks run.
    """
    if isinstance(trunk, GPT):
        return trunk.hidden_states(tokens, cache=cache)  # its call would give probabilities
    return trunk(tokens, cache=cache)
