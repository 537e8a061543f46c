"""A run's curves as a picture.

matplotlib is imported when a picture is drawn: every training imports this module, and without a home directory the
import prints a notice about its cache.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from .._disk import writing
from .._files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAIN, VALID, BASELINE = "#9db4c9", "#1f5a94", "#b5562b"


def plot_language_model(metrics: list[dict[str, float]], entropy: float, title: str, path: Path) -> None:
    """Plot training and validation loss over the updates, with a line at `entropy`, and write a PNG to `path`.

    `metrics` holds the lines of a run's metrics.jsonl; at least one has "train_loss" and one "valid_loss". `entropy` is
    the unigram entropy of the held-out text, the loss of a model that knows the frequency of each token alone.
    """
    with _picture(path, 7.5, 4.6) as figure:
        axes = figure.add_subplot()
        _curve(axes, metrics, "train_loss", TRAIN, "training")
        _curve(axes, metrics, "valid_loss", VALID, "validation", marker="o")
        _baseline(axes, entropy, f"unigram entropy {entropy:.2f}")
        _finish(axes, title, "loss (nats per token)")


def plot_task(
    metrics: list[dict[str, float]], score: str, baseline: float | None, unit: str, title: str, path: Path
) -> None:
    """Plot the training loss on the left and a metric of the validation rows on the right, and write a PNG to `path`.

    `metrics` holds the lines of a run's metrics.jsonl, `score` names the metric's field in them, and `unit` labels its
    axis. `baseline` is the metric of a model that always gives the same answer, drawn as a line unless it is None.
    """
    with _picture(path, 10, 4.4) as figure:
        left, right = figure.subplots(1, 2)
        _curve(left, metrics, "train_loss", TRAIN, "training")
        _finish(left, title, "training loss (task + language model)")
        _curve(right, metrics, score, VALID, "validation", marker="o")
        if baseline is not None:
            _baseline(right, baseline, f"constant answer {baseline:.2f}")
        right.set_ylim(bottom=0)
        _finish(right, "held-out rows", unit)


def plot_confusion(counts: list[list[int]], names: Sequence[str], title: str, path: Path) -> None:
    """Plot a confusion matrix, with the true classes as rows and the predicted classes as columns, as a PNG at `path`.

    `counts[i][j]` is the number of examples of class i that the model took for class j. `names` are the names of the
    classes. The colour of a cell is its share of the row. For at most 30 classes, the count is written in the cell.
    """
    K = len(names)
    size = min(16.0, 3.0 + 0.45 * K)
    with _picture(path, size + 1, size) as figure:
        axes = figure.add_subplot()
        shares = [[count / max(1, sum(row)) for count in row] for row in counts]
        picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        labels = [shown(name, 24) for name in names]
        axes.set_xticks(range(K), labels, rotation=60, ha="right")
        axes.set_yticks(range(K), labels)
        axes.set_xlabel("answer")
        axes.set_ylabel("label")
        axes.set_title(shown(title, 60), loc="left", fontsize=11)
        if K <= 30:
            for i, row in enumerate(counts):
                for j, count in enumerate(row):
                    color = "white" if shares[i][j] > 0.6 else "0.2"
                    axes.text(j, i, str(count), ha="center", va="center", fontsize=8, color=color)
        figure.colorbar(picture, ax=axes, label="share of the label's rows", shrink=0.8)


def plot_runs(runs: Sequence[tuple[str, list[dict[str, float]]]], field: str, path: Path) -> None:
    """Plot the metric `field` of several runs over the updates, a coloured curve for each run, as a PNG at `path`.

    `runs` has for each run (name, lines of its metrics.jsonl), and each run has at least one line with `field`. Colours
    repeat after ten runs.
    """
    with _picture(path, 8, 5) as figure:
        axes = figure.add_subplot()
        for index, (name, metrics) in enumerate(runs):
            marker = "o" if field.startswith("valid_") else ""
            _curve(axes, metrics, field, f"C{index % 10}", shown(name, 60), marker)
        _finish(axes, "", field.replace("_", " "))


def shown(text: str, width: int) -> str:
    """Return `text` as a picture shows it: on one line, of at most `width` characters (an even number).

    Each run of white space becomes one space. In a longer text, "…" stands for the middle. Characters that no font
    draws (controls, halves of surrogate pairs) become U+FFFD.
    """
    text = "".join(character if character.isprintable() else "\ufffd" for character in " ".join(text.split()))
    half = width // 2
    return text if len(text) <= width else f"{text[: half - 1]}…{text[-half:]}"


@contextmanager
def _picture(path: Path, width: float, height: float) -> Iterator[Figure]:
    """Yield a figure of `width` by `height` inches to draw in, then write it as a PNG that replaces `path` atomically.

    The folder of `path` is made if it does not exist. If the block raises, nothing is written. Raise `OSError` if the
    file cannot be written. Labels are plain text: matplotlib would take a label with two `$` for mathematics, and raise
    an error if it does not parse. The font lacks many scripts, and a box in place of a letter needs no warning, so user
    warnings are silenced in the block.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"text.parse_math": False, "text.usetex": False}), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
        yield figure
        content = BytesIO()
        FigureCanvasAgg(figure).print_png(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    left = "the picture before is as it was" if path.exists() else "nothing of it is left"
    with writing(path, left), replacing(path) as temporary:
        temporary.write_bytes(content.getvalue())


def _curve(axes: Axes, metrics: list[dict[str, float]], field: str, color: str, label: str, marker: str = "") -> None:
    """Draw `field` over "step" in `axes` for the lines of `metrics` that have it, of which there must be one or more.

    The legend shows `label` and the last value. `marker` is a matplotlib marker for the points, "" for none.
    """
    points = [(line["step"], line[field]) for line in metrics if field in line]
    steps, values = zip(*points, strict=True)
    axes.plot(
        steps, values, color=color, linewidth=1.8, marker=marker, markersize=4, label=f"{label}, last {values[-1]:.2f}"
    )


def _baseline(axes: Axes, value: float, label: str) -> None:
    """Draw a dashed horizontal line at `value` in `axes`, which the legend calls `label`."""
    axes.axhline(value, color=BASELINE, linewidth=1.4, linestyle=(0, (5, 3)), label=label)


def _finish(axes: Axes, title: str, unit: str) -> None:
    """Set the title, the axes' labels, the grid and the legend of a plot, after its lines were drawn.

    `unit` labels the vertical axis; the horizontal one shows updates from 0 on. A title of more than 70 characters
    loses its middle.
    """
    axes.set_title(shown(title, 70), loc="left", fontsize=11)
    axes.set_xlabel("updates")
    axes.set_ylabel(unit)
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    # A legend leaves out labels that begin with `_`, so each line's label is set afterwards.
    lines = axes.get_lines()
    legend = axes.legend(lines, [str(index) for index in range(len(lines))], frameon=False)
    for text, line in zip(legend.get_texts(), lines, strict=True):
        text.set_text(line.get_label())
