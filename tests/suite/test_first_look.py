"""Test the first look at a device: calls within the allowed errors, planted faults, and a kernel that raises."""

import json
import sys

import pytest
import torch

from benchmarks import first_look
from gpt_fast import ops

LOOKS = {f"{look.op} {look.name} {look.dtype}": look for look in first_look.looks()}


def test_names_are_unique_and_every_op_is_looked_at():
    assert len(LOOKS) == len(list(first_look.looks()))
    assert {look.op for look in LOOKS.values()} == set(ops.NAMES)


@pytest.mark.parametrize("name", LOOKS)
def test_calls_within_what_is_allowed(name):
    assert first_look.look_at(LOOKS[name], "cpu")["outcome"] == "pass"


def test_a_wrong_gradient_fails(monkeypatch):
    """A bias gradient that is 1 % too large fails."""
    right = ops.layer_norm

    def wrong(x, weight=None, bias=None, eps=1e-5):
        return right(x, weight, bias * 1.01 - 0.01 * bias.detach(), eps)

    monkeypatch.setattr(first_look.ops, "layer_norm", wrong)
    record = first_look.look_at(LOOKS["layer_norm C=768 torch.float32"], "cpu")
    assert record["outcome"] == "fail"
    assert record["of"] == "gradient of bias"


def test_a_wrong_sum_fails(monkeypatch):
    """An error in add_layer_norm's `summed`, from which the exact `normed` is computed, is reported for `summed`."""
    right = ops.add_layer_norm

    def wrong(*args, **kwargs):
        normed, summed = right(*args, **kwargs)
        return normed, summed * 1.01

    monkeypatch.setattr(first_look.ops, "add_layer_norm", wrong)
    record = first_look.look_at(LOOKS["add_layer_norm C=768 dropout torch.float32"], "cpu")
    assert record["outcome"] == "fail"
    assert record["of"].startswith("out1: ")


def test_nan_fails(monkeypatch):
    right = ops.decode_attention
    monkeypatch.setattr(first_look.ops, "decode_attention", lambda *a, **k: right(*a, **k) * torch.nan)
    assert first_look.look_at(LOOKS["decode_attention D=64 torch.float32"], "cpu")["outcome"] == "fail"


def test_the_command_prints_and_writes_each_call(tmp_path, monkeypatch, capsys):
    """A kernel that raises counts as one failure, and the next call still runs."""
    right, calls = ops.decode_attention, []

    def raises_once(q, k_cache, v_cache, lengths):
        calls.append(q.shape)
        if len(calls) == 1:
            raise RuntimeError("an illegal memory access\nand more")
        return right(q, k_cache, v_cache, lengths)

    monkeypatch.setattr(first_look.ops, "decode_attention", raises_once)
    out = tmp_path / "looks.jsonl"
    monkeypatch.setattr(sys, "argv", ["first_look", "--device", "cpu", "--only", "decode_attention", "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        first_look.main()
    assert ended.value.code == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "fail  decode_attention D=64 bfloat16: RuntimeError: an illegal memory access"
    assert printed[-1] == "first_look: 2 of 3 calls within what is allowed"
    assert [json.loads(line)["outcome"] for line in out.read_text().splitlines()] == ["fail", "pass", "pass"]


def test_parts_share_the_calls(monkeypatch):
    seen = []

    def look_at(look, device):
        seen.append(look[:3])
        return {"op": look.op, "case": look.name, "dtype": "", "outcome": "pass", "share": 0.0, "of": "out"}

    monkeypatch.setattr(first_look, "look_at", look_at)
    for part in range(1, 9):
        monkeypatch.setattr(sys, "argv", ["first_look", "--device", "cpu", "--part", f"{part}/8"])
        with pytest.raises(SystemExit):
            first_look.main()
    assert sorted(map(str, seen)) == sorted(str(look[:3]) for look in first_look.looks())
