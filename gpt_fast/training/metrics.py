"""Held-out loss and metrics, each beside what a model that ignores its input would reach.

torchmetrics is imported by the functions that measure with it: it takes a second, and imports matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..config import IGNORE
from ..data.batches import Batch
from ..data.example_batches import Example, task_batches
from ..model import evaluating
from .engine.distributed import World

Metrics = dict[str, float]
LONGEST_SPAN = 30  # tokens, as in the code of BERT


def lm_loss(model: nn.Module, batches: Sequence[Batch], world: World | None = None) -> float:
    """Return the mean loss in nats per predicted token over `batches`, of which each rank takes its share.

    All ranks call the model the same number of times, as FSDP needs. A rank with less to do repeats a batch that does
    not count.
    """
    world = world or World()
    totals = torch.zeros(2, dtype=torch.float64)
    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad():
        for first in range(0, len(batches), world.size):
            index = first + world.rank
            batch = batches[index if index < len(batches) else 0].to(device)
            asked = batch.weight if index < len(batches) else 0
            totals += torch.tensor([float(model(**batch.inputs()).loss) * asked, asked], dtype=torch.float64)
    total, count = world.total(totals.to(world.device)).tolist()
    return total / count


def predictions(model: nn.Module, examples: Sequence[Example], pad_token: int, batch_size: int) -> Tensor:
    """Return a task head's logits [N, K] for every example, or a regressor's values [N, 1]."""
    logits = []
    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad():
        for batch in task_batches(examples, batch_size, pad_token):
            batch = batch.to(device)
            logits.append(model(batch.tokens, lengths=batch.lengths).logits.float().cpu())
    return torch.cat(logits)


def row_predictions(model: nn.Module, examples: Sequence[Example], pad_token: int, batch_size: int) -> list[Tensor]:
    """Return each example's logits without padding: `[T, K]` of a tagger, `[2, T]` of a model that finds spans."""
    found: list[Tensor] = []
    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad():
        for batch in task_batches(examples, batch_size, pad_token):
            assert batch.lengths is not None
            lengths = batch.lengths.tolist()
            batch = batch.to(device)
            logits = model(batch.tokens, lengths=batch.lengths).logits.float().cpu()
            tagged = logits.shape[-1] != batch.tokens.shape[1] or logits.shape[1] != 2
            found += [row[:length] if tagged else row[:, :length] for row, length in zip(logits, lengths, strict=True)]
    return found


def multi_label_metrics(logits: Tensor, labels: Tensor) -> Metrics:
    """Return loss, accuracy (of whole rows), macro and micro F1 of the classes with a logit above 0 in `logits` [N, K].

    The baseline is the accuracy and macro F1 of always answering the commonest row of `labels` [N, K], which has 0 and
    1.
    """
    from torchmetrics.classification import MultilabelF1Score

    N, K = logits.shape
    answers, truth = (logits > 0).long(), labels.long()
    rows, counts = truth.unique(dim=0, return_counts=True)
    constant = rows[counts.argmax()].expand(N, K)
    return {
        "loss": float(nn.functional.binary_cross_entropy_with_logits(logits, labels.float())),
        "accuracy": float((answers == truth).all(1).float().mean()),
        "macro_f1": float(MultilabelF1Score(K, average="macro")(answers, truth)),
        "micro_f1": float(MultilabelF1Score(K, average="micro")(answers, truth)),
        "majority_accuracy": float((constant == truth).all(1).float().mean()),
        "majority_macro_f1": float(MultilabelF1Score(K, average="macro")(constant, truth)),
        "examples": N,
    }


def tag_metrics(logits: Sequence[Tensor], rows: Sequence[Example], names: Sequence[str]) -> Metrics:
    """Return the metrics of classes over all words of all rows.

    Where the tags are B-X, I-X and O, the F1 of the entities that they mark is added.
    """
    tags = [torch.tensor(row.tags) for row in rows]
    counted = [(scores[which != IGNORE], which[which != IGNORE]) for scores, which in zip(logits, tags, strict=True)]
    metrics = classification_metrics(torch.cat([a for a, _ in counted]), torch.cat([b for _, b in counted]))
    metrics |= {"words": metrics["examples"], "examples": len(rows)}
    if names and all(name == "O" or name[:2] in ("B-", "I-") for name in names):
        found, truth = (
            {(i, *entity) for i, each in enumerate(counted) for entity in entities([names[t] for t in tag(each)])}
            for tag in (lambda each: each[0].argmax(1).tolist(), lambda each: each[1].tolist())
        )
        metrics["entity_f1"] = 2 * len(found & truth) / max(1, len(found) + len(truth))
    return metrics


def entities(tags: Sequence[str]) -> list[tuple[int, int, str]]:
    """Return (first word, last word, kind) of each entity that B-X, I-X and O mark.

    An I-X behind another kind, or behind O, begins an entity, as in CoNLL's own script.
    """
    found: list[tuple[int, int, str]] = []
    before = ""
    for i, tag in enumerate(tags):
        kind = tag[2:] if tag != "O" else ""
        if kind and tag[0] == "I" and kind == before:
            found[-1] = (found[-1][0], i, kind)
        elif kind:
            found.append((i, i, kind))
        before = kind
    return found


def span_metrics(logits: Sequence[Tensor], rows: Sequence[Example]) -> Metrics:
    """Return "loss", "exact_match", "word_f1" and "examples" of a model that finds spans.

    `logits` are [2, T] for each row: the scores of each position as the first and as the last of the answer. The loss
    is the mean over the rows whose answer was not cut off, NaN if there are none. Exact match and the F1 of words are
    means over all rows, in [0, 1].
    """
    losses = []
    for scores, row in zip(logits, rows, strict=True):
        target = torch.tensor(row.target)
        if (target != IGNORE).all():
            losses.append(float(nn.functional.cross_entropy(scores, target.long())))
    contexts = [row.context for row in rows]
    answers = ["" if context is None else context.answer for context in contexts]
    return {
        "loss": math.fsum(losses) / len(losses) if losses else math.nan,
        **generated_metrics([span_text(s, row) for s, row in zip(logits, rows, strict=True)], answers),
        "examples": len(rows),
    }


