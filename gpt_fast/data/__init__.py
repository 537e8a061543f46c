"""Text, tables and tokenizers, turned into the integer tensors that the heads take.

`tokenizer` maps text to ids and back, `reading` reads every kind of file, `corpus` plain text, `tables` labelled rows
(`labels` what their label columns mean), `snippets` makes the labelled table that fine-tuning falls back on,
`token_files` and `prepare` keep text as files of ids, `stream` shuffles windows of them, `batches` and
`example_batches` cut and pad, `masking` hides tokens for the masked language model.
"""

from .batches import Batch, lm_windows, token_stream, unigram_entropy
from .corpus import Corpus, Document, read_corpus
from .example_batches import Example, Marks, task_batches, task_input
from .masking import mask_tokens
from .snippets import snippet_table
from .stream import TokenStream
from .tables import Table, TableOptions, read_table
from .tokenizer import (
    SPECIAL_TOKENS,
    encode_documents,
    load_tokenizer,
    make_tokenizer,
    save_tokenizer,
    vocabulary_size,
)

__all__ = [
    "SPECIAL_TOKENS",
    "Batch",
    "Corpus",
    "Document",
    "Example",
    "Marks",
    "Table",
    "TableOptions",
    "TokenStream",
    "encode_documents",
    "lm_windows",
    "load_tokenizer",
    "make_tokenizer",
    "mask_tokens",
    "read_corpus",
    "read_table",
    "save_tokenizer",
    "snippet_table",
    "task_batches",
    "task_input",
    "token_stream",
    "unigram_entropy",
    "vocabulary_size",
]
