"""gpt_fast: the fast backend for GPT-1 and GPT-2 class Transformers."""

from . import _extension, ops
from ._extension import build_info
from .config import GPTConfig
from .decoding import DecodeSession
from .generation import generate
from .heads import (
    GPTForCausalLM,
    GPTForMaskedLM,
    GPTForMultipleChoice,
    GPTForQuestionAnswering,
    GPTForSequenceClassification,
    GPTForSimilarity,
    GPTForTokenClassification,
)
from .integrations.accelerate import accelerate, restore
from .model import GPT, GPTModel
from .ops import check_values, use_reference

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
    "accelerate",
    "build_info",
    "check_values",
    "generate",
    "ops",
    "restore",
    "use_reference",
]

_extension.load()
