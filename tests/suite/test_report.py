"""Test the files that the suite writes and reads: results, comparisons, tables, targets, pictures and pages."""

import dataclasses
import json

import pytest

from benchmarks.measure import environment
from benchmarks.models import counts
from benchmarks.report import markdown, pages, plots, results, tables, targets
from benchmarks.topic import FLOOR, LEFT, OURS, TOKENS, Target
from tests.suite.figures import FLOORS, a_run, record


@pytest.mark.parametrize(
    ("old", "new", "beyond"),
    [
        pytest.param((1.0, 0.0), (1.02, 0.0), False, id="2 % are noise even without spread"),
        pytest.param((1.0, 0.02), (1.05, 0.02), True, id="5 % slower, spreads of 4 %"),
        pytest.param((1.0, 0.02), (0.95, 0.02), True, id="5 % faster"),
        pytest.param((1.0, 0.06), (1.1, 0.05), False, id="10 % slower within spreads of 11 %"),
        pytest.param((1.0, 0.5), (2.0, 0.4), True, id="twice as slow"),
    ],
)
def test_compare_knows_noise(old, new, beyond):
    (change,) = results.compare(
        [a_run(record(median=old[0], spread=old[1]))], [a_run(record(median=new[0], spread=new[1]))]
    )
    assert change["beyond"] == beyond
    assert change["ratio"] == pytest.approx(new[0] / old[0])


def test_compare_matches_case_pass_and_implementation():
    old = a_run(record(), record(peer="torch"), record(case="M=5 float32"))
    new = a_run(record(median=2.0), record(peer="Liger"))
    assert [(change["peer"], change["ratio"]) for change in results.compare([old], [new])] == [(OURS, 2.0)]
    assert results.compare([old], [a_run(record(), topic="mlp")]) == []


def test_floor_is_the_longer_of_moving_and_computing():
    run = a_run(record())
    work = {"forward": {"bytes": 20e9, "flops": 100e9, "bound": "copy"}}
    assert results.floor_seconds(record(work=work), "forward", FLOORS) == pytest.approx(2.0)
    work = {"forward": {"bytes": 20e9, "flops": 300e9, "bound": "read"}}
    assert results.floor_seconds(record(work=work), "forward", FLOORS) == pytest.approx(3.0)
    # On a CPU that multiplies bfloat16 slowly, the floor uses the float32 rate: kernels may compute in float32.
    slow = FLOORS | {"matmul bfloat16": {"rate": 1e9}}
    assert results.floor_seconds(record(work=work, dtype="bfloat16"), "forward", slow) == pytest.approx(3.0)
    assert results.share_of_floor(run, run["records"][0], "forward") == pytest.approx(0.5)


def test_read_takes_what_was_written(tmp_path):
    run = a_run(record())
    results.write(run, tmp_path / "layer_norm.json")
    assert results.read_any(tmp_path) == results.read_any(tmp_path / "layer_norm.json") == [run]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("{", "not JSON", id="not JSON"),
        pytest.param("[1, 2]", "not a results file of benchmarks; expected schema", id="no object"),
        pytest.param('{"benchmarks": []}', "not a results file of benchmarks", id="another program's"),
        pytest.param(json.dumps(a_run(version=7)), "version 7; expected version 1", id="another version"),
        pytest.param(
            json.dumps(a_run(records={}, missing=None)), "damaged results file: records, missing", id="damaged"
        ),
        pytest.param(json.dumps(a_run({"case": "x"})), "damaged results file: fields of a record", id="damaged record"),
    ],
)
def test_read_refuses(tmp_path, content, message):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        results.read(tmp_path / "x.json")
    assert "x.json" in str(error.value)


# ---- reports


def test_page_shows_every_figure(tmp_path):
    run = a_run(record(median=1.0, spread=0.1), record(peer="torch", median=1.5, spread=0.0))
    text = pages.device_page(tmp_path, [run], {"layer_norm_bars.png": "bars"})
    assert "| gpt_fast | 1 s ± 5% | 1.00 | 50% | 3 MiB |" in text
    assert "| torch | 1.5 s ± 0% | 1.50 | 33% | 3 MiB |" in text
    assert "| layer_norm M=4 float32, forward | 1 s | 50% | 1.50 × torch |" in text
    assert "copy 10 GB/s, read 20 GB/s, matmul float32 100 GFLOP/s" in text
    assert "Commit ffffffffffff; torch 2." in text
    assert "![bars](layer_norm_bars.png)" in text


@pytest.mark.parametrize("kept", [{"keeps_freed": True}, {"keeps_freed": False}, {}], ids=["kept", "given_back", "old"])
def test_a_page_says_whether_freed_memory_was_kept(kept):
    run = a_run(record())
    run["sessions"][0] |= kept
    assert ("keeps freed memory" in tables.notes(run)[0]) == (kept == {"keeps_freed": True})


