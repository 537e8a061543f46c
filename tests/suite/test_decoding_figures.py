"""Test the study of decoding, which compares the time of a token with the time to read the weights and the cache."""

import pytest

from benchmarks.jobs import decoding
from benchmarks.measure import environment
from benchmarks.report import pages, results
from gpt_fast import GPTConfig


@pytest.fixture
def record(monkeypatch):
    """Return the study's record for a model that decodes a token in microseconds."""
    tiny = GPTConfig.preset("gpt2").replace(
        num_tokens=97, seq_len=256, num_layers=2, num_heads=2, hidden_dim=16, ff_dim=64
    )
    monkeypatch.setattr(decoding.GPTConfig, "preset", lambda name: tiny)
    monkeypatch.setattr(decoding, "READ", 1 << 20)
    head = {"schema": results.SCHEMA, "version": results.VERSION, "topic": "decoding", "suite": "decode", "quick": True}
    facts = environment.describe("cpu") | {"date": "2026-01-01 00:00", "load": 0.5}
    return head | facts | decoding.measure("cpu", quick=True, cpu_time=False)


def test_figures(record):
    for weights, width in (("float32", 4), ("bfloat16", 2), ("int8", 1)):
        figure = record[weights]
        low, high = figure["range"]
        assert 0 < low <= figure["seconds"] <= high < 1
        # Two layers have matrices of 12 C² weights each, and the output layer has V C. int8 also has scales of rows.
        assert figure["bytes"] >= width * (2 * 12 * 16**2 + 97 * 16)
        assert decoding.bound({"bytes": 600, "bytes_per_cached_token": 10}, 40, 500.0) == 2.0
    assert record["float32"]["bytes_per_cached_token"] == 2 * 2 * 16 * 4
    assert all(record[peer]["seconds"] > 0 for peer in decoding.PEERS.values())


def test_curve(record):
    for points in record["curves"].values():
        assert [place for place, _, _ in points] == list(range(0, 256, 16))
        assert all(0 < seconds < 1 and bandwidth > 0 for _, seconds, bandwidth in points)


def test_section_and_picture(record, tmp_path):
    """A device's page shows the record. For a machine without transformers it says that transformers is missing."""
    assert pages.study_sections(tmp_path) == []
    results.write(record, tmp_path / "decoding.json")
    lines = pages.study_sections(tmp_path, "../there/")
    for weights in decoding.WEIGHTS:
        (row,) = (line for line in lines if line.startswith(f"| {weights} |"))
        assert f"| {record[weights]['seconds'] * 1e3:.2f} |" in row
        assert f"| {record[weights]['of_bound']:.0%} |" in row
    assert not any("Missing" in line for line in lines)
    assert any("(../there/decoding.png)" in line for line in lines)
    without = {name: value for name, value in record.items() if not name.startswith("hf ")}
    assert any("Missing: transformers" in line for line in decoding.lines(without))


def test_a_device_with_studies_alone_has_a_page(record, tmp_path):
    (tmp_path / "device").mkdir()
    results.write(record, tmp_path / "device" / "decoding.json")
    (page,) = pages.write_pages(tmp_path)
    text = page.read_text("utf-8")
    assert text.startswith(f"# {record['device']['name']}\n")
    assert "(decoding.png)" in text
    assert "## Summary" not in text
    assert (tmp_path / "device" / "decoding.png").read_bytes().startswith(b"\x89PNG")
