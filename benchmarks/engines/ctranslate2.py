"""GPT-2 on CTranslate2, by its converter for transformers' models."""

import shutil
from pathlib import Path

import torch
from torch import Tensor

from gpt_fast import GPTForCausalLM

PACKAGES = ("ctranslate2", "transformers", "tokenizers")
PRECISIONS = ("float32", "bfloat16", "int8")
COMPUTE_TYPES = {"float32": "float32", "bfloat16": "bfloat16", "int8": "int8_float32"}


def missing(precision: str) -> str | None:
    """Return the reason why CTranslate2 cannot compute in a precision on this CPU, or None if it can.

    `precision` is "float32", "bfloat16" or "int8". Raise `ImportError` if CTranslate2 is not installed.
    """
    import ctranslate2

    kinds = ctranslate2.get_supported_compute_types("cpu")
    return None if COMPUTE_TYPES[precision] in kinds else f"CTranslate2 has no {precision} products for this CPU"


def convert(model: GPTForCausalLM, precision: str, folder: Path) -> None:
    """Write the model to `folder`/model in CTranslate2's format, with its weights in `precision`.

    `precision` is one of this module's PRECISIONS: "float32", "bfloat16" or "int8". In "int8", weights have a scale for
    each output channel, and activations one for each token. A temporary copy of the model in `folder`/transformers is
    removed.
    """
    from ctranslate2.converters import TransformersConverter

    theirs = folder / "transformers"
    model.to_hf().save_pretrained(theirs)
    _save_tokenizer(model.config.num_tokens, theirs)
    TransformersConverter(str(theirs)).convert(str(folder / "model"), quantization=COMPUTE_TYPES[precision])
    shutil.rmtree(theirs)


def _save_tokenizer(size: int, folder: Path) -> None:
    """Write the files of a tokenizer of `size` tokens to `folder`, because CTranslate2's converter needs one.

    The text of a token is its number, from "0" to `size` - 1.
    """
    import tokenizers
    import transformers

    words = tokenizers.models.WordLevel({str(token): token for token in range(size)}, unk_token="0")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), unk_token="0", bos_token="0", eos_token="0"
    ).save_pretrained(folder)


class Generator:
    """CTranslate2's generator; no token ends a text."""

    def __init__(self, folder: Path, precision: str):
        """Load the model that `convert` wrote to `folder`/model in `precision`, with as many threads as PyTorch has.

        `precision` is "float32", "bfloat16" or "int8".
        """
        import ctranslate2

        self.generator = ctranslate2.Generator(
            str(folder / "model"), compute_type=COMPUTE_TYPES[precision], inter_threads=1,
            intra_threads=torch.get_num_threads(),
        )  # fmt: skip

    def __call__(self, tokens: Tensor, new: int) -> Tensor:
        """Generate greedily. Return tokens [B, T + new]: the prompt `tokens` [B, T], then `new` tokens.

        No token ends a text early.
        """
        prompts = [[str(token) for token in row] for row in tokens.tolist()]
        found = self.generator.generate_batch(
            prompts, max_length=new, min_length=new, sampling_topk=1, end_token=[], include_prompt_in_result=False
        )
        return torch.cat([tokens, torch.tensor([result.sequences_ids[0] for result in found])], dim=1)
