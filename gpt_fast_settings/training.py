"""Settings that pre-training and fine-tuning share."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from .declaration import Settings, option

RUN, DATA, MODEL, TRAINING = PANELS = ("Run", "Data", "Model", "Training")
Count = Annotated[int, Field(ge=1, lt=2**63)]
Repeats = Annotated[int, Field(ge=1, le=10_000)]  # runs, each in a folder of its own
NotNegative = Annotated[float, Field(ge=0)]
Size = Annotated[int, Field(ge=1, le=2**28)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class TrainingSettings(Settings):
    """Options that every training has. A field without `option` here is declared by each training itself."""

    command: ClassVar[str]  # its name on the command line

    def resume_command(self, ranks: int = 1) -> str:
        """Return "gpt-fast COMMAND --out OUT --resume", which resumes this run, for a message.

        The path is quoted for a shell. `ranks` is the number of ranks that ran it. For more than one, return "the same
        torchrun command with --resume".
        """
        if ranks > 1:
            return "the same torchrun command with --resume"
        return f"gpt-fast {self.command} --out {shlex.quote(str(self.out))} --resume"

    out: Path = option(..., "Run folder to create.", panel=RUN, resume="command")
    log_every: Count | None = option(
        None, "Updates between lines of metrics.jsonl; some fifty lines a run.", panel=RUN, resume="free"
    )
    checkpoint_every: Count = option(1000, "Updates between checkpoints.", panel=RUN, resume="free")
    keep_checkpoints: Count = option(3, "How many checkpoints to keep.", panel=RUN, resume="free")
    tensorboard: bool = option(False, "Write tensorboard/ into the run folder, too.", panel=RUN, resume="free")
    tracker: Literal["wandb", "mlflow"] | None = option(
        None,
        "Log to wandb or MLflow, too: into the run folder, or to a server that their own environment variables name.",
        panel=RUN,
        resume="free",
    )
    profile: bool = option(
        False,
        "Write profile.json into the run folder: a trace of three early updates, for Chrome or ui.perfetto.dev.",
        panel=RUN,
        resume="free",
    )
    overwrite: bool = option(False, "Replace the run in --out.", panel=RUN, resume="command")
    resume: bool = option(
        False,
        "Resume from the last good checkpoint in --out; start if there is none, end if the run is finished.",
        panel=RUN,
        resume="command",
    )
    batch_size: Count
    lr: NotNegative | None
    weight_decay: NotNegative | None
    beta1: Decay | None
    beta2: Decay | None
    accumulate: Count = option(
        1, "Parts that an update's batch is computed in, for less memory.", panel=TRAINING, resume="free"
    )
    optimizer: Literal["adamw", "muon"] = option(
        "adamw",
        "adamw for all weights, or muon for the matrices inside the decoders and AdamW for all others: embeddings, "
        "norms, biases and the output layer.",
        panel=TRAINING,
    )
    muon_lr: NotNegative | None = option(
        None, "Peak learning rate of Muon's matrices; --lr, which AdamW's weights have.", panel=TRAINING
    )
    schedule: Literal["cosine", "wsd", "linear", "constant"]
    decay: float = option(
        0.2, "Share of all updates, the last ones, over which --schedule wsd falls.", panel=TRAINING, gt=0, le=1
    )
    z_loss: NotNegative = option(
        0.0,
        "Weight of the squared log of the softmax's denominator in the language model's loss; 0 is off.",
        panel=TRAINING,
    )
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.", panel=TRAINING, gt=0)
    precision: Literal["float32", "bfloat16", "float16"] = option(
        "float32", "The type that products are computed in, by autocast; float16 with a loss scale.", panel=TRAINING
    )
    compile: bool = option(False, "Run through torch.compile.", panel=TRAINING, resume="free")
    checkpoint_activations: bool = option(
        False,
        "Compute each decoder again in backward instead of storing what is inside it.",
        panel=TRAINING,
        resume="free",
    )
    max_skips: int = option(
        10,
        "Updates in a row whose loss or gradient may be infinite or NaN; they are skipped.",
        panel=TRAINING,
        resume="free",
        ge=0,
    )
    seed: int = option(0, "Of new weights, batches and dropout.", panel=TRAINING, ge=0, lt=2**63)
    strategy: Literal["ddp", "fsdp"] | None = option(
        None, "Under torchrun: every rank holds the whole model, or a share of it.", panel=TRAINING, resume="machine"
    )
    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "Where to run; auto takes a GPU if there is one.", panel=RUN, resume="machine"
    )
