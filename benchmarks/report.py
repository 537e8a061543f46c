"""Writes every table and plot that is shown from the files of results: python -m benchmarks.report [DIR]

For each device's folder in DIR (benchmarks/results without one): README.md and the plots, from its JSON files. Without
DIR also the blocks of README.md that are marked as made here, and docs/results.md with its pictures.
"""

import re
import shutil
import sys
from pathlib import Path

from benchmarks import decode, overhead, results, support, tables
from benchmarks.environment import ROOT
from benchmarks.plots import draw
from benchmarks.results import Run

RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
DOCS_PAGE, DOCS_PICTURES = ROOT / "docs" / "results.md", ROOT / "docs" / "assets" / "results"
WHOLE_MODELS = ("training_step", "generation")  # with every implementation in docs/results.md
SHOWN = ("training_step_bars.png", "attention_T_float32.png", "attention_T_bfloat16.png")  # in README.md


def devices(folder: Path) -> dict[Path, list[Run]]:
    """The folders of devices and what was measured on each."""
    runs = {path: results.read_folder(path) for path in sorted(folder.iterdir()) if path.is_dir()}
    return {path: found for path, found in runs.items() if found}


def write_pages(folder: Path) -> list[Path]:
    """A page with plots in every device's folder."""
    pages = []
    for path, runs in devices(folder).items():
        page = path / "README.md"
        plots = draw(runs, path)
        decode.draw(path)
        page.write_text(device_page(path, runs, plots), encoding="utf-8")
        pages.append(page)
    return pages


def device_page(path: Path, runs: list[Run], plots: dict[str, str]) -> str:
    return tables.page(runs, plots, [*decode.section(path), *overhead.section(path)])


def figures(folder: Path) -> str:
    """What README.md shows of the figures: for each device its summary, with a link to all of it."""
    lines = []
    for path, runs in devices(folder).items():
        link = (path / "README.md").relative_to(ROOT)
        lines += [
            f"Measured on: {runs[0]['device']['name']}. [All of it, with memory and every implementation]({link}).",
            "",
            tables.FLOOR,
            "",
            *tables.table(tables.SUMMARY_HEADER, tables.highlights(runs)),
            "",
            *(f"![{name}]({path.relative_to(ROOT) / name})\n" for name in SHOWN if (path / name).exists()),
        ]
    return "\n".join(lines)


def docs_page(folder: Path) -> str:
    """docs/results.md: of each device the floors, every case's summary and the curves of what grows."""
    lines = [
        "# Results",
        "",
        "Made by `make report` from the files in `benchmarks/results`, which `make bench` writes; "
        "[how it is measured](benchmarks.md). Each folder there has a page with every implementation, pass and peak "
        "memory.",
        "",
        tables.EXPLANATION,
    ]
    measured = devices(folder)
    if not any(runs[0]["device"]["type"] == "cuda" for runs in measured.values()):
        lines += ["", "No figure here was measured on a GPU."]
    for path, runs in measured.items():
        lines += ["", f"## {runs[0]['device']['name']}", ""]
        lines += [*tables.versions(runs), "", *tables.table(tables.SUMMARY_HEADER, tables.summary(runs))]
        for run in runs:
            if run["topic"] in WHOLE_MODELS:
                lines += ["", f"### {tables.TITLES[run['topic']]}", "", *tables.notes(run)]
                lines += tables.case_tables(run, complete=True)
        lines += [f"#{line}" if line.startswith("## ") else line for line in own_sections(path)]
        lines += ["", "### How cost grows"]
        for picture in pictures(path):
            if picture.name == decode.PICTURE:
                continue
            words = picture.stem.replace("_", " ")
            lines += ["", f"![{words}](assets/results/{path.name}/{picture.name})"]
    return "\n".join(lines) + "\n"


def own_sections(path: Path) -> list[str]:
    """What was measured beside the suite, for docs/results.md."""
    shown = [*decode.section(path), *overhead.section(path)]
    return [line.replace(f"({decode.PICTURE})", f"(assets/results/{path.name}/{decode.PICTURE})") for line in shown]


def pictures(path: Path) -> list[Path]:
    """Of a device's pictures those that docs/results.md shows: how cost grows, and the training step."""
    return sorted(p for p in path.glob("*.png") if not p.stem.endswith("_bars") or p.stem == "training_step_bars")


def write_docs(folder: Path) -> None:
    DOCS_PAGE.write_text(docs_page(folder), encoding="utf-8")
    shutil.rmtree(DOCS_PICTURES, ignore_errors=True)
    for path in devices(folder):
        (DOCS_PICTURES / path.name).mkdir(parents=True)
        for picture in pictures(path):
            shutil.copy(picture, DOCS_PICTURES / path.name)


def blocks() -> dict[str, str]:
    """What `make report` writes into README.md, by the name of the block."""
    return {"support": support.table(), "figures": figures(RESULTS)}


def rewritten(text: str) -> str:
    """The text with every block made here replaced."""
    for name, block in blocks().items():
        parts = re.split(rf"(<!-- {name}: made by `make report` -->\n|<!-- /{name} -->)", text)
        if len(parts) != 5:
            raise ValueError(f"README.md: found {len(parts) // 4} blocks of {name}, wanted 1")
        text = "".join([*parts[:2], block, *parts[3:]])
    return text


def main() -> None:
    if len(sys.argv) > 1:
        pages = write_pages(Path(sys.argv[1]))
    else:
        pages = write_pages(RESULTS)
        README.write_text(rewritten(README.read_text("utf-8")), encoding="utf-8")
        write_docs(RESULTS)
    print("\n".join(str(path) for path in pages) or "no results")


if __name__ == "__main__":
    main()
