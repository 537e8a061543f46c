"""Tokenizers: byte-level BPE, bytes, characters, or a tokenizer.json of your own.

All are `tokenizers.Tokenizer` objects, saved as one `tokenizer.json`. Each reserves the five tokens that the tasks
need, so any checkpoint can take any task. Text can never produce one of them: a literal `<|pad|>` in a file is
spelled out in ordinary tokens, and special tokens enter a sequence only by id.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, repeat
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from gpt_fast_settings.declaration import did_you_mean
from gpt_fast_settings.documents import parse_json, read_bytes

from .._files import write_text
from ..config import SPECIAL_TOKENS
from .reading.cuts import keeps_tokens, pieces

KINDS = ("bpe", "byte", "char")  # tokenizers that need no file
UNKNOWN = "<|unk|>"
_BATCH_TEXT = 1 << 18  # characters that are encoded at once
_TRAINED = 1 << 12  # characters of a text that a vocabulary is learned from at once
_SURROGATE = re.compile("[\ud800-\udfff]")


def make_tokenizer(kind: str, texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Return the tokenizer of a kind, or the one in a file.

    Args:
        kind: "bpe" and "char" learn their vocabulary from `texts`, and "byte" needs none. Anything else is the path of
            a tokenizer.json.
        texts: Texts to learn from.
        vocab_size: Largest vocabulary of "bpe".

    Returns:
        A `tokenizers.Tokenizer` with the five special tokens.

    Raises:
        ValueError: The kind is unknown, the file is no tokenizer, or the vocabulary is too small for the 256 bytes and
            the special tokens.

    Example:
        ```python
        from gpt_fast import data

        tokenizer = data.make_tokenizer("byte", [], 0)
        print(tokenizer.encode("abc").ids)  # [97, 98, 99]
        ```
    """
    texts = map(without_lone_surrogates, texts)
    if kind == "bpe":
        return train_bpe(texts, vocab_size)
    if kind == "byte":
        return byte_tokenizer()
    if kind == "char":
        return char_tokenizer(texts)
    check_kind(kind)
    return load_tokenizer(Path(kind))


