"""Results as pictures: cost against size with the roof drawn in, and bars for single cases."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.report import results
from benchmarks.report.markdown import PASS_NAMES, seconds
from benchmarks.report.markdown import memory as memory_of
from benchmarks.report.results import Record, Run
from benchmarks.report.tables import speedups
from benchmarks.report.tables import title as title_of
from benchmarks.topic import OURS

# One colour for an implementation in every picture; ours stands out.
COLORS = {
    OURS: "#c1440e",
    f"{OURS} compiled": "#e39a6f",
    f"{OURS} bfloat16 weights": "#d96c3f",
    f"{OURS} int8 weights": "#e39a6f",
    f"{OURS} int8-a16 weights": "#f0c3a8",
    "OpenVINO float32": "#0f6e6e",
    "OpenVINO bfloat16": "#2f9191",
    "OpenVINO int8": "#63b3b3",
    "OpenVINO int4": "#a3d3d3",
    "CTranslate2 float32": "#5b6b1f",
    "CTranslate2 bfloat16": "#7f9130",
    "CTranslate2 int8": "#a9b964",
    "ONNX Runtime float32": "#4a4a7d",
    "ONNX Runtime int8": "#8a8ac0",
    "torch": "#1f5a94",
    "plain": "#1f5a94",
    "sdpa flash": "#1f5a94",
    "sdpa math": "#7fa8cf",
    "sdpa efficient": "#4d7fb3",
    "sdpa cudnn": "#0f2f52",
    "torch.compile": "#3c8d5a",
    "plain compiled": "#3c8d5a",
    "torch chunked": "#7fa8cf",
    "FlexAttention": "#8a63a8",
    "Liger": "#b38b00",
    "Liger fused": "#b38b00",
    "Liger cross-entropy": "#d8b94a",
    "Hugging Face eager": "#a4738c",
    "Hugging Face sdpa": "#7b2d5b",
    "Hugging Face compiled": "#c9a3b7",
    "Hugging Face accelerated": "#e39a6f",
    "products alone": "#999999",
    "reference": "#555555",
}
ROOF = "#222222"
OVERVIEW = "overview.png"  # the picture that stands for a device
AXES = {
    "T": "tokens in a sequence, T", "V": "vocabulary, V", "B": "batch, B", "N": "columns, N", "C": "width, C",
    "layers": "layers",
}  # fmt: skip
Series = list[dict[str, Record]]  # one entry for each size


def draw(runs: list[Run], folder: Path) -> dict[str, str]:
    """Write each picture of `runs` into `folder` as a PNG file. Return {file name: caption}.

    `runs` are the contents of topics' results files. Those with a busy process beside them are left out. The first
    picture is an overview of whole-model jobs, if there are any. Files of the same name are replaced.
    """
    written: dict[str, str] = {}
    faster = speedups(runs)
    if faster:
        FigureCanvasAgg(overview(faster)).print_png(folder / OVERVIEW)
        written[OVERVIEW] = "Speed of whole models against the fastest other implementation"
    for run in (run for run in runs if not run.get("busy")):
        for (series, kind), group in groups(run).items():
            for stem, figure, caption in figures(run, series, kind, group):
                name = f"{run['topic']}_{stem}.png"
                FigureCanvasAgg(figure).print_png(folder / name)
                written[name] = caption
    return written


def overview(faster: dict[str, tuple[float, str]]) -> Figure:
    """Draw a bar for each whole-model case: gpt_fast's speed as a multiple of the fastest other implementation's.

    `faster` maps the case's name to (multiple, name of the other implementation), and must not be empty. The multiple
    and the name stand beside the bar.
    """
    figure = Figure(figsize=(8.4, 0.34 * len(faster) + 0.9), dpi=130, layout="constrained")
    axes = figure.subplots()
    places = list(range(len(faster)))[::-1]
    axes.barh(places, [times for times, _ in faster.values()], color=COLORS[OURS], height=0.62)
    for place, (times, other) in zip(places, faster.values(), strict=True):
        label = f"{times:.2f} × {other}"
        axes.annotate(label, (times, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.axvline(1, color=ROOF, linewidth=1.2, linestyle=(0, (5, 3)))
    labels = [case.replace("model=gpt2 ", "") for case in faster]
    axes.set_yticks(places, labels, fontsize=8)
    axes.set_xlim(0, 1.45 * max(times for times, _ in faster.values()))
    axes.tick_params(axis="x", labelsize=8)
    others = " where no model is named" if any("model=" in label for label in labels) else ""
    _head(figure, f"{OURS}: speed against the fastest other implementation (GPT-2 124M{others})")
    return figure


def groups(run: Run) -> dict[tuple[str, str], Series]:
    """Group the cases of a run by the picture they belong to: {(growing size, kind): [records of a case]}.

    `run` is the content of a topic's results file. The growing size is the name of the size that varies in a series of
    cases, such as "T". The kind is their dtype and dropout as text. Cases outside of any series are under ("", ""). The
    records of a case are a dict from implementation to record. The cases of a series are sorted by the growing size. If
    a series has only one case for a kind, that case is dropped from the result.
    """
    found: dict[tuple[str, str], Series] = {}
    for records in results.by_case(run).values():
        first = next(iter(records.values()))
        dropout = f", dropout {first['dropout']:g}" if first["dropout"] else ""
        kind = f"{first['dtype']}{dropout}" if first["series"] else ""
        found.setdefault((first["series"], kind), []).append(records)
    for (series, _), group in found.items():
        if series:
            group.sort(key=lambda records: _size(records, series))
    return {key: group for key, group in found.items() if not key[0] or len(group) > 1}


def _size(records: dict[str, Record], series: str) -> int:
    """Return the value of the size named `series`, such as "T", in one case. `records` maps implementation → record."""
    return next(iter(records.values()))["sizes"][series]


def figures(run: Run, series: str, kind: str, group: Series) -> list[tuple[str, Figure, str]]:
    """Return [(stem of the file's name, picture, caption)] for one group of the cases of a run.

    `series` is the name of the size that grows over the group, or "" for cases in no series. `kind` is the dtype and
    dropout as text. `group` has a dict for each case, from implementation to record. `run` is the content of a topic's
    results file.

    Cases in no series give one picture with bars. A series gives a picture of its speed, with a panel for each pass.
    Over T, V or B it also gives a picture of the peak memory, if any was measured.
    """
    title = title_of(run)
    if not series:
        return [("bars", bars(run, group, title), f"{title}: time of each implementation")]
    stem = f"{series}_{kind}".replace(", dropout ", "_dropout").replace(".", "")
    head = f"{title}\n{kind}, {_fixed(group, series)}".rstrip(", ")
    passes = [name for name in ("forward", "backward", "training", "step") if any_has(group, name)]
    figure = Figure(figsize=(4.9 * len(passes) + 1.4, 4.6), dpi=130, layout="constrained")
    for axes, name in zip(figure.subplots(1, len(passes), squeeze=False)[0], passes, strict=True):
        speed(axes, run, series, name, group)
    _head(figure, head)
    drawn = [(stem, figure, f"{title}, by {AXES.get(series, series)} ({kind})")]
    if series in ("T", "V", "B") and any(record["peak_memory"] for records in group for record in records.values()):
        figure = Figure(figsize=(6.3, 4.6), dpi=130, layout="constrained")
        memory(figure.subplots(), series, group)
        _head(figure, head)
        drawn.append((f"{stem}_memory", figure, f"{title}: peak memory, by {AXES.get(series, series)} ({kind})"))
    return drawn


def any_has(group: Series, passes: str) -> bool:
    """Return True if a record in `group` has times of the pass named `passes`.

    `group` has a dict for each case, from implementation to record.
    """
    return any(passes in record["times"] for records in group for record in records.values())


def _fixed(group: Series, series: str) -> str:
    """Return the sizes that are equal in all cases of a series as text, such as "B=2 H=12", without the growing size.

    `series` names the growing size. `group` has a dict for each case, from implementation to record. The size "model"
    is shown as its value alone.
    """
    sizes = [next(iter(records.values()))["sizes"] for records in group]
    same = [(name, value) for name, value in sizes[0].items() if all(size[name] == value for size in sizes)]
    return " ".join(str(value) if name == "model" else f"{name}={value}" for name, value in same if name != series)


def lines(group: Series, series: str, value: Any) -> dict[str, list[tuple[int, float]]]:
    """Return the points of a plot as {implementation: [(size, y)]}, where y is `value(record)`.

    `value` returns a number, or None for a record without a point. `series` is the name of the size that grows over the
    cases. `group` has a dict for each case, from implementation to record. An implementation without points is left
    out.
    """
    found: dict[str, list[tuple[int, float]]] = {}
    for records in group:
        for peer, record in records.items():
            y = value(record)
            if y is not None:
                found.setdefault(peer, []).append((_size(records, series), y))
    return found


def speed(axes: Axes, run: Run, series: str, passes: str, group: Series) -> None:
    """Draw a line for each implementation over the growing size, and a dashed line for the measured speed limit.

    The y axis is seconds for a whole-model job. For an op it is GFLOP/s or, if the pass has no FLOPs, GB/s. `series` is
    the name of the growing size, and `passes` that of the pass. `run` is the content of a topic's results file. `group`
    has a dict for each case, from implementation to record. The first case must have a record with times of the pass.
    The limit is computed from the records of the first implementation with times of the pass, usually gpt_fast.
    """
    first = next(record for record in group[0].values() if passes in record["times"])
    work, job = first["work"][passes], first["tokens"] is not None
    unit, amount = ("GFLOP/s", "flops") if work["flops"] else ("GB/s", "bytes")

    def shown(record: Record, seconds: float) -> float:
        """Return the y value of a record that takes `seconds`: the seconds of a job, the billions a second of an op.

        The outer function says which it is (`job`), and whether FLOPs or bytes are counted (`amount`).
        """
        return seconds if job else record["work"][passes][amount] / seconds / 1e9

    def value(record: Record) -> float | None:
        """Return the y value of a record's median time, or None if it has no times of the outer function's pass."""
        return shown(record, record["times"][passes]["median"]) if passes in record["times"] else None

    def floor(record: Record) -> float | None:
        """Return the y value of the speed limit for a record, or None if it lacks the outer function's pass."""
        if passes not in record["times"]:
            return None
        return shown(record, results.floor_seconds(record, passes, results.session(run, record)["floors"]))

    for peer, points in lines(group, series, value).items():
        _line(axes, peer, points)
    limit = next(iter(lines(group, series, floor).values()))
    axes.plot(*zip(*limit, strict=True), color=ROOF, linewidth=1.4, linestyle=(0, (5, 3)), label="measured floor")
    axes.set_title("" if job else PASS_NAMES.get(passes, passes), loc="left", fontsize=10)
    axes.set_ylabel("seconds a step" if job else unit)
    axes.set_ylim(bottom=0)
    _finish(axes, series, group)


def memory(axes: Axes, series: str, group: Series) -> None:
    """Draw a line for the peak memory of each implementation over the growing size, both on logarithmic scales.

    `series` is the name of the growing size. `group` has a dict for each case, from implementation to record. Records
    without a peak memory, or with 0, have no point.
    """
    for peer, points in lines(group, series, lambda record: record["peak_memory"]).items():
        _line(axes, peer, [(x, y) for x, y in points if y])
    axes.set_ylabel("peak memory")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, place: memory_of(int(value)))
    _finish(axes, series, group)


def bars(run: Run, group: Series, title: str) -> Figure:
    """Draw a panel for each case and pass: a bar for the median time of each implementation.

    A dashed line in a panel is the measured speed limit. The first record of a case says which passes it has. `group`
    is not empty and has a dict for each case, from implementation to record. `title` is the picture's title. `run` is
    the content of a topic's results file.
    """
    panels = [
        (case, records, passes)
        for case, records in ((next(iter(records.values()))["case"], records) for records in group)
        for passes in next(iter(records.values()))["times"]
    ]
    across = 2 if len(panels) > 1 else 1
    down = -(-len(panels) // across)
    tallest = max(len(records) for _, records, _ in panels)
    figure = Figure(figsize=(6.2 * across, (0.27 * tallest + 0.75) * down + 0.4), dpi=130, layout="constrained")
    grid = figure.subplots(down, across, squeeze=False).flatten()
    for axes, (case, records, passes) in zip(grid, panels, strict=False):
        _panel(axes, run, case, records, passes)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    _head(figure, title)
    return figure


def _panel(axes: Axes, run: Run, case: str, records: dict[str, Record], passes: str) -> None:
    """Draw the panel of one case and pass: a bar with quartiles for the time of each implementation.

    A dashed line is the measured speed limit. `case` is the case's name and `passes` that of the pass. `run` is the
    content of a topic's results file. `records` maps implementation → its record in that file. The first record must
    have the pass; others that lack it get no bar.
    """
    timed = {peer: record["times"][passes] for peer, record in records.items() if passes in record["times"]}
    medians = [time["median"] for time in timed.values()]
    unit, scale = ("s", 1.0) if max(medians) >= 2 else ("ms", 1e3) if max(medians) >= 2e-3 else ("µs", 1e6)
    values = [value * scale for value in medians]
    spread = [
        [(time["median"] - time["q1"]) * scale for time in timed.values()],
        [(time["q3"] - time["median"]) * scale for time in timed.values()],
    ]
    places = list(range(len(timed)))[::-1]
    colors = [COLORS.get(peer, "#888888") for peer in timed]
    axes.barh(places, values, xerr=spread, color=colors, height=0.7, error_kw={"ecolor": "0.25", "elinewidth": 1})
    for place, value, high in zip(places, values, spread[1], strict=True):
        axes.annotate(
            seconds(value / scale),
            (value + high, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    first = next(iter(records.values()))
    limit = results.floor_seconds(first, passes, results.session(run, first)["floors"]) * scale
    axes.axvline(limit, color=ROOF, linewidth=1.2, linestyle=(0, (5, 3)))
    axes.set_yticks(places, list(timed), fontsize=8)
    longest = max(value + high for value, high in zip(values, spread[1], strict=True))
    axes.set_xlim(0, max(longest, limit) * 1.14)
    axes.tick_params(axis="x", labelsize=8)
    name = PASS_NAMES.get(passes, passes)
    axes.set_title(case if passes == "step" else f"{case}: {name}", loc="left", fontsize=8.5)
    axes.set_xlabel(f"{unit}; dashed: measured floor", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _line(axes: Axes, peer: str, points: list[tuple[int, float]]) -> None:
    """Draw the line of the implementation `peer` through `points`, [(size, value)], thicker for gpt_fast.

    Nothing is drawn without points.
    """
    if not points:
        return
    ours = peer == OURS
    axes.plot(
        *zip(*points, strict=True),
        color=COLORS.get(peer, "#888888"),
        linewidth=2.4 if ours else 1.5,
        marker="o",
        markersize=5 if ours else 4,
        zorder=3 if ours else 2,
        label=peer,
    )


def _finish(axes: Axes, series: str, group: Series) -> None:
    """Set scale, ticks, label, grid and legend of axes whose logarithmic x axis shows the size named `series`.

    A tick stands at the size of each case. `group` has a dict for each case, from implementation to record.
    """
    sizes = [_size(records, series) for records in group]
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size // 1024}k" if size >= 1024 and size % 1024 == 0 else str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel(AXES.get(series, series))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8)


def _head(figure: Figure, title: str) -> None:
    """Put the title `title` at the top left of a figure."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
