"""gpt_fast: the fast backend for GPT-1 and GPT-2 class Transformers."""

from typing import TYPE_CHECKING, Any

from . import _extension, ops
from ._extension import build_info
from .config import GPTConfig
from .generation import DecodeSession, generate
from .heads import (
    GPTForCausalLM,
    GPTForMaskedLM,
    GPTForMultipleChoice,
    GPTForQuestionAnswering,
    GPTForSequenceClassification,
    GPTForSimilarity,
    GPTForTokenClassification,
)
from .model import GPT, GPTModel
from .ops import check_values, use_reference
from .scoring import Scores, score

if TYPE_CHECKING:
    from .integrations.accelerate import accelerate, restore

__version__ = "0.1.0"
__all__ = [
    "GPT",
    "DecodeSession",
    "GPTConfig",
    "GPTForCausalLM",
    "GPTForMaskedLM",
    "GPTForMultipleChoice",
    "GPTForQuestionAnswering",
    "GPTForSequenceClassification",
    "GPTForSimilarity",
    "GPTForTokenClassification",
    "GPTModel",
    "Scores",
    "accelerate",
    "build_info",
    "check_values",
    "generate",
    "ops",
    "restore",
    "score",
    "use_reference",
]

_extension.load()


if not TYPE_CHECKING:  # a type checker would take every name for one that exists

    def __getattr__(name: str) -> Any:
        """Import and return the function `accelerate` or `restore` of `gpt_fast.integrations.accelerate` on first use.

        The function is also stored in this module, so that later uses do not come here. Any other name raises
        `AttributeError`.
        """
        if name in ("accelerate", "restore"):
            from .integrations import accelerate

            globals()[name] = getattr(accelerate, name)
            return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the sorted names in this module, also `accelerate` and `restore`, which are imported on first use."""
    return sorted(set(globals()) | set(__all__))
