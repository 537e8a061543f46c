"""Schemas of run.json, a checkpoint's record and metrics.jsonl: each name with the type of its value."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from gpt_fast_settings.declaration import describe

Count = Annotated[int, Field(ge=0, lt=2**63)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
TaskName = Literal[
    "classification", "entailment", "similarity", "multiple-choice", "multi-label", "token-classification",
    "regression", "answer-span", "generation", "question-answering",
]  # fmt: skip
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_MEASURED = re.compile(r"(valid|majority|mean)_\w+")  # metrics of the task, and of its baselines


class Schema(BaseModel):
    """Values are taken as they are, never converted; other names than those declared are errors."""

    model_config = ConfigDict(strict=True, extra="forbid")


class Weights(Schema):
    bytes: Count
    sha256: Sha256


class Lora(Schema):
    """Facts about a LoRA adapter that a merge of it needs."""

    rank: Annotated[int, Field(ge=1, lt=2**31)]
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    base_sha256: Sha256


class Columns(Schema):
    """The fields of `tasks.TaskSettings`."""

    name: TaskName
    text_column: str
    pair_columns: list[str]
    label_column: str
    numbers: bool
    labels: list[str] = []
    skip_labels: list[str] = []
    answers: Literal["text", "letters", "0", "1"] | None = None


class Record(Schema):
    """A run's record. Fields that no version has always written have a default."""

    model_config = ConfigDict(strict=True, extra="allow")

    command: Literal["pretrain", "finetune"] = "pretrain"
    objective: Literal["clm", "mlm"] | None = None
    task: TaskName | None = None
    columns: Columns | None = None
    source: str | None = Field(None, alias="from")
    scratch: bool = False
    data: str | None = None
    labels: list[str] = []
    tokenizer: str | None = None
    preset: str | None = None
    optimizer: str | None = None
    schedule: str | None = None
    lr: Finite | None = None
    beta1: Finite | None = None
    beta2: Finite | None = None
    weight_decay: Finite | None = None
    final_lr: Finite | None = None
    lm_weight: Finite | None = None
    train_tokens: Count = 0
    valid_tokens: Count = 0
    train_rows: Count = 0
    valid_rows: Count = 0
    steps: Count = 0
    epochs: Count = 0
    best_step: Count | None = None
    last_step: Count | None = None
    metric: str | None = None
    parameters: Count = 0
    train_loss: Finite | None = None
    unigram_entropy: Finite | None = None
    batch_size: Count = 0
    seed: int = 0
    device: str = "cpu"
    precision: str = "float32"
    torch: str = ""
    seconds: Finite | None = None
    skipped: Count = 0
    spikes: Count = 0
    ranks: Count = 1
    strategy: Literal["ddp", "fsdp"] | None = None
    weights: Weights | None = None
    lora: Lora | None = None

    @model_validator(mode="after")
    def _only_metrics_besides(self) -> Record:
        """Return the record. Raise an error for an unknown name, and for a fine-tuned run without "task" or "columns".

        A name that the schema does not declare is known if it is a metric's: it begins with "valid_", "majority_" or
        "mean_". The value of a metric has to be a number or None. The errors are pydantic's.
        """
        for name, value in (self.model_extra or {}).items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if _MEASURED.fullmatch(name) is None:
                raise PydanticCustomError("unknown", "unknown name {name}", {"name": repr(name)})
            if value is not None and not number:
                raise PydanticCustomError("metric", "{name} is no number", {"name": name})
        if self.command == "finetune" and (self.task is None or self.columns is None):
            raise PydanticCustomError("task", "a fine-tuned run without task and columns")
        return self


class Spikes(Schema):
    count: Count
    mean: float
    variance: float


class State(Schema):
    """The fields of `loop.LoopState`, the data's identity and the run's record so far. A loss may be NaN."""

    step: Count
    losses: list[float]
    skipped: Count
    skipped_in_a_row: Count
    spikes: Spikes
    spike_count: Count
    tokens: Count
    seconds: float
    metrics_bytes: Count
    line: dict[str, float]
    best: list[float] | None
    best_metrics: dict[str, float]
    stale: Count = 0
    data: dict[str, int]
    record: Record = Field(default_factory=lambda: Record.model_validate({}))


class Manifest(Schema):
    """checkpoint.json without the checksum of itself."""

    format: str
    step: Count
    ranks: Annotated[int, Field(ge=1, lt=2**31)]
    state: State
    files: dict[str, Annotated[list[Any], Field(min_length=2, max_length=2)]]


class Line(Schema):
    """A line of metrics.jsonl: numbers, or null for one that is not finite."""

    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, Finite | None] = Field(init=False)

    step: Count


def check(path: Path | str, schema: type[Schema], values: Any) -> None:
    """Raise `ValueError` unless `values`, the content of the file `path`, fit `schema`, a class of this module.

    The message names the file, the first two values that are wrong, and the number of the others.
    """
    try:
        schema.model_validate(values)
    except ValidationError as error:
        found = error.errors(include_url=False)
        more = f"; {len(found) - 2} more" if len(found) > 2 else ""
        raise ValueError(f"{path}: {'; '.join(map(describe, found[:2]))}{more}") from None
