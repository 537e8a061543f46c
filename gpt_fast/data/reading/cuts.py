"""Places where a text can be cut so that the tokens of its parts are the tokens of the whole.

Byte-level BPE first splits text into words. GPT-2's rule gives the last white-space character of a run to the word
behind it, and begins a word where letters or digits follow a mark. Both are places where no token crosses. Other
tokenizers may split otherwise: `keeps_tokens` asks them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from tokenizers import Tokenizer

Keeps = Callable[[str, int], bool]
PIECE = 1 << 15  # characters that are tokenised at once
WINDOW = 1 << 16  # bytes in which a place is looked for
_TRIES = 16  # places that a tokenizer is asked about
_CONTEXT = 64  # characters on each side that it sees

_LINE_ENDS = frozenset("\n\v\f\r\x85\u2028\u2029")
_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # \s of the tokenizers' regular expressions
_SPACES = frozenset(chr(c) for c in range(0x3001) if re.match(f"[{_SPACE}]", chr(c)))
_SENTENCE_ENDS = frozenset(".!?…。！？｡।؟")
_CLOSERS = frozenset("\"')]}»”’」』）】》")
_LAST_SPACE = re.compile(f"[{_SPACE}](?=[^{_SPACE}])")
# An apostrophe is no such mark: it can begin a word such as 's.
_BEHIND_MARK = re.compile(rf"(?<=[^\w{_SPACE}'])(?=[^\W_])")


def keeps_tokens(tokenizer: Tokenizer) -> Keeps:
    """Return a function `keeps(text, place)`: True if cutting `text` at index `place` changes no token near the cut.

    The function encodes up to 64 characters on each side of the cut with `tokenizer`, together and apart, and compares
    the ids.
    """

    def keeps(text: str, place: int) -> bool:
        """Return True if cutting `text` at index `place` leaves the ids of up to 64 characters on each side unchanged.

        `text[place]` is the first character behind the cut. The tokenizer is the argument of `keeps_tokens`.
        """
        before, after = text[max(0, place - _CONTEXT) : place], text[place : place + _CONTEXT]
        whole, *parts = (
            tokenizer.encode(part, add_special_tokens=False).ids for part in (before + after, before, after)
        )
        return whole == parts[0] + parts[1]

    return keeps


def next_place(text: str, keeps: Keeps | None = None) -> int | None:
    """Return the best index at which to cut `text` so that no token changes, or None if none is found.

    `text[index]` is the first character behind the cut. The best is the first cut at a line end, else behind a
    sentence, else at any white space, else between a punctuation mark and a word. At white space, the cut is in front
    of its last character, which then begins the word behind. `keeps(text, index)`, if given, must return True for the
    index (see `keeps_tokens`). It is called for 16 indices of each of these four kinds at most. The index 0 is never
    returned.
    """
    spaces = [found.start() for found in _LAST_SPACE.finditer(text, 1)]
    marks = [found.start() for found in _BEHIND_MARK.finditer(text, 1)]
    for kind in (
        (place for place in spaces if _ends_line(text, place)),
        (place for place in sorted(spaces + marks) if _ends_sentence(text, place)),
        spaces,
        marks,
    ):
        for place, _ in zip(kind, range(_TRIES), strict=False):
            if keeps is None or keeps(text, place):
                return place
    return None


def last_place(text: str, keeps: Keeps | None = None) -> int | None:
    """Return the last index at which `text` can be cut so that no token changes, or None if none is found.

    `text[index]` is the first character behind the cut. It is the last white-space character in front of a word, else
    the beginning of the last word directly behind a punctuation mark. `keeps(text, index)`, if given, must return True
    for the index (see `keeps_tokens`). It is called only for the last 16 indices of each kind, first among the last
    2,048 characters and then in the whole text. The index 0 is never returned.
    """
    for pattern in (_LAST_SPACE, _BEHIND_MARK):
        for first in (max(1, len(text) - 2048), 1):
            places = [found.start() for found in pattern.finditer(text, first)]
            for place in places[: -_TRIES - 1 : -1]:
                if keeps is None or keeps(text, place):
                    return place
    return None


def pieces(texts: Iterator[str], keeps: Keeps | None = None, size: int | None = None) -> Iterator[str]:
    """Yield the concatenation of `texts` in pieces of at most `size` characters (32,768 if it is None).

    A piece ends at the index that `last_place` finds in its `size` characters, where a cut changes no token. If there
    is none, the piece has `size` characters. `keeps(text, index)`, if given, tests an index: it returns True if a cut
    there changes no token. The last piece is the rest of the text. An empty text yields nothing.
    """
    size = PIECE if size is None else size
    rest = ""
    for text in texts:
        rest += text
        begin = 0
        while len(rest) - begin > size:  # one character more than a piece: a cut needs what follows it
            window = rest[begin : begin + size]
            place = last_place(window, keeps) or len(window)
            yield window[:place]
            begin += place
        rest = rest[begin:]
    if rest:
        yield rest


def _ends_line(text: str, place: int) -> bool:
    """Return True if the run of white space whose last character is `text[place]` contains a line end.

    Return False if `text[place]` is no white space.
    """
    while place >= 0 and text[place] in _SPACES:
        if text[place] in _LINE_ENDS:
            return True
        place -= 1
    return False


def _ends_sentence(text: str, place: int) -> bool:
    """Return True if a sentence ends at index `place`.

    It ends with a mark such as a full stop, behind which closing quotes or brackets may stand. If `text[place]` is
    white space, the sentence has to end in front of this run of white space. Otherwise it has to end directly in front
    of `place`, with a mark beyond ASCII such as the Chinese full stop.
    """
    spaced = text[place] in _SPACES
    while place > 0 and text[place] in _SPACES:
        place -= 1
    place -= not spaced
    while place > 0 and text[place] in _CLOSERS:
        place -= 1
    # Without white space only marks such as the Chinese ones end a sentence: 3.14 has none.
    return text[place] in _SENTENCE_ENDS and (spaced or text[place] > "\u05ff")
