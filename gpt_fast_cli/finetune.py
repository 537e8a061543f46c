"""`gpt-fast finetune`"""

from __future__ import annotations

from gpt_fast_settings.finetune import FinetuneSettings

from . import options
from .terminal import AsJson, metric_rows, print_table


@options.from_settings(FinetuneSettings)
def finetune(settings: FinetuneSettings, as_json: AsJson = False) -> None:
    """Trains a pre-trained model for a task, on a labelled table.

    A row is put as start, text, extract, a pair with a delimiter between its texts; a new layer reads the last hidden
    state of the extract token. Similarity reads a pair in both orders, multiple choice scores one sequence for each
    answer. Generation and question answering train the model itself to write the answer. Text beyond the model's
    positions is cut off. The weights of the best validation are kept.

    [bold]Examples[/bold]

    gpt-fast finetune --from runs/lm --out runs/packages

    gpt-fast finetune --from runs/lm --train reviews.csv --valid held_out.csv --label-column stars --out runs/reviews

    gpt-fast finetune --from runs/lm --train essays.tsv --task regression --label-column grade --out runs/grades

    gpt-fast finetune --from runs/lm --train nli.jsonl --task entailment --out runs/nli

    gpt-fast finetune --from runs/lm --train quiz.csv --task multiple-choice --pair-column a,b,c,d --out runs/quiz
    """
    from gpt_fast.training.finetune import finetune as train

    record = options.train("fine-tuning", train, settings, as_json)
    if record is None:
        return
    measured = {name.removeprefix("valid_"): value for name, value in record.items() if name not in ("valid_rows",)}
    lines = metric_rows(measured)
    lines += [("time", f"{record['seconds']:.0f} s"), ("run folder", options.run_folder(settings.out))]
    print_table("fine-tuned, on held-out rows", lines)
