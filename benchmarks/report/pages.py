"""The pages that show results.

They are one for each device, docs/performance/results.md, and marked blocks of README.md and of the site's home page.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg

from benchmarks.measure.environment import ROOT
from benchmarks.models.counts import MFU_FORMULA, MFU_WHERE
from benchmarks.report import plots, results, support, tables, targets
from benchmarks.report.markdown import table
from benchmarks.report.results import Run
from benchmarks.topic import OURS

RESULTS = ROOT / "benchmarks" / "results"
README, HOME, DOCS_PAGE = ROOT / "README.md", ROOT / "docs" / "index.md", ROOT / "docs" / "performance" / "results.md"
WHOLE_MODELS = ("training_step", "generation", "prefill")  # with every implementation in docs/performance/results.md

FLOOR = """\
*Of the floor*: how much of the speed limit is reached, which is the bytes that must move at the bandwidth measured in
the same session, or the FLOPs at the rate of a matrix product, whichever takes longer. What fits in a cache can beat
the bandwidth, and so does the embedding's gradient on a CPU, whose unused rows are never written."""
EXPLANATION = f"""\
Times are medians ± half the interquartile range. Implementations take turns; in training, where they do not fit into
memory together, each takes turns with {OURS} alone. *× ours*: the time as a multiple of {OURS}'s; with quartiles, the
median over pairs of rounds. On a GPU an op is timed as a CUDA graph, *host* is what a direct call of it costs the host;
without *host* the implementation cannot be captured, and its direct calls are timed. {FLOOR} *Peak memory*: what a call
adds to its inputs, forward and backward together; of a job, with weights and the optimizer's state.

{MFU_FORMULA}. {MFU_WHERE}."""


def devices(folder: Path) -> dict[Path, list[Run]]:
    """Return {device's folder: contents of its topics' results files} for each folder in `folder` that has any.

    The folders are in the order of their names. Results of studies do not count.
    """
    runs = {path: results.read_folder(path) for path in sorted(folder.iterdir()) if path.is_dir()}
    return {path: found for path, found in runs.items() if found}


# ---- a page and pictures in every device's folder


def write_pages(folder: Path) -> list[Path]:
    """Write README.md and pictures in the folder of each device that has results. Return the paths of the README.md.

    `folder` holds a folder for each device. Folders without results stay as they are. In the others, older *.png files
    are deleted.
    """
    pages = []
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        runs = results.read_folder(path)
        if not runs and not results.read_studies(path):
            continue
        page = path / "README.md"
        page.write_text(device_page(path, runs, draw(path, runs)), encoding="utf-8")
        pages.append(page)
    return pages


def draw(path: Path, runs: list[Run]) -> dict[str, str]:
    """Write each picture of a device into `path`, its folder, and delete all other *.png files there.

    `runs` are the contents of the folder's topic results files. The studies' results are read from the folder; those
    beside a busy process get no picture. Return {file name: caption} for the pictures of topics, but not of studies.
    """
    shown = plots.draw(runs, path)
    studies = set()
    for study, record in results.read_studies(path):
        if study.picture and not record.get("busy"):
            studies.add(picture_of(study.name))
            FigureCanvasAgg(study.picture(record)).print_png(path / picture_of(study.name))
    for stale in path.glob("*.png"):
        if stale.name not in {*shown, *studies}:
            stale.unlink()
    return shown


def picture_of(study: str) -> str:
    """Return the file name of a study's picture, such as "decoding.png" for the study "decoding"."""
    return f"{study}.png"


