"""benchmarks/decode.py: what a token costs against what reading weights and cache takes."""

import json

import pytest

from benchmarks import decode, environment
from gpt_fast import GPTConfig


@pytest.fixture
def record(monkeypatch):
    """Of a model that is decoded in microseconds."""
    tiny = GPTConfig.preset("gpt2").replace(
        num_tokens=97, seq_len=256, num_layers=2, num_heads=2, hidden_dim=16, ff_dim=64
    )
    monkeypatch.setattr(decode.GPTConfig, "preset", lambda name: tiny)
    monkeypatch.setattr(decode, "READ", 1 << 20)
    figures = decode.measure("tiny", tokens=8, repeats=2)
    curves = {weights: decode.curve("tiny", weights) for weights in decode.WEIGHTS}
    return {**environment.describe("cpu"), "date": "2026-01-01 00:00", "load": 0.5, **figures, "curves": curves}


def test_figures(record):
    for weights, width in (("float32", 4), ("bfloat16", 2), ("int8", 1)):
        figure = record[weights]
        low, high = figure["range"]
        assert 0 < low <= figure["seconds"] <= high < 1
        # Of two layers the matrices, 12 C² each, and the output layer's; int8 has a scale of each row beside.
        assert figure["bytes"] >= width * (2 * 12 * 16**2 + 97 * 16)
        assert decode.bound({"bytes": 600, "bytes_per_cached_token": 10}, 40, 500.0) == 2.0
    assert record["float32"]["bytes_per_cached_token"] == 2 * 2 * 16 * 4
    assert all(record[peer]["seconds"] > 0 for peer in decode.PEERS.values())


def test_curve(record):
    for points in record["curves"].values():
        assert [place for place, _, _ in points] == list(range(0, 256, 16))
        assert all(0 < seconds < 1 and bandwidth > 0 for _, seconds, bandwidth in points)


def test_section(record, tmp_path):
    assert decode.section(tmp_path) == []
    (tmp_path / decode.FILE).write_text(json.dumps(record), encoding="utf-8")
    lines = decode.section(tmp_path)
    for weights in decode.WEIGHTS:
        (row,) = (line for line in lines if line.startswith(f"| {weights} |"))
        assert f"| {record[weights]['seconds'] * 1e3:.2f} |" in row
        assert f"| {record[weights]['of_bound']:.0%} |" in row
    assert not any("Missing" in line for line in lines)
    without = {name: value for name, value in record.items() if not name.startswith("hf ")}
    assert any("Missing: transformers" in line for line in decode.lines(without))
    assert any(decode.PICTURE in line for line in lines)
    decode.draw(tmp_path)
    assert (tmp_path / decode.PICTURE).read_bytes().startswith(b"\x89PNG")