def test_page_shows_quiet_and_busy_speeds_side_by_side(tmp_path):
    quiet = a_run(record(median=1.0), record(peer="torch", median=1.5))
    busy = a_run(record(peer=f"{OURS}, {LEFT}", median=1.8), record(median=2.0), record(peer="torch", median=6.0))
    runs = [quiet, busy | {"busy": True}]
    text = pages.device_page(tmp_path, runs, {})
    assert "| layer_norm M=4 float32: gpt_fast | 1 s | 2 s | 50% | 90% |" in text
    assert "| layer_norm M=4 float32: torch | 1.5 s | 6 s | 25% |  |" in text
    assert "## layer_norm, beside a busy process" in text
    assert "ran beside on purpose" in text
    assert tables.summary(runs) == tables.summary([quiet])
    assert results.compare([quiet], [runs[1]]) == []


@pytest.mark.parametrize(("busy", "expected"), [(False, [1.5]), (True, [3.0, 0.9])])
def test_targets_of_busy_and_of_quiet_runs(busy, expected, monkeypatch):
    there = (
        Target("torch", 1.3),
        Target("torch", 1.0, busy=True),
        Target(f"{OURS}, {LEFT}", 0.8, busy=True),
        Target("torch", 1.3, products="int8_products"),
    )
    topic = dataclasses.replace(targets.catalogue.topics()["layer_norm"], targets=lambda case: there)
    monkeypatch.setattr(targets.catalogue, "topics", lambda: {"layer_norm": topic})
    quiet = [record(median=1.0), record(peer="torch", median=1.5)]
    beside = [record(peer=f"{OURS}, {LEFT}", median=1.8), record(median=2.0), record(peer="torch", median=6.0)]
    run = a_run(*(beside if busy else quiet), **({"busy": True} if busy else {}))
    run["device"]["int8_products"] = False
    assert [verdict.reached for verdict in targets.verdicts([run])] == pytest.approx(expected)
    assert targets.unjudged([run]) == [f"{OURS}: this CPU has no int8 products"]


def test_data_sheets_are_shown_beside_the_floors_and_shares_are_not_taken_of_them(tmp_path):
    device = {"type": "cuda", "name": "NVIDIA H200", "slug": "nvidia-h200", "bf16_products": True}
    text = pages.device_page(tmp_path, [a_run(record(median=1.0), device=device)], {})
    assert "copy 10 GB/s (data sheet 4.8 TB/s), read 20 GB/s" in text
    assert "| gpt_fast | 1 s ± 0% | 1.00 | 50% | 3 MiB |" in text


def test_numbers_that_round_up_to_the_next_unit():
    values = (2.5, 0.9996, 999.6, 1234.4, 9.996e-4, 9.994e-4, 1e-9)
    shown = ["2.5 s", "1 s", "1000 s", "1234 s", "1 ms", "999 µs", "0.001 µs"]
    assert [markdown.seconds(value) for value in values] == shown
    assert markdown.rate("copy", 9.996e11) == "1 TB/s" and markdown.rate("copy", 9.99e11) == "999 GB/s"


@pytest.mark.parametrize(
    ("name", "copy"), [("NVIDIA H200", 4.8e12), ("NVIDIA GH200 480GB", None), ("NVIDIA A100-SXM4-80GB", 2.039e12)]
)
def test_a_data_sheet_is_that_of_the_whole_name(name, copy):
    assert environment.data_sheet(name).get("copy") == copy


def test_highlights_put_passes_together():
    """README.md shows the largest case of each topic, dtype and dropout.

    It compares with the fastest implementation of others that does all of the work.
    """
    two = {"forward": record()["times"]["forward"], "backward": record(median=2.0)["times"]["forward"]}
    work = dict.fromkeys(two, record()["work"]["forward"])
    fast = {name: time | {"median": time["median"] / 4} for name, time in two.items()}
    rows = [
        record("M=1"),
        record(times=two, work=work),
        *(record(peer=peer, times=fast, work=work) for peer in ("products alone", "reference", "gpt_fast compiled")),
        record(peer="torch", times={"forward": fast["forward"]}),
        record(peer="Liger", times={name: time | {"median": 4.5} for name, time in two.items()}),
        record("M=9", complete=False),
    ]
    expected = ["layer_norm M=4 float32, forward + backward", "3 s", "33%", "3.00 × Liger"]
    assert tables.highlights([a_run(*rows)]) == [expected]


def test_speedups_are_of_whole_models(tmp_path):
    """A device's picture shows the largest case of each job, compared with the fastest other implementation."""
    job = a_run(record(median=1.0), record(peer="plain", median=1.5), record(peer="torch", median=1.2), suite="train")
    assert tables.speedups([a_run(record(), record(peer="torch", median=3.0))]) == {}
    assert tables.speedups([job]) == {"layer_norm M=4 float32, forward": (pytest.approx(1.2), "torch")}
    assert plots.OVERVIEW in pages.draw(tmp_path, [job])