def span_text(logits: Tensor, row: Example) -> str:
    """Return the likeliest answer of at most `LONGEST_SPAN` tokens, given `logits` [2, T].

    The result is "" if none is likelier than no answer, which is the span of the last token.
    """
    context = row.context
    assert context is not None
    begin, T = context.begin, logits.shape[1]
    starts, ends = logits[:, begin : T - 1]
    if len(starts) == 0:
        return ""
    scores = starts[:, None] + ends  # [first, last]
    allowed = torch.ones_like(scores, dtype=torch.bool).triu().tril(LONGEST_SPAN - 1)
    best = int(scores.masked_fill(~allowed, -torch.inf).argmax())
    first, last = divmod(best, len(starts))
    if float(scores[first, last]) < float(logits[0, -1] + logits[1, -1]):
        return ""
    return context.text[context.offsets[first][0] : context.offsets[last][1]].strip()


def classification_metrics(logits: Tensor, labels: Tensor) -> Metrics:
    """Return loss, accuracy, macro and micro F1 and Matthews' correlation of `logits` [N, K].

    The baseline is the accuracy and macro F1 of always answering the commonest label of `labels` [N]: no constant
    answer does better on them.
    """
    from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

    N, K = logits.shape
    constant = torch.full_like(labels, int(torch.bincount(labels).argmax()))
    accuracy = MulticlassAccuracy(K, average="micro")
    f1 = MulticlassF1Score(K, average="macro")
    return {
        "loss": float(nn.functional.cross_entropy(logits, labels)),
        "accuracy": float(accuracy(logits, labels)),
        "macro_f1": float(f1(logits, labels)),
        "micro_f1": float(MulticlassF1Score(K, average="micro")(logits, labels)),
        "matthews": matthews(confusion_matrix(logits, labels)),
        "majority_accuracy": float(accuracy(constant, labels)),
        "majority_macro_f1": float(f1(constant, labels)),
        "examples": N,
    }


def confusion_matrix(logits: Tensor, labels: Tensor) -> Tensor:
    """Return how often class i was taken for class j [K, K]."""
    from torchmetrics.classification import MulticlassConfusionMatrix

    return MulticlassConfusionMatrix(logits.shape[1])(logits, labels)


def matthews(counts: Tensor) -> float:
    """Return Matthews' correlation of a confusion matrix `[K, K]`, 0 where all labels or all answers are one class.

    torchmetrics has another value there, 0.09 of 40 right answers in 60, which no constant answer deserves. Source:
    Gorodkin (2004), "Comparing two K-category assignments by a K-category correlation coefficient".
    """
    counts = counts.double()
    truth, answers, total = counts.sum(1), counts.sum(0), counts.sum()
    spread = (total**2 - truth @ truth) * (total**2 - answers @ answers)
    return float((counts.trace() * total - truth @ answers) / spread.sqrt()) if spread > 0 else 0.0


def regression_metrics(values: Tensor, targets: Tensor) -> Metrics:
    """Return mean squared error, Pearson's and Spearman's correlation of `values` [N].

    The baseline is the error of always answering the mean of `targets` [N], which is their variance. Without spread in
    either there is no correlation.
    """
    from torchmetrics import MeanSquaredError, PearsonCorrCoef
    from torchmetrics.functional import spearman_corrcoef

    metrics = {
        "mse": float(MeanSquaredError()(values, targets)),
        "mean_mse": float(targets.var(correction=0)),
        "examples": float(len(targets)),
    }
    if len(targets) > 1 and values.std() > 0 and targets.std() > 0:
        metrics["pearson"] = float(PearsonCorrCoef()(values, targets))
        metrics["spearman"] = float(spearman_corrcoef(values, targets))
    return metrics


def answer_metrics(loss: float, tokens: int, size: int, examples: int) -> Metrics:
    """Return loss in nats per token, perplexity and bits per byte of answers.

    The answers have `tokens` tokens, their end tokens included, and `size` bytes.
    """
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": loss / math.log(2) * tokens / max(1, size),
        "examples": examples,
    }


def generated_metrics(answers: Sequence[str], wanted: Sequence[str]) -> Metrics:
    """Return exact match and the F1 of words, in [0, 1], as SQuAD counts them: without case, articles and punctuation.

    A row whose answer is empty counts 1 for an empty text and 0 for any other.
    """
    from torchmetrics.text import SQuAD

    pairs = list(zip(answers, wanted, strict=True))
    answered = [(answer, text) for answer, text in pairs if text.strip()]
    empty = sum(not answer.strip() for answer, text in pairs if not text.strip())  # torchmetrics gives them an F1 of 0
    if not answered:
        return {"exact_match": empty / len(pairs), "word_f1": empty / len(pairs)}
    metric = SQuAD(sync_on_compute=False)  # a rank that measures alone does not wait for the others
    metric.update(
        [{"prediction_text": answer, "id": str(i)} for i, (answer, _) in enumerate(answered)],
        [{"answers": {"text": [text], "answer_start": [0]}, "id": str(i)} for i, (_, text) in enumerate(answered)],
    )
    measured, share = metric.compute(), len(answered) / 100
    return {
        "exact_match": (float(measured["exact_match"]) * share + empty) / len(pairs),
        "word_f1": (float(measured["f1"]) * share + empty) / len(pairs),
    }


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
