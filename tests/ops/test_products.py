"""Test the rule that chooses between this library's and PyTorch's products for linear on a CPU."""

import json

import pytest
import torch
import torch.nn.functional as F

import gpt_fast
from gpt_fast import ops
from gpt_fast.ops import _products
from gpt_fast_cli.tune import tune as command

pytestmark = pytest.mark.skipif(
    ops.serving("linear", "cpu") != "cpp", reason="without the C++ kernel nothing is chosen"
)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Return the path of the user's table in an empty folder. The table is forgotten before and after the test."""
    monkeypatch.setenv("GPT_FAST_LAUNCH_CONFIGS", str(tmp_path))
    _products.forget()
    yield tmp_path / "cpu.json"
    _products.forget()


def write(table, *rules, **fields):
    """Write a table of this machine with `rules`, (dtype, is_autocast, rows, our seconds, PyTorch's seconds) each."""
    entries = [_products.Rule(*rule)._asdict() for rule in rules]
    table.write_text(json.dumps({"format": _products.FORMAT, **_products.machine(), "rules": entries} | fields))
    _products.forget()


@pytest.fixture
def by_torch(monkeypatch):
    """Return a list that gets the dtype of x and of the weight for each call of `F.linear`."""
    called, stock = [], F.linear
    monkeypatch.setattr(F, "linear", lambda *a: called.append((a[0].dtype, a[1].dtype)) or stock(*a))
    return called


def test_nothing_changes_without_a_table(table, by_torch):
    ops.linear(torch.randn(3, 4), torch.randn(5, 4))
    assert not by_torch and not table.exists()


@pytest.mark.parametrize(
    ("rows", "chosen"), [(1, False), (16, False), (17, True), (128, True), (129, False), (5000, False)]
)
def test_the_number_of_rows_decides(rows, chosen, table, by_torch):
    """The row of the table with the next larger number of rows counts, and the last one for more rows than any."""
    write(table, ("float32", False, 16, 1, 2), ("float32", False, 128, 2, 1), ("float32", False, 1024, 1, 1))
    x, weight = torch.randn(rows, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    y = ops.linear(x.view(1, rows, 4), weight)
    assert bool(by_torch) == chosen
    torch.testing.assert_close(y[0], x @ weight.t())
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    torch.testing.assert_close(dx, weight.sum(0).expand(rows, 4))
    torch.testing.assert_close(dweight, x.sum(0).expand(5, 4))


def test_noise_does_not_decide(table, by_torch):
    write(table, ("float32", False, 1024, 1.0, 0.96))
    ops.linear(torch.randn(3, 4), torch.randn(5, 4))
    assert not by_torch


def test_each_dtype_has_its_rule_and_autocast_its_own(table, by_torch):
    write(table, ("bfloat16", False, 1024, 2, 1), ("float16", True, 1024, 2, 1))
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    ops.linear(x, weight)
    ops.linear(x.half(), weight.half())
    with torch.autocast("cpu", torch.bfloat16):
        ops.linear(x, weight)
    assert not by_torch
    ops.linear(x.bfloat16(), weight.bfloat16())
    with torch.autocast("cpu", torch.float16):
        y = ops.linear(x, weight)
    assert by_torch == [(torch.bfloat16,) * 2, (torch.float16,) * 2] and y.dtype == torch.float16


def test_the_rule_holds_inside_a_compiled_graph(table, by_torch):
    write(table, ("float32", False, 1024, 2, 1))
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    got = torch.compile(ops.linear, backend="eager", fullgraph=True, dynamic=True)(x, weight)
    assert by_torch and torch.equal(got, x @ weight.t())


@pytest.mark.parametrize("field", ["device", "torch", "threads"])
def test_a_table_of_another_machine_is_left_out(field, table, by_torch):
    write(table, ("float32", False, 1024, 2, 1), **{field: "another"})
    with pytest.warns(UserWarning, match="cpu.json was measured on .*another.*run gpt-fast tune"):
        ops.linear(torch.randn(3, 4), torch.randn(5, 4))
    ops.linear(torch.randn(3, 4), torch.randn(5, 4))  # says so once
    assert not by_torch


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "rules": 3}', '{"format": 1, "rules": [{"rows": 1}]}']
)
def test_a_damaged_table(content, table):
    table.write_text(content)
    with pytest.raises(
        ValueError, match=r"cpu.json has .*; expected a table of products: remove it, or run gpt-fast tune"
    ):
        ops.linear(torch.randn(3, 4), torch.randn(5, 4))


def test_an_unknown_dtype_damages_the_table(table):
    write(table, ("float8", False, 16, 1, 2))
    with pytest.raises(ValueError, match="no entry 'float8'"):
        ops.linear(torch.randn(3, 4), torch.randn(5, 4))


def test_the_command_measures_and_writes(table, by_torch, monkeypatch, capsys):
    """Every rule is measured: float32, and each 16-bit dtype with weights in it and in float32, by number of rows."""
    monkeypatch.setattr(_products, "SIZES", (8, 12))
    command(None, "cpu", as_json=True)
    shown = json.loads(capsys.readouterr().out)
    assert shown["file"] == str(table)
    measured = [(rule["dtype"], rule["is_autocast"], rule["rows"]) for rule in shown["rules"]]
    kinds = [("float32", False), *((name, flag) for name in ("bfloat16", "float16") for flag in (False, True))]
    assert measured == [(*kind, rows) for kind in kinds for rows in _products.ROWS]
    assert all(rule["gpt_fast"] > 0 and rule["torch"] > 0 for rule in shown["rules"])
    by_torch.clear()
    first = shown["rules"][0]
    ops.linear(torch.randn(first["rows"], 8), torch.randn(12, 8))
    assert bool(by_torch) == (first["faster"] == "torch")


def test_the_command_shows_a_table(table, monkeypatch, capsys):
    rules = [_products.Rule("float32", False, 16, 0.002, 0.001), _products.Rule("float16", True, 1024, 0.001, 0.002)]
    monkeypatch.setattr(_products, "tune", lambda path: iter(rules))
    command(["linear"], "cpu", as_json=False)
    assert capsys.readouterr().out.splitlines() == [
        f"written to {table}",
        "  float32, 16 rows                 PyTorch (gpt_fast 2.00 ms, PyTorch 1.00 ms)",
        "  float16 by autocast, 1,024 rows  gpt_fast (gpt_fast 1.00 ms, PyTorch 2.00 ms)",
    ]


def test_the_command_needs_a_folder_and_a_kernel(monkeypatch):
    monkeypatch.setenv("GPT_FAST_LAUNCH_CONFIGS", "")
    with pytest.raises(ValueError, match="GPT_FAST_LAUNCH_CONFIGS is empty; expected a folder"):
        command(None, "cpu", as_json=False)
    monkeypatch.setattr(gpt_fast.ops, "serving", lambda op, device: "reference")
    with pytest.raises(RuntimeError, match="linear has no C\\+\\+ kernel here"):
        command(None, "cpu", as_json=False)
