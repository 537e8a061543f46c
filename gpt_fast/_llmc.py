"""The kinds of files that llm.c writes, by the magic number in their first four bytes."""

from __future__ import annotations

MODEL = 20240326
HEADER = 256  # int32 words in front of a model's or a token file's content
KINDS = {
    MODEL: "a model file",
    20240327: "a debug state",
    20240328: "a tokenizer",
    20240520: "a token file",
    20240522: "a data set for evaluation",
    20240527: "an optimizer state",
    20240801: "a token file of Llama 3",
    20240803: "a Llama 3 model",
}
# Version and type of ids of each kind of token file.
TOKENS = {20240520: (1, "uint16"), 20240801: (7, "uint32")}
HINTS = dict.fromkeys(TOKENS, "pretrain --data reads it") | {
    20240527: "the model_*.bin beside it holds the weights",
}


def magic(head: bytes) -> int | None:
    """Return the magic number of a file that begins with the bytes `head` if it is one that llm.c writes, else None.

    It is the little-endian integer in the first four bytes, and has to be a key of `KINDS`. Fewer bytes give None.
    """
    number = int.from_bytes(head[:4], "little") if len(head) >= 4 else 0
    return number if number in KINDS else None


def describe(number: int) -> str:
    """Return what an llm.c file with the magic `number` is, such as "a tokenizer", then "; " and a hint if it has one.

    `number` has to be a result of `magic`; any other raises `KeyError`.
    """
    return "; ".join(filter(None, (KINDS[number], HINTS.get(number))))
