"""Write every table and picture from the files of results: `python -m benchmarks.report [DIR]`.

For each device's folder in DIR (benchmarks/results by default) it writes README.md and the pictures, from its JSON
files. Without DIR it also writes docs/performance/results.md and the marked blocks of README.md and docs/index.md.
"""

import sys
from pathlib import Path

from benchmarks.report.pages import DOCS_PAGE, HOME, README, RESULTS, docs_page, rewritten, write_pages


def main() -> None:
    """Write README.md and pictures into each device's folder of results, and print the paths of these README.md files.

    Other *.png files in a device's folder are deleted. The command line may name the folder that holds the devices'
    folders, by default benchmarks/results. "no results" is printed if no device has results.

    Without an argument, three files of the documentation are rewritten too: docs/performance/results.md as a whole, and
    the marked blocks in docs/index.md and in the README.md at the root of the checkout.
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
