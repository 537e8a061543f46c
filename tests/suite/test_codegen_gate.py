"""The codegen gate judges figures of compiled kernels. These tests give it figures; nothing is compiled."""

import copy

import pytest

from kernels.architectures import ARCHITECTURES
from tools import codegen

LOOP = {"instructions": 400, "lds": 2, "sts": 2, "shfl": 4, "local": 0}
KERNEL = {"registers": 128, "spilled": 0, "shared": 65536, "instructions": 1700, "needs_wgmma": 1, "wgmma": 8}
TARGETED = next(f"sm_{row.capability}" for row in ARCHITECTURES if row.targeted)
PLAIN, DROPOUT = "attention fwd D=64 bfloat16", "attention fwd D=64 bfloat16 dropout"


def figures(cost: int, target: str = TARGETED) -> dict:
    """Return figures of an attention kernel with and without dropout, which adds `cost` instructions to each loop."""
    with_dropout = [LOOP | {"instructions": LOOP["instructions"] + cost} for _ in range(2)]
    made = {
        PLAIN: {target: KERNEL | {"loops": [dict(LOOP), dict(LOOP)]}},
        DROPOUT: {target: KERNEL | {"loops": with_dropout}},
    }
    codegen.add_dropout(made)
    return copy.deepcopy(made)


def judge(got: dict, budget: dict) -> list[str]:
    return codegen.broken_statements(got) + [
        line
        for key, by_target in got.items()
        for target, figure in by_target.items()
        for line in codegen.violations(key, target, figure, codegen.budget_of(budget[key][target]))
    ]


def test_budget_records_what_dropout_costs_each_loop():
    made = figures(cost=200)
    assert codegen.budget_of(made[DROPOUT][TARGETED])["dropout"] == [200, 200]
    assert "dropout" not in codegen.budget_of(made[PLAIN][TARGETED])


@pytest.mark.parametrize("target", [f"sm_{row.capability}" for row in ARCHITECTURES])
def test_dropout_over_its_budget_is_a_violation(target):
    """Philox calls that do not merge cost 600 instructions where 200 were budgeted; memory traffic is the same."""
    complaints = judge(figures(cost=600, target=target), figures(cost=200, target=target))
    assert [line for line in complaints if "dropout adds 600 instructions to loop 1, budget 200" in line]
    assert [line for line in complaints if "dropout adds 600 instructions to loop 2, budget 200" in line]


@pytest.mark.parametrize("cost", [0, 200, 210])
def test_dropout_within_its_budget_passes(cost):
    assert judge(figures(cost=cost), figures(cost=200)) == []


def test_missing_dropout_budget_is_a_violation():
    """A kernel whose loops cannot be compared any more, or that has no budget yet, does not pass silently."""
    got, budget = figures(cost=200), figures(cost=200)
    del budget[DROPOUT][TARGETED]["dropout"]
    assert any("dropout is compared in 2 loops, the budget has 0" in line for line in judge(got, budget))


def test_loop_table_shows_what_dropout_adds():
    lines = codegen.loop_table(figures(cost=200), TARGETED)
    assert f"| {DROPOUT} | 1 | 600 | 200 | 2 | 2 | 4 | 0 |" in lines
    assert f"| {PLAIN} | 1 | 400 |  | 2 | 2 | 4 | 0 |" in lines


def test_more_shared_memory_traffic_with_dropout_is_a_violation():
    got = figures(cost=200)
    got[DROPOUT][TARGETED]["loops"][1]["lds"] += 1
    assert codegen.broken_statements(got) == [f"{DROPOUT} {TARGETED}: loop 2 has 3 lds, 2 without dropout"]


def test_dropout_without_a_kernel_to_compare_is_a_violation():
    got = figures(cost=200)
    del got[PLAIN]
    assert codegen.broken_statements(got) == [
        f"{DROPOUT} {TARGETED}: no kernel without dropout is compiled to compare it with"
    ]


@pytest.mark.parametrize("target", [f"sm_{row.capability}" for row in ARCHITECTURES])
def test_spills_are_limited_on_every_architecture(target):
    """Except for heads over 128 and rows over 8,192, which do not fit in registers."""
    names = ["mlp dz gelu bfloat16 dropout", "attention fwd D=128 float32", "layer_norm bwd N=8192 bfloat16"]
    excepted = ["attention fwd D=256 float32", "layer_norm bwd N=16384 bfloat16"]
    kernel = KERNEL | {"loops": []}
    made = {name: {target: kernel | {"spilled": 136}} for name in names + excepted}
    assert codegen.broken_statements(made) == [
        f"{name} {target}: spills 136 bytes, expected at most 128" for name in names
    ]
    assert codegen.broken_statements({name: {target: kernel | {"spilled": 128}} for name in names}) == []


def test_the_table_has_the_architectures_that_were_compiled():
    text = codegen.table(figures_of_the_table(), "3.9.0")
    assert "What Triton 3.9.0 makes" in text
    assert "codegen-3.9.json" in text
    assert [line for line in text.splitlines() if line.startswith("## ")] == [f"## {TARGETED}"]


def figures_of_the_table() -> dict:
    counts = dict.fromkeys(codegen.COLUMNS, 0)
    return {"mlp dz relu bfloat16": {TARGETED: counts | KERNEL | {"loops": []}}}
