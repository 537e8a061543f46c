"""The settings of fine-tuning."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import ClassVar, Literal

from .declaration import option
from .training import DATA, RUN, TRAINING, Count, Decay, NotNegative, Repeats, TrainingSettings


class FinetuneSettings(TrainingSettings):
    """Options of `gpt-fast finetune`.

    The defaults are those of the GPT-1 paper. A learning rate that is None is the paper's for models of the published
    sizes, and a quarter of the rate in pre-training for others. A column that is None is named by the task.
    """

    command: ClassVar[str] = "finetune"

    source: Path = option(..., "Run folder of the pre-trained model.", panel=RUN)
    train: Path | None = option(
        None,
        "Labelled table: .csv, .tsv, .jsonl, .json or .parquet. Without it: snippets of Python's standard "
        "library, to be told apart by the package that they come from.",
        panel=DATA,
        metavar="FILE",
        also="--data",
    )
    valid: Path | None = option(
        None, "Table to validate on; without it a tenth of --train's rows.", panel=DATA, metavar="FILE"
    )
    folds: int | None = option(
        None,
        "Divide --train into so many parts with equal shares of each class, and train a run for each part, which "
        "validates on it: OUT/fold-1 and so on.",
        panel=DATA,
        ge=2,
        le=10_000,
    )
    fold: Count | None = option(None, "Train the run of this one of --folds alone, counted from 1.", panel=DATA)
    seeds: Repeats | None = option(
        None,
        "Train so many runs, with --seed and the seeds behind it: OUT/seed-0 and so on. Mean and spread are printed.",
        panel=TRAINING,
        resume="command",
    )
    rows: Count | None = option(None, "Train on this many rows, drawn by --seed, and not on all.", panel=DATA)
    text_column: str | None = option(
        None,
        "Column with the text: text; premise, sentence1, question, tokens, prompt or context by the task. Columns with "
        "commas between them are joined.",
        panel=DATA,
    )
    pair_column: str | None = option(
        None,
        "Column with the second text: hypothesis, sentence2 or question by the task. For multiple-choice the answers: "
        "columns with commas between them, or one of lists (choices).",
        panel=DATA,
    )
    label_column: str | None = option(
        None, "Column with the label (label), the labels, the tags or the answer.", panel=DATA
    )
    labels: str | None = option(
        None,
        "The classes in their order, with commas between them. Without it the whole label column decides: numbers by "
        "value, texts sorted.",
        panel=DATA,
    )
    skip_label: tuple[str, ...] = option(
        (), "Skip rows with this label, such as -1; '' for blank ones. May be repeated.", panel=DATA, metavar="LABEL"
    )
    answers: str | None = option(
        None,
        "How the column of a multiple choice names an answer: by its text, by letters, or by numbers that count from 0 "
        "or 1. Without it the whole column decides.",
        panel=DATA,
        metavar="text|letters|0|1",
    )
    columns: str | None = option(
        None, "Names of the columns of a .csv or .tsv without a header line, with commas between them.", panel=DATA
    )
    skip_ragged: bool = option(
        False,
        "Skip rows with another number of fields than the header, or of choices than most rows, and tell which.",
        panel=DATA,
    )
    scratch: bool = option(
        False,
        "Take sizes and tokenizer alone and draw the weights anew: what does pre-training bring?",
        panel=TRAINING,
    )
    task: str = option(
        "classification",
        "classification, entailment, similarity, multiple-choice, multi-label, token-classification, regression, "
        "answer-span, generation or question-answering.",
        panel=TRAINING,
        metavar="TASK",
    )
    numbers: bool = option(False, "Similarity as a number, by its squared error.", panel=TRAINING)
    convertible: bool = option(
        False,
        "Give the classifier no bias, as transformers' has none, so that gpt-fast convert can turn the run into its.",
        panel=TRAINING,
    )
    class_weights: str | None = option(
        None,
        "Weigh each class in the loss: balanced, inversely to its rows, or numbers in the order of the classes. For "
        "several labels a row, what the rows that have a label count for.",
        panel=TRAINING,
        metavar="balanced|W,W,…",
    )
    freeze: str | None = option(
        None,
        "Train nothing of the trunk, of the embeddings, or of the embeddings and the first N decoders.",
        panel=TRAINING,
        metavar="trunk|embeddings|N",
    )
    layer_decay: float = option(
        1.0,
        "Each decoder's rate is this times that of the one above, and the embeddings' this times the first one's.",
        panel=TRAINING,
        gt=0,
        le=1,
    )
    lora_rank: Count | None = option(
        None,
        "Train a LoRA adapter of this rank, by PEFT, and not the trunk's own weights. The run folder holds the "
        "adapter; gpt-fast convert merges it.",
        panel=TRAINING,
    )
    lora_alpha: float | None = option(
        None, "The adapter counts alpha / rank times; twice the rank unless given.", panel=TRAINING, gt=0
    )
    epochs: Count = option(3, "Passes over the table. --resume takes more than before.", panel=TRAINING, resume="more")
    patience: Count | None = option(
        None,
        "End after so many validations in a row without a better one; without it all epochs are trained.",
        panel=TRAINING,
        resume="free",
    )
    metric: str | None = option(
        None,
        "What validation chooses the best weights by, and --patience waits for: accuracy, macro_f1, micro_f1, "
        "matthews, mse, pearson, spearman, word_f1, exact_match or loss, by the task. Without it accuracy, micro_f1, "
        "mse, word_f1 or loss.",
        panel=TRAINING,
        metavar="NAME",
    )
    valid_every: Count | None = option(
        None, "Updates between validations; a fifth of all unless given.", panel=TRAINING, resume="free"
    )
    batch_size: Count = option(32, "Rows in an update.", panel=TRAINING)
    lr: NotNegative | None = option(
        None, "Peak learning rate; 6.25e-5, a quarter of pre-training's for models without a preset.", panel=TRAINING
    )
    schedule: Literal["cosine", "wsd", "linear", "constant"] = option(
        "linear",
        "After a warm-up over 0.2 % of the updates: along a line to 0, along half a cosine, flat and then down at the "
        "end (wsd), or flat.",
        panel=TRAINING,
    )
    lm_weight: NotNegative = option(0.5, "λ of the joint loss: task + λ · language model.", panel=TRAINING)
    weight_decay: NotNegative | None = option(0.01, "Of matrices; nothing else decays.", panel=TRAINING)
    beta1: Decay | None = option(0.9, "Of AdamW: the first moment's memory.", panel=TRAINING)
    beta2: Decay | None = option(0.999, "The second moment's.", panel=TRAINING)

    def resume_command(self, ranks: int = 1) -> str:
        """Return "gpt-fast finetune --from SOURCE --out OUT --resume", which resumes this run, for a message.

        The paths are quoted for a shell. `ranks` is the number of ranks that ran it. For more than one, return "the
        same torchrun command with --resume".
        """
        command = super().resume_command(ranks)
        return command.replace(" --out ", f" --from {shlex.quote(str(self.source))} --out ", 1)