def device_page(path: Path, runs: list[Run], pictures: dict[str, str]) -> str:
    """Return the page of a device as Markdown: the tables of its measurements, with links to the pictures.

    `path` is the device's folder, `runs` are the contents of its topics' results files, and `pictures` maps file name →
    caption. The studies' results are read from the folder. Either `runs` or the studies' results must not be empty.
    """
    measured = runs or [record for _, record in results.read_studies(path)]
    lines = [
        f"# {measured[0]['device']['name']}",
        "",
        "Made by `make report` from the JSON files beside this page; measured by `python -m benchmarks`.",
        "",
        *tables.versions(measured),
        "",
        EXPLANATION,
    ]
    if runs:
        lines += ["", "## Summary", "", *table(tables.SUMMARY_HEADER, tables.summary(runs)), *target_section(runs)]
        lines += busy_section(runs)
    for name, caption in pictures.items():
        lines += ["", f"![{caption}]({name})"]
    for run in runs:
        lines += ["", f"## {tables.title(run)}", "", *tables.notes(run), *tables.case_tables(run)]
        absent = tables.missing(run)
        if absent:
            lines += ["", "Not measured:", "", *(f"- {line}" for line in absent)]
    return "\n".join([*lines, *study_sections(path)]) + "\n"


def target_section(runs: list[Run]) -> list[str]:
    """Return the lines of Markdown with a table of speed targets and whether they were met.

    A list below the table names the implementations with targets that do not count, because the device lacks
    instructions for them. Return [] if no target could be judged. `runs` are the contents of topics' results files.
    """
    rows, unjudged = targets.rows(runs), targets.unjudged(runs)
    lines = ["", "## Targets", "", *table(targets.HEADER, rows)] if rows else []
    return [*lines, "", "Not judged:", "", *(f"- {line}" for line in unjudged)] if rows and unjudged else lines


def busy_section(runs: list[Run]) -> list[str]:
    """Return the lines of Markdown that compare runs beside a busy process with quiet runs.

    `runs` are the contents of topics' results files. Return [] if no case was measured in both kinds of run.
    """
    rows = tables.beside(runs)
    return ["", "## Beside a busy process", "", *table(tables.BUSY_HEADER, rows)] if rows else []


def study_sections(path: Path, pictures: str = "") -> list[str]:
    """Return lines of Markdown with a section for each study that was measured on a device, [] without studies.

    A study is a measurement with a table of its own. Results beside a busy process are marked in the heading and have
    no picture. `path` is the device's folder, from which the results are read. `pictures` is the path from the page to
    that folder, ending in a slash; it precedes a picture's file name in links.
    """
    lines: list[str] = []
    for study, record in results.read_studies(path):
        heading, *rest = study.lines(record)
        lines += ["", heading + (results.BUSY if record.get("busy") else ""), *rest]
        if study.picture and not record.get("busy"):
            lines += ["", f"![{study.caption}]({pictures}{picture_of(study.name)})"]
    return lines


# ---- README.md and docs/index.md


def figures(folder: Path) -> str:
    """Return Markdown for README.md: a link to an overview picture, and for each device a link to its page.

    Nothing is written. The picture is that of the device with the most whole-model cases; it is left out if none has
    any. `folder` holds a folder of results for each device. A folder outside the checkout raises `ValueError`, because
    the links are relative to the checkout.
    """
    lines = [picture(folder, README), ""]
    for path, runs in devices(folder).items():
        page = path.relative_to(ROOT) / "README.md"
        lines += [f"- {runs[0]['device']['name']}: [every figure, implementation and peak memory]({page})"]
    return "\n".join([*lines, ""])


def picture(folder: Path, page: Path) -> str:
    """Return a Markdown image link to the overview picture of the device with the most whole-model cases.

    Only cases in which gpt_fast and another implementation were measured count. Return "" if no device has one.
    `folder` holds a folder for each device. The link is relative to the folder of `page`.
    """
    measured = {path: runs for path, runs in devices(folder).items() if tables.speedups(runs)}
    if not measured:
        return ""
    fullest = max(measured, key=lambda path: len(tables.speedups(measured[path])))
    place = os.path.relpath(fullest / plots.OVERVIEW, page.parent)
    return f"![Speed of whole models against the fastest other implementation]({place})"


