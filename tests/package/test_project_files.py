"""Test that other files of the project agree: both forms of CI, the citation, the log and the guides."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]


def test_both_forms_of_ci_run_the_same_targets():
    script = re.findall(r"^step make (\w+)", (ROOT / ".ci/run").read_text("utf-8"), re.MULTILINE)
    job = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text("utf-8"))["jobs"]["gate"]
    runs = [step["run"] for step in job["steps"] if "run" in step]
    assert [run.removeprefix("make ") for run in runs] == ["install", "${{ matrix.target }}"]
    assert script == ["install", *job["strategy"]["matrix"]["target"]]


def test_the_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    fields = dict(re.findall(r'^(name|version|license) = "(.*)"$', project, re.MULTILINE))
    assert citation["version"] == fields["version"]
    assert citation["license"] == fields["license"]
    assert fields["name"].replace("-", "_") in citation["title"]


def test_the_log_has_its_newest_entry_first():
    dates = re.findall(r"^## (\d{4}-\d{2}-\d{2}): ", (ROOT / "docs/log.md").read_text("utf-8"), re.MULTILINE)
    headings = re.findall(r"^## .*", (ROOT / "docs/log.md").read_text("utf-8"), re.MULTILINE)
    assert len(dates) == len(headings)
    assert dates == sorted(dates, reverse=True)


def test_each_guide_begins_with_a_command_or_code():
    """Each guide shows its subject in a code block right after the title. Only comments may stand between them."""
    late = []
    for page in sorted((ROOT / "docs/guides").glob("*.md")):
        text = re.sub(r"<!--.*?-->", "", page.read_text("utf-8"), flags=re.DOTALL)
        if not re.match(r"# [^\n]+\n\s*```(sh|python)", text):
            late.append(page.name)
    assert late == []
