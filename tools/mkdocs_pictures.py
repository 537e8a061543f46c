"""Hook of mkdocs: brings the pictures of benchmarks/results into the site, where the page of the results shows them.

The pictures are committed once, beside the figures they are drawn from. Pages link to them by the path that is right in
the repository; in the site they lie in `results/`.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

RESULTS = Path("benchmarks") / "results"
SITE = "results"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pictures benchmarks/results/*/*.png to `files`, the site's files, and return `files`.

    In the site they lie below `results/`, in one folder for each device. mkdocs calls this function after it has
    collected the files.
    """
    root = Path(config.config_file_path).parent
    for picture in sorted((root / RESULTS).glob("*/*.png")):
        place = f"{SITE}/{picture.relative_to(root / RESULTS).as_posix()}"
        files.append(File.generated(config, place, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Return the page's Markdown with links to pictures in benchmarks/results changed to their place in the site.

    Only image links that climb by `../` to benchmarks/results are changed. mkdocs calls this function for each page.
    """
    place = posixpath.relpath(SITE, posixpath.dirname(page.file.src_uri))
    return re.sub(rf"(!\[[^\]]*\]\()(?:\.\./)+{RESULTS.as_posix()}/", rf"\1{place}/", markdown)
