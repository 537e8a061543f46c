"""Write every table and picture from the files of results: `python -m benchmarks.report [DIR]`.

For each device's folder in DIR (benchmarks/results by default) it writes README.md and the pictures, from its JSON
files. Without DIR it also writes docs/performance/results.md and the marked blocks of README.md and docs/index.md.
"""

import sys
from pathlib import Path

from benchmarks.report.pages import DOCS_PAGE, HOME, README, RESULTS, docs_page, rewritten, write_pages


def main() -> None:
    """Write a page, README.md, and pictures into each device's folder of results, and print the paths of these pages.

    Other *.png files in such a folder are deleted.

    The devices' folders are those in the folder that the command line names, by default benchmarks/results. Only
    without an argument the marked blocks of the checkout's README.md and docs/index.md, and the page
    docs/performance/results.md, are rewritten too. "no results" is printed if there is none.
    """
    if len(sys.argv) > 1:
        pages = write_pages(Path(sys.argv[1]))
    else:
        pages = write_pages(RESULTS)
        for page in (README, HOME):
            page.write_text(rewritten(page), encoding="utf-8")
        DOCS_PAGE.write_text(docs_page(RESULTS), encoding="utf-8")
    print("\n".join(str(path) for path in pages) or "no results")


if __name__ == "__main__":
    main()