def check_kind(kind: str) -> None:
    """Raise `ValueError` for a name that is no kind of tokenizer and no path."""
    if kind not in KINDS and (not kind.strip() or not Path(kind).exists()):
        raise ValueError(
            f"--tokenizer {kind!r}: no such file; expected {', '.join(KINDS)} or the path of a tokenizer.json"
            f"{did_you_mean(kind, KINDS)}"
        )


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE: any text comes back from its ids exactly. The special tokens take ids 0 to 4."""
    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size < smallest:
        raise ValueError(
            f"bpe: a vocabulary of {vocab_size} cannot hold the 256 bytes and 5 special tokens; give {smallest} or more"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The trainer takes 256 texts at once, at 75 bytes for each byte. A cut between words changes no count.
    parts = (part for text in texts for part in pieces(iter([text]), size=_TRAINED))
    tokenizer.train_from_iterator(parts, trainer)
    return _finish(tokenizer)


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer with one token a UTF-8 byte, whose id is the byte. Special tokens follow as 256 to 260."""
    vocabulary = {letter: byte for byte, letter in enumerate(_byte_letters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _finish(tokenizer)


def char_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Return a tokenizer with one token a character of `texts`, in code point order. Others become `<|unk|>`."""
    return _words_tokenizer([*SPECIAL_TOKENS.values(), UNKNOWN, *sorted(set().union(*texts))])


def letters_tokenizer(letters: Sequence[str]) -> Tokenizer:
    """Return a tokenizer for a character-level model of another library, whose ids are places in `letters`.

    `<|unk|>` and the special tokens follow. That model has no embedding for them.
    """
    return _words_tokenizer([*letters, UNKNOWN])


def load_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer in a tokenizer.json, or in the folder that holds one.

    Args:
        path: File or folder. Special tokens that the tokenizer lacks are added after its own vocabulary.

    Returns:
        A `tokenizers.Tokenizer`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no tokenizer.json.

    Example:
        ```python
        import pathlib, tempfile
        from gpt_fast import data

        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "tokenizer.json")
            data.save_tokenizer(data.make_tokenizer("byte", [], 0), path)
            print(data.vocabulary_size(data.load_tokenizer(path)))  # 261
        ```
    """
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a tokenizer.json")
    content = read_bytes(path)
    try:
        values = parse_json(path, content)
    except ValueError as error:
        raise ValueError(f"{path}: not a tokenizer.json ({str(error).removeprefix(f'{path}: ')})") from None
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        raise ValueError(f"{path}: not a tokenizer.json (it has no object 'model')")
    try:
        return parse_tokenizer(content.decode("utf-8-sig"))
    except Exception as error:  # noqa: BLE001  the tokenizers library raises nothing narrower
        raise ValueError(f"{path}: not a tokenizer.json that this version of tokenizers reads ({error})") from None


def parse_tokenizer(text: str) -> Tokenizer:
    """Return the tokenizer in the text of a tokenizer.json."""
    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return _finish(tokenizer)


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write a tokenizer.json, which `load_tokenizer` reads.

    Args:
        tokenizer: The tokenizer.
        path: The file.

    Raises:
        OSError: The file cannot be written.
    """
    write_text(path, tokenizer.to_str(pretty=True))


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the ids of the special tokens under the names that `GPTConfig` gives them."""
    ids = tokenizer.get_vocab(with_added_tokens=True)
    return {field: ids[token] for field, token in SPECIAL_TOKENS.items()}


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Return one more than the largest id: the rows that an embedding needs.

    Args:
        tokenizer: A tokenizer. The vocabulary of one from another library may have gaps.

    Returns:
        The number of rows.

    Example:
        ```python
        from gpt_fast import data

        print(data.vocabulary_size(data.make_tokenizer("byte", [], 0)))  # 261
        ```
    """
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def has_lone_surrogate(text: str) -> bool:
    """Return True if `text` holds half of a surrogate pair, which UTF-8 cannot write."""
    return not text.isascii() and _SURROGATE.search(text) is not None


def without_lone_surrogates(text: str) -> str:
    """Return `text` with U+FFFD in the place of each half of a surrogate pair."""
    return _SURROGATE.sub("\ufffd", text) if has_lone_surrogate(text) else text


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a text without any special token. Half of a surrogate pair is read as U+FFFD."""
    return tokenizer.encode(without_lone_surrogates(text), add_special_tokens=False).ids


def encode_documents(tokenizer: Tokenizer, texts: Iterable[str], chunk: int = 256) -> Iterator[list[int]]:
    """Yield the ids of each text, without any special token.

    Texts are encoded on all cores. A long text is cut into pieces where its tokens stay the same, as in `prepare`. Half
    of a surrogate pair is read as U+FFFD.

    Args:
        tokenizer: A tokenizer.
        texts: Texts.
        chunk: Number of pieces that are encoded at a time.

    Yields:
        Ids of one text.

    Example:
        ```python
        from gpt_fast import data

        tokenizer = data.make_tokenizer("byte", [], 0)
        print(list(data.encode_documents(tokenizer, ["ab", "c"])))  # [[97, 98], [99]]
        ```
    """
    document: list[int] | None = None
    for begins, ids in encoded_pieces(tokenizer, texts, chunk):
        if document is None:
            document = ids
        elif begins:
            yield document
            document = ids
        else:
            document += ids
    if document is not None:
        yield document


def encoded_pieces(tokenizer: Tokenizer, texts: Iterable[str], chunk: int = 256) -> Iterator[tuple[bool, list[int]]]:
    """Yield (True if a text begins here, ids) for each piece of each text.

    One encoding takes 150 bytes and more for each byte of its text, so a long text is not encoded whole.
    """
    keeps = keeps_tokens(tokenizer)
    batch: list[tuple[bool, str]] = []
    length = 0
    for text in texts:
        parts = pieces(iter([without_lone_surrogates(text)]), keeps) if text else iter([""])
        for begins, part in zip(chain([True], repeat(False)), parts, strict=False):
            batch.append((begins, part))
            length += len(part)
            if len(batch) == chunk or length >= _BATCH_TEXT:
                yield from _encoded(tokenizer, batch)
                batch, length = [], 0
    yield from _encoded(tokenizer, batch)


def _encoded(tokenizer: Tokenizer, batch: list[tuple[bool, str]]) -> Iterator[tuple[bool, list[int]]]:
    encodings = tokenizer.encode_batch_fast([text for _, text in batch], add_special_tokens=False)
    for (begins, _), encoding in zip(batch, encodings, strict=True):
        yield begins, encoding.ids


def decode(tokenizer: Tokenizer, ids: Sequence[int], *, special: bool = True) -> str:
    """Return the text of `ids`. Special tokens are written out, or left out with `special=False`."""
    return tokenizer.decode(ids, skip_special_tokens=not special)


def added_text(tokenizer: Tokenizer, before: Sequence[int], new: Sequence[int]) -> str:
    """Return what the tokens `new` add to the text of the tokens `before`; special tokens are left out.

    Tokenizers whose words carry no space (GPT-1's, WordPiece, SentencePiece) put one between words when they decode, so
    that the text of `new` alone has lost its first space.
    """
    text, start = (decode(tokenizer, ids, special=False) for ids in ([*before, *new], before))
    return text[len(shared_start(text, start)) :]


def shared_start(one: str, other: str) -> str:
    """Return the characters with which both texts begin."""
    if other.startswith(one):
        return one
    return one[: next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(other))]


def keeps_text(tokenizer: Tokenizer) -> bool:
    """Return True if a further token never changes the text of those before it, but for bytes of one character."""
    return isinstance(tokenizer.decoder, (decoders.ByteLevel, decoders.Fuse))


def _words_tokenizer(words: Sequence[str]) -> Tokenizer:
    """Return a tokenizer that cuts text into characters, whose ids are their places in `words`."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return _finish(tokenizer)


def _finish(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))
    tokenizer.encode_special_tokens = True  # not part of tokenizer.json: set on every load
    return tokenizer


def _byte_letters() -> list[str]:
    """Return the printable letter by which byte-level tokenizers write each byte.

    The letter is the byte's own where Latin-1 prints it, else the next free code point from 256 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    free = iter(range(256, 512))
    return [chr(byte if byte in printable else next(free)) for byte in range(256)]
