"""A run folder as a model of EleutherAI's lm-evaluation-harness (the extra `harness`).

    python -m gpt_fast.training.harness --model gpt-fast --model_args run=runs/lm --tasks lambada_openai

is the harness's own command, `lm_eval`, with this model. The harness finds no models in other packages by itself:
importing this module registers it. In Python: `lm_eval.simple_evaluate(GPTFastLM("runs/lm"), tasks=[...])`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ..data.tokenizer import decode, encode
from ..generation import generate
from ..scoring import score_continuations
from .engine.distributed import resolve_device
from .runs.load import load_generator, run_tokenizer

BATCH = 16  # continuations in a forward pass, for --batch_size auto


@register_model("gpt-fast")
class GPTFastLM(TemplateLM):
    """Language model of a run folder, as the harness calls it.

    Args:
        run: Run folder of a causal language model.
        device: auto, cpu or cuda.
        batch_size: Continuations in a forward pass; `auto` is 16.
    """

    def __init__(self, run: str | Path, device: str | None = None, batch_size: int | str = BATCH, **_: Any):
        super().__init__()
        self.model = load_generator(Path(run), resolve_device((device or "auto").partition(":")[0]))
        self.ids = run_tokenizer(Path(run), self.model)
        self.batch_size = BATCH if str(batch_size).startswith("auto") else int(batch_size)
        self.max_length = self.model.config.seq_len

    @property
    def eot_token_id(self) -> int:
        """Return the id of the token that ends a text: the model's end token, or else its start token.

        Raise `ValueError` if the model has neither.
        """
        config = self.model.config
        token = config.start_token if config.end_token is None else config.end_token
        if token is None:
            raise ValueError("lm-evaluation-harness: the model has neither start nor end token; expected one of them")
        return token

    @property
    def prefix_token_id(self) -> int:
        """Return the id of the token that precedes a text without context: the start token, or else the end token.

        Raise `ValueError` if the model has neither.
        """
        return self.eot_token_id if self.model.config.start_token is None else self.model.config.start_token

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the token ids of `string`. No special tokens are added; all arguments but `string` are ignored."""
        return encode(self.ids, string)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """Return (log-likelihood, True if greedy decoding would write it) of each request's continuation, in order.

        A request is ((context, continuation) as texts, ids of the context, ids of the continuation). A context that is
        too long for the model loses its first tokens. Each result is also added to the harness's cache. Other keyword
        arguments are ignored. Raise `ValueError` for ids that are empty, or a continuation longer than the model's
        positions.
        """
        pairs = [(context, continuation) for _, context, continuation in requests]
        scores = score_continuations(self.model, pairs, self.batch_size)
        found = [(score.log_prob, score.is_greedy) for score in scores]
        for (texts, _, _), each in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, each)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each request's text, summed over disjoint windows as the harness cuts them.

        A request's `args` are (text,). All tokens of the text are scored, the first one behind the prefix token. The
        result of an empty text is 0. Each result is also added to the harness's cache. `disable_tqdm` is ignored.
        """
        pairs, counts = [], []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            pairs += (mine := list(map(make_disjoint_window, windows)))
            counts.append(len(mine))
        found = iter(score_continuations(self.model, pairs, self.batch_size))
        totals = [sum(next(found).log_prob for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the text that the model writes behind each request's context, without the first stop sequence.

        A request's `args` are (context, options), where options is a dict such as {"until": ["."], "max_gen_toks": 9}.
        Each result is also added to the harness's cache. `disable_tqdm` is ignored.
        """
        return [self._written(*request.args) for request in requests]

    def _written(self, context: str, options: dict[str, Any]) -> str:
        """Return the text that the model writes behind `context`, up to a stop sequence or the end token, without it.

        `options` are the harness's: "until", the stop sequences; "max_gen_toks", the largest number of new tokens;
        "do_sample", without which decoding is greedy; and "temperature". At most the model's positions less one are
        written, and a context that does not fit beside them loses its first tokens. The prefix token stands in for an
        empty context. The result is also added to the harness's cache.
        """
        asked: Any = normalize_gen_kwargs(options)
        room = min(asked["max_gen_toks"], self.max_length - 1)
        temperature = asked["temperature"] if asked["do_sample"] else 0.0
        prompt = (self.tok_encode(context) or [self.prefix_token_id])[-(self.max_length - room) :]
        tokens = torch.tensor([prompt], device=next(self.model.parameters()).device)
        end = self.eot_token_id
        out = generate(self.model, tokens, max_new_tokens=room, temperature=temperature, stop_tokens=[end])
        new = out[0, len(prompt) :].tolist()
        text = decode(self.ids, new[: new.index(end)] if end in new else new, special=False)
        for stop in filter(None, asked["until"]):
            text = text.split(stop)[0]
        self.cache_hook.add_partial("generate_until", (context, options), text)
        return text


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