def blocks(page: Path) -> dict[str, str]:
    """Return {name of a block: its Markdown} for the blocks of `page` that `make report` writes.

    README.md has the blocks "support" (which kernels serve which op) and "figures" (a picture and links). Any other
    page has the block "picture".
    """
    if page == README:
        return {"support": support.table(), "figures": figures(RESULTS)}
    return {"picture": picture(RESULTS, page) + "\n"}


def rewritten(page: Path) -> str:
    """Return the text of `page` with the Markdown between the markers of each generated block made anew.

    The blocks are those that `blocks(page)` returns. The file itself stays as it is. Raise `ValueError` if the opening
    and the closing marker of a block are not in the page exactly once each.
    """
    text = page.read_text("utf-8")
    for name, block in blocks(page).items():
        parts = re.split(rf"(<!-- {name}: made by `make report` -->\n|<!-- /{name} -->)", text)
        if len(parts) != 5:
            raise ValueError(f"{page.name} has {len(parts) // 4} blocks of {name}; expected 1")
        text = "".join([*parts[:2], block, *parts[3:]])
    return text


# ---- docs/performance/results.md


def docs_page(folder: Path) -> str:
    """Return the text of docs/performance/results.md. `folder` holds a folder for each device.

    For each device, the largest case of each topic and pictures come first. Then come an explanation of the tables, and
    for each device a table of all complete cases, the whole-model jobs in full, targets and studies.
    """
    lines = ["# Results"]
    measured = devices(folder)
    if not any(runs[0]["device"]["type"] == "cuda" for runs in measured.values()):
        lines += [
            "",
            "No figure here was measured on a GPU: [what a GPU should show](what-a-gpu-should-show.md) is predicted.",
        ]
    for path, runs in measured.items():
        link = folder_link(path)
        lines += ["", f"## {runs[0]['device']['name']}", "", f"![Speed of whole models]({link}{plots.OVERVIEW})"]
        lines += ["", "The largest case of each topic:", ""]
        lines += [*table(tables.SUMMARY_HEADER, tables.highlights(runs)), "", FLOOR, "", "### How cost grows"]
        for picture in growth(path):
            lines += ["", f"![{picture.stem.replace('_', ' ')}]({link}{picture.name})"]
    lines += [
        "",
        "## How to read the tables",
        "",
        "`make report` makes this page from the files in `benchmarks/results`, which `make bench` writes. "
        "[The method](benchmarks.md) has its own page. Each folder there has a page with every implementation, pass "
        "and peak memory.",
        "",
        EXPLANATION,
    ]
    for path, runs in measured.items():
        name = runs[0]["device"]["name"]
        lines += ["", f"## {name}: every case", "", *tables.versions(runs)]
        lines += ["", *table(tables.SUMMARY_HEADER, tables.summary(runs))]
        for run in runs:
            if run["topic"] in WHOLE_MODELS and not run.get("busy"):
                lines += ["", f"### {tables.title(run)}", "", *tables.notes(run)]
                lines += tables.case_tables(run, complete=True)
        sections = [*target_section(runs), *busy_section(runs), *study_sections(path, folder_link(path))]
        lines += [f"#{line}" if line.startswith("## ") else line for line in sections]
    return "\n".join(lines) + "\n"


def folder_link(path: Path) -> str:
    """Return the link from a page in docs/performance to a device's folder `path`, ending in a slash.

    It is relative for a folder in the checkout, else the path itself.
    """
    return f"../../{path.relative_to(ROOT)}/" if path.is_relative_to(ROOT) else f"{path}/"


def growth(path: Path) -> Iterable[Path]:
    """Return the sorted paths of a device's pictures that show how cost grows with a size.

    `path` is the device's folder. Each *.png file in it counts, except the overview, names that end in "_bars", and the
    pictures of studies.
    """
    studies = {picture_of(study.name) for study, _ in results.read_studies(path)}
    shown = (picture for picture in path.glob("*.png") if picture.name not in {*studies, plots.OVERVIEW})
    return sorted(picture for picture in shown if not picture.stem.endswith("_bars"))
