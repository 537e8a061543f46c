"""The heads: a trunk, an output layer, and the loss each is trained with."""

from .base import Head, HeadOutput
from .classifiers import (
    GPTForMultipleChoice,
    GPTForQuestionAnswering,
    GPTForSequenceClassification,
    GPTForSimilarity,
    GPTForTokenClassification,
)
from .language import GPTForCausalLM, GPTForMaskedLM

HEADS: dict[str, type[Head]] = {
    head.__name__: head
    for head in (
        GPTForCausalLM,
        GPTForMaskedLM,
        GPTForSequenceClassification,
        GPTForTokenClassification,
        GPTForQuestionAnswering,
        GPTForSimilarity,
        GPTForMultipleChoice,
    )
}

__all__ = [
    "HEADS",
    "GPTForCausalLM",
    "GPTForMaskedLM",
    "GPTForMultipleChoice",
    "GPTForQuestionAnswering",
    "GPTForSequenceClassification",
    "GPTForSimilarity",
    "GPTForTokenClassification",
    "Head",
    "HeadOutput",
]