def test_training_shows_tokens_and_mfu(tmp_path):
    work = {"step": {"bytes": 0, "flops": 50e9, "bound": "copy"}}
    sizes = {"model": "gpt2", "B": 1, "T": 1234}
    step = record(times={"step": record()["times"]["forward"]}, work=work, tokens=1234, sizes=sizes)
    run = a_run(step, topic="training_step", suite="train")
    assert tables.mfu(run, step) == pytest.approx(0.5)
    text = pages.device_page(tmp_path, [run], {})
    assert "| gpt_fast | 1 s ± 0% | 1.00 | 50% | 1,234 | 50% | 3 MiB |" in text
    assert counts.MFU_FORMULA in text


def test_plots(tmp_path):
    """A series of cases gives a picture of speed and one of memory, and other cases give bars.

    Pictures of older runs are deleted.
    """
    grows = [
        record(f"T={T}", peer, T / 1e6, sizes={"B": 1, "T": T}, series="T")
        for T in (1024, 2048)
        for peer in (OURS, "sdpa flash")
    ]
    (tmp_path / "old.png").write_bytes(b"")
    written = pages.draw(tmp_path, [a_run(*grows, record("M=1"), record("M=2"), topic="attention")])
    assert set(written) == {"attention_T_float32.png", "attention_T_float32_memory.png", "attention_bars.png"}
    assert {path.name for path in tmp_path.iterdir()} == set(written)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())


# ---- targets


def judged(target, *records):
    run = a_run(*records)
    return targets.judge(run, results.by_case(run)["M=4 float32"], target)


@pytest.mark.parametrize(
    ("target", "reached"),
    [
        pytest.param(Target("torch", 1.0), 1.5, id="one"),
        pytest.param(Target(("torch", "Liger"), 1.0), 1.2, id="the fastest of several"),
        pytest.param(Target(("Liger", "nobody"), 1.0), 1.2, id="the fastest that ran"),
        pytest.param(Target("torch", 1.0, who="Liger"), 1.25, id="between two others"),
        pytest.param(Target(FLOOR, 0.85), 0.5, id="a share of the floor"),
        pytest.param(Target(TOKENS, 1000), 500.0, id="tokens a second"),
        pytest.param(Target("nobody", 1.0), None, id="did not run"),
        pytest.param(Target("torch", 1.0, ("backward",)), None, id="a pass that was not measured"),
    ],
)
def test_targets_are_judged(target, reached):
    """Judge targets where the floor takes 0.5 s, ours 1 s, torch 1.5 s and Liger 1.2 s."""
    records = [record(tokens=500), record(peer="torch", median=1.5), record(peer="Liger", median=1.2)]
    verdict = judged(target, *records)
    assert (verdict and verdict.reached) == (reached and pytest.approx(reached))
    assert verdict is None or verdict.met == (reached >= target.times)


def test_a_target_prefers_pairs_to_medians():
    peer = record(peer="torch", median=9.0)
    peer["times"]["forward"]["to_ours"] = {"median": 1.5, "q1": 1.4, "q3": 1.6}
    assert judged(Target("torch", 2.0), record(), peer).reached == 1.5
    assert "1.50 (1.40 to 1.60)" in tables.rows(a_run(record(), peer), {OURS: record(), "torch": peer})[1]


def test_a_page_has_the_targets_of_its_cases(tmp_path):
    text = pages.device_page(tmp_path, [a_run(record(), record(peer="torch", median=0.5))], {})
    assert "| layer_norm M=4 float32, forward | torch | 1.00 × | 0.50 × | **no** |" in text


# ---- pages


def test_report_writes_a_page_for_each_device(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        results.write(a_run(record()), tmp_path / name / "layer_norm.json")
    (tmp_path / "empty").mkdir()
    written = pages.write_pages(tmp_path)
    assert [page.parent.name for page in written] == ["one", "two"]
    assert "# A CPU" in written[0].read_text()


def test_committed_pages_are_made_from_the_committed_files():
    """The committed pages, and the figures in README.md, are exactly what `make report` makes of the results files."""
    found = pages.devices(pages.RESULTS)
    assert found
    for folder, runs in found.items():
        text = (folder / "README.md").read_text("utf-8")
        studies = {pages.picture_of(study.name) for study, _ in results.read_studies(folder)}
        shown = {path.name: "" for path in folder.glob("*.png") if path.name not in studies}
        page = pages.device_page(folder, runs, shown)
        without = [line for line in text.splitlines() if not line.startswith("![")]
        assert without == [line for line in page.splitlines() if not line.startswith("![")], "make report"
    for page in (pages.README, pages.HOME):
        assert pages.rewritten(page) == page.read_text("utf-8"), f"{page.name}: make report"
    assert pages.docs_page(pages.RESULTS) == pages.DOCS_PAGE.read_text("utf-8"), "make report"


def test_marked_blocks_of_a_page_are_replaced(monkeypatch, tmp_path):
    monkeypatch.setattr(pages, "blocks", lambda page: {"a": "new\n"})
    page = tmp_path / "README.md"
    page.write_text("x\n<!-- a: made by `make report` -->\nold\n<!-- /a -->\ny\n")
    assert pages.rewritten(page) == page.read_text().replace("old", "new")
    page.write_text("x")
    with pytest.raises(ValueError, match="README.md has 0 blocks of a"):
        pages.rewritten(page)
