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
    """Make a tokenizer of a kind, or load one from a file.

    Args:
        kind: "bpe" and "char" learn their vocabulary from `texts`, and "byte" needs none. Anything else is the path of
            a tokenizer.json, or of the folder that holds one.
        texts: Texts to learn from, in which half of a surrogate pair is read as U+FFFD. "byte" and a file ignore them.
        vocab_size: Largest vocabulary of "bpe", special tokens included. The other kinds ignore it.

    Returns:
        A `tokenizers.Tokenizer` with the five special tokens.

    Raises:
        FileNotFoundError: The folder holds no tokenizer.json.
        ValueError: The kind is unknown or the path does not exist, the file is no tokenizer, or `vocab_size` of "bpe"
            is too small for the 256 bytes and the special tokens.

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
    """Raise `ValueError` if `kind` is neither a kind of tokenizer ("bpe", "byte" or "char") nor an existing path.

    A path may lead to a file or a folder, whose content is not read.

    Raises:
        ValueError: `kind` is neither.
    """
    if kind not in KINDS and (not kind.strip() or not Path(kind).exists()):
        raise ValueError(
            f"--tokenizer {kind!r}: no such file; expected {', '.join(KINDS)} or the path of a tokenizer.json"
            f"{did_you_mean(kind, KINDS)}"
        )


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of at most `vocab_size` tokens on `texts`. Its special tokens have the ids 0 to 4.

    A pair of tokens has to occur twice to be merged. Any text without lone surrogates can be encoded, and decoding its
    ids gives it back exactly.

    Returns:
        The trained tokenizer.

    Raises:
        ValueError: `vocab_size` is too small for the 256 bytes and the special tokens.
    """
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
    """Return a tokenizer with one token for each UTF-8 byte, whose id is the byte. Special tokens are 256 to 260."""
    vocabulary = {letter: byte for byte, letter in enumerate(_byte_letters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _finish(tokenizer)


def char_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Return a tokenizer with one token for each character of `texts`. Other characters become `<|unk|>`.

    The five special tokens have the ids 0 to 4, and `<|unk|>` has 5. The characters follow in the order of their code
    points.
    """
    return _words_tokenizer([*SPECIAL_TOKENS.values(), UNKNOWN, *sorted(set().union(*texts))])


def letters_tokenizer(letters: Sequence[str]) -> Tokenizer:
    """Return a tokenizer for another library's character-level model. A character's id is its index in `letters`.

    `<|unk|>`, which stands for any other character, has the id `len(letters)`, and the five special tokens follow. The
    other library's model has no embeddings for these six.
    """
    return _words_tokenizer([*letters, UNKNOWN])


def load_tokenizer(path: Path) -> Tokenizer:
    """Load the tokenizer in a tokenizer.json, or in the folder that holds one.

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
    """Return the tokenizer whose tokenizer.json has the content `text`.

    The tokenizer neither truncates nor pads, even if tokenizer.json says so. The special tokens of `SPECIAL_TOKENS`
    that it lacks are added behind its own vocabulary. A text that is no tokenizer.json raises the exception of
    `Tokenizer.from_str`.
    """
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
    """Return {name: id} of the five special tokens, by the names of their fields in `GPTConfig`.

    The names are pad_token, mask_token, start_token, delimiter_token and extract_token. Raise `KeyError` if the
    tokenizer lacks one of the tokens.
    """
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
    """Return True if `text` holds half of a surrogate pair (U+D800 to U+DFFF), which UTF-8 cannot write."""
    return not text.isascii() and _SURROGATE.search(text) is not None


def without_lone_surrogates(text: str) -> str:
    """Return `text` with U+FFFD in the place of each half of a surrogate pair."""
    return _SURROGATE.sub("\ufffd", text) if has_lone_surrogate(text) else text


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a text without any special token. Half of a surrogate pair is encoded as U+FFFD."""
    return tokenizer.encode(without_lone_surrogates(text), add_special_tokens=False).ids


def encode_documents(tokenizer: Tokenizer, texts: Iterable[str], chunk: int = 256) -> Iterator[list[int]]:
    """Yield the ids of each text, without any special token.

    Texts are encoded on all cores. A long text is cut into pieces at places that change no token. Half of a surrogate
    pair is read as U+FFFD.

    Args:
        tokenizer: A tokenizer.
        texts: Texts.
        chunk: Largest number of pieces that are encoded at a time.

    Yields:
        Ids of one text, in the order of `texts`; [] for an empty text.

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
    """Yield (begins, ids) for each piece of each text, where `begins` is True if a text begins with this piece.

    A long text is cut into pieces at places that change no token, because one encoding takes 150 bytes and more for
    each byte of its text. A short text is one piece, and an empty text is (True, []). Special tokens are not added.
    Half of a surrogate pair is read as U+FFFD. `chunk` is the largest number of pieces that are encoded at a time.

    Yields:
        The pair for one piece.
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
    """Yield (begins, ids) for each (begins, text) of `batch`. All texts are encoded at once, without special tokens."""
    encodings = tokenizer.encode_batch_fast([text for _, text in batch], add_special_tokens=False)
    for (begins, _), encoding in zip(batch, encodings, strict=True):
        yield begins, encoding.ids


def decode(tokenizer: Tokenizer, ids: Sequence[int], *, special: bool = True) -> str:
    """Return the text of `ids`. Special tokens are written out, such as `<|pad|>`, or skipped if `special` is False."""
    return tokenizer.decode(ids, skip_special_tokens=not special)


def added_text(tokenizer: Tokenizer, before: Sequence[int], new: Sequence[int]) -> str:
    """Return the text by which the ids `new` extend the text of the ids `before`. Special tokens are skipped.

    Decoding `new` alone is not enough: tokenizers whose words carry no space (GPT-1's, WordPiece, SentencePiece) put a
    space between words when they decode, so the first space would be lost.

    Returns:
        The decoded text of `before` and `new` together, without the longest beginning that it shares with the decoded
        text of `before` alone.
    """
    text, start = (decode(tokenizer, ids, special=False) for ids in ([*before, *new], before))
    return text[len(shared_start(text, start)) :]


def shared_start(one: str, other: str) -> str:
    """Return the longest text with which both `one` and `other` begin."""
    if other.startswith(one):
        return one
    return one[: next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(other))]


def keeps_text(tokenizer: Tokenizer) -> bool:
    """Return True if appending ids to any sequence of ids only appends to the text that the tokenizer decodes it to.

    There is one exception: a character at the end of the text may change if the sequence lacks some of its bytes.

    Returns:
        True for the decoders ByteLevel and Fuse, False for any other, such as those that put spaces between words.
    """
    return isinstance(tokenizer.decoder, (decoders.ByteLevel, decoders.Fuse))


def _words_tokenizer(words: Sequence[str]) -> Tokenizer:
    """Return a tokenizer that cuts text into single characters, whose ids are their indices in `words`.

    Characters that `words` lacks become `<|unk|>`, which `words` has to contain. Special tokens that `words` lacks are
    added with the ids behind it.
    """
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return _finish(tokenizer)


def _finish(tokenizer: Tokenizer) -> Tokenizer:
    """Return `tokenizer` itself, to which this function adds the special tokens that it lacks, in place.

    The tokenizer then encodes text that spells a special token, such as `<|pad|>`, as ordinary text.
    """
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))
    tokenizer.encode_special_tokens = True  # not part of tokenizer.json: set on every load
    return tokenizer


def _byte_letters() -> list[str]:
    """Return the 256 printable characters by which byte-level tokenizers write the bytes 0 to 255, in this order.

    A byte's character is its own in Latin-1 if that is printable and no space, else the next free code point from 256
    on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    free = iter(range(256, 512))
    return [chr(byte if byte in printable else next(free)) for byte in range(256)]
