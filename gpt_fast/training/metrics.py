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
    """Return the mean loss in nats per predicted token over `batches`, which the ranks of `world` divide among them.

    The model runs in evaluation mode, without gradients, and each batch counts by its `weight`. Every rank must call
    this with all batches, and gets the same result. FSDP needs all ranks to call the model equally often. So a rank
    that has no batch left evaluates the first batch again, with weight 0. Without `world`, one process evaluates all
    batches. Raise `ZeroDivisionError` if there are no batches, or all have weight 0.
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
    """Return the logits [N, K] of a head with K classes or choices for N examples, or a regression's values [N, 1].

    The result is float32 on the CPU, in the order of `examples`, of which there has to be one or more. Examples are
    padded with `pad_token` into batches of `batch_size`. The model runs in evaluation mode, without gradients.
    """
    logits = []
    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad():
        for batch in task_batches(examples, batch_size, pad_token):
            batch = batch.to(device)
            logits.append(model(batch.tokens, lengths=batch.lengths).logits.float().cpu())
    return torch.cat(logits)


def row_predictions(model: nn.Module, examples: Sequence[Example], pad_token: int, batch_size: int) -> list[Tensor]:
    """Return a tensor of logits for each example, in order, float32 on the CPU, without the logits of padding.

    The model runs in evaluation mode, without gradients. For an example of T tokens they are [T, K] from a
    `GPTForTokenClassification` with K classes. From a `GPTForQuestionAnswering` they are [2, T]: the scores of each
    token as the first and as the last of the answer. Examples are padded with `pad_token` into batches of `batch_size`.
    """
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
    """Return the metrics of a task in which a row may have several classes, and of a baseline.

    `logits` are [N, K]; a logit above 0 predicts its class. `labels` [N, K] hold 1 for each class of a row and 0 for
    every other. The keys are "loss" (the mean binary cross-entropy), "accuracy" (the share of rows with all classes
    right), "macro_f1", "micro_f1" and "examples" (N). "majority_accuracy" and "majority_macro_f1" are the same metrics
    of a baseline that always answers the commonest row of `labels`.
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
    """Return the metrics of a tagger over all tagged words of all rows.

    The keys are "loss" (the mean cross-entropy), "accuracy", "macro_f1", "micro_f1", "matthews" (Matthews'
    correlation), and "words" and "examples", the numbers of tagged words and of rows. "majority_accuracy" and
    "majority_macro_f1" are the metrics of always answering the commonest tag. If all names are O, B-X or I-X,
    "entity_f1" is added: the F1 of whole entities. `logits` are [T, K] for each row of T tokens, and `row.tags` is the
    class of each token, or -100 where none counts. `names` are the names of the K classes.
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
    """Return (first word, last word, kind) of each entity that the tags of one sequence of words mark.

    Words are counted from 0. The tag B-X begins an entity of kind X, I-X continues one, and O is outside of any. An I-X
    that does not follow a word of an entity of kind X begins one, as in CoNLL's own script.
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
    """Return "loss", "exact_match", "word_f1" and "examples" of a model that finds the span of an answer in a text.

    `logits` are [2, T] for each row: the scores of each token as the first and as the last of the answer. `row.target`
    is the first and last position of the answer, twice -100 if it was cut off, and `row.context` has the text and the
    answer. The loss is the mean cross-entropy over the rows whose answer was not cut off, NaN if there are none. Exact
    match and the F1 of words are means over all rows, in [0, 1].
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
    """Return the likeliest answer of at most `LONGEST_SPAN` (30) tokens, as a part of the row's text.

    `logits` [2, T] are the scores of each token as the first and as the last of the answer. A span scores the sum of
    its two. The result is "" if the best span scores less than the last token, which stands for "no answer", or if the
    row has no token of the text. Spaces at both ends are dropped. `row.context` must not be None.
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
    """Return the metrics of a classifier for `logits` [N, K] and classes `labels` [N], and of a baseline.

    `labels` are int64. The keys are "loss" (the mean cross-entropy), "accuracy", "macro_f1", "micro_f1", "matthews"
    (Matthews' correlation) and "examples" (N). "majority_accuracy" and "majority_macro_f1" are the same metrics of a
    baseline that always answers the commonest label; no constant answer has higher ones.
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
    """Return counts [K, K] for `logits` [N, K], `labels` [N]: how many examples of class i were taken for class j."""
    from torchmetrics.classification import MulticlassConfusionMatrix

    return MulticlassConfusionMatrix(logits.shape[1])(logits, labels)


def matthews(counts: Tensor) -> float:
    """Return Matthews' correlation of the confusion matrix `counts` [K, K]: 0 if all labels or answers are one class.

    In that case torchmetrics returns another value, such as 0.09 for 40 right answers of 60, which no constant answer
    deserves. Source: Gorodkin (2004), "Comparing two K-category assignments by a K-category correlation coefficient".
    """
    counts = counts.double()
    truth, answers, total = counts.sum(1), counts.sum(0), counts.sum()
    spread = (total**2 - truth @ truth) * (total**2 - answers @ answers)
    return float((counts.trace() * total - truth @ answers) / spread.sqrt()) if spread > 0 else 0.0


def regression_metrics(values: Tensor, targets: Tensor) -> Metrics:
    """Return {"mse", "mean_mse", "examples", "pearson", "spearman"} of `values` [N] against `targets` [N].

    "mse" is the mean squared error, and "examples" is N. "mean_mse" is the baseline: the error of always answering the
    mean of `targets`, which is their variance. The two correlations, "pearson" and "spearman", are missing if there is
    one row, or if all values or all targets are equal.
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
    """Return "loss", "perplexity", "bits_per_byte" and "examples" of answers that a language model is to write.

    `loss` is the mean in nats per token, and "perplexity" is exp(`loss`). All expected answers together have `tokens`
    tokens, their end tokens included, and `size` bytes. `examples`, their number, is returned as it is.
    """
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": loss / math.log(2) * tokens / max(1, size),
        "examples": examples,
    }


def generated_metrics(answers: Sequence[str], wanted: Sequence[str]) -> Metrics:
    """Return {"exact_match", "word_f1"}: how well the texts `answers` agree with the texts `wanted`, in [0, 1].

    Both are means over the pairs, of which there has to be one or more. As in SQuAD, case, articles and punctuation do
    not count. Where the text in `wanted` is empty or blank, an empty or blank answer counts 1 and any other 0.
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
    """Return exp(`loss`) for a loss in nats per token: infinity if it is 700 or more, NaN if it is NaN."""
    return math.inf if loss >= 700 else math.exp(loss)
