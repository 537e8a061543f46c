"""The command `gpt-fast finetune`."""

from __future__ import annotations

from typing import Any

from gpt_fast_settings.finetune import FinetuneSettings

from . import options
from .terminal import AsJson, metric_rows, print_table


def _print_spread(summary: dict[str, Any], settings: FinetuneSettings) -> None:
    """Print a table with mean, standard deviation and range of each metric over several fine-tuned runs.

    `summary` is the content of repeats.json: `metrics` maps names to {mean, sd, min, max}, and `runs` lists the runs.
    The metric "examples" is left out. `settings.out` is the folder that holds repeats.json.
    """
    rows = [("", "mean ± sd (smallest to largest)")]
    for name, of in summary["metrics"].items():
        if name != "examples":
            rows.append((name.replace("_", " "), "{mean:.3f} ± {sd:.3f} ({min:.3f} to {max:.3f})".format(**of)))
    rows.append(("run folders", f"{settings.out}, with the figures in repeats.json"))
    print_table(f"fine-tuned {len(summary['runs'])} times, on held-out rows", rows)


@options.from_settings(FinetuneSettings)
def finetune(settings: FinetuneSettings, as_json: AsJson = False) -> None:
    """Train a pre-trained model for a task, on a labelled table, and write a run folder.

    A row becomes the tokens start, text, extract; a pair has a delimiter between its texts. A new layer reads the last
    hidden state of the extract token. Similarity reads a pair in both orders, multiple choice scores one sequence for
    each answer. Generation and question answering train the model itself to write the answer. Text beyond the model's
    positions is cut off. The weights of the best validation are kept, and its metrics are printed. Of several runs,
    such as [bold]--folds[/bold], their mean and spread are printed.

    [bold]Examples[/bold]

    gpt-fast finetune --from runs/lm --out runs/packages

    gpt-fast finetune --from runs/lm --train reviews.csv --valid held_out.csv --label-column stars --out runs/reviews

    gpt-fast finetune --from runs/lm --train essays.tsv --task regression --label-column grade --out runs/grades

    gpt-fast finetune --from runs/lm --train nli.jsonl --task entailment --out runs/nli

    gpt-fast finetune --from runs/lm --train reviews.csv --folds 5 --patience 3 --out runs/folds

    gpt-fast finetune --from runs/lm --train quiz.csv --task multiple-choice --pair-column a,b,c,d --out runs/quiz
    """
    from gpt_fast.training import repeats
    from gpt_fast.training.finetune import finetune as train

    if repeats.is_repeated(settings):
        summary = options.train("fine-tuning", repeats.repeat, settings, as_json)
        if summary is not None:
            _print_spread(summary, settings)
        return
    record = options.train("fine-tuning", train, settings, as_json)
    if record is None:
        return
    measured = {name.removeprefix("valid_"): value for name, value in record.items() if name not in ("valid_rows",)}
    lines = metric_rows(measured)
    lines += [("time", f"{record['seconds']:.0f} s"), ("run folder", options.run_folder(settings.out))]
    print_table("fine-tuned, on held-out rows", lines)
