"""Test the codegen gate, which judges figures of compiled kernels. The figures are made up, and nothing is compiled."""

import copy

import pytest

from kernels.architectures import ARCHITECTURES
from tools import codegen

LOOP = {"instructions": 400, "lds": 2, "sts": 2, "shfl": 4, "local": 0}
KERNEL = {"registers": 128, "spilled": 0, "shared": 65536, "instructions": 1700, "needs_wgmma": 1, "wgmma": 8}
TARGETED = next(f"sm_{row.capability}" for row in ARCHITECTURES if row.targeted)
PLAIN, DROPOUT = "attention fwd D=64 bfloat16", "attention fwd D=64 bfloat16 dropout"
EMPTY = " | ".join([""] * 7)  # the cells of a loop without a bound


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
    """Dropout that costs 600 instructions for a budget of 200 is a violation, although memory traffic is the same.

    This happens if the compiler does not merge equal Philox calls.
    """
    complaints = judge(figures(cost=600, target=target), figures(cost=200, target=target))
    assert [line for line in complaints if "dropout adds 600 instructions to loop 1, budget 200" in line]
    assert [line for line in complaints if "dropout adds 600 instructions to loop 2, budget 200" in line]


@pytest.mark.parametrize("cost", [0, 200, 210])
def test_dropout_within_its_budget_passes(cost):
    assert judge(figures(cost=cost), figures(cost=200)) == []


def test_missing_dropout_budget_is_a_violation():
    """A kernel without a budget for dropout, or whose loops cannot be compared, does not pass silently."""
    got, budget = figures(cost=200), figures(cost=200)
    del budget[DROPOUT][TARGETED]["dropout"]
    assert any("dropout is compared in 2 loops, the budget has 0" in line for line in judge(got, budget))


def test_loop_table_shows_what_dropout_adds():
    lines = codegen.loop_table(figures(cost=200), TARGETED)
    assert f"| {DROPOUT} | 1 | 600 | 200 | 2 | 2 | 4 | 0 | {EMPTY} |" in lines
    assert f"| {PLAIN} | 1 | 400 |  | 2 | 2 | 4 | 0 | {EMPTY} |" in lines


def test_loop_table_shows_the_bound_of_a_loop_that_has_one():
    lines = codegen.loop_table(bounded(forward=1.0, backward=1.0), TARGETED)
    assert f"| {PLAIN} | 2 | 400 |  | 2 | 2 | 4 | 0 | 500 | 10 | 20 | 30 | 500 | 400 | 1000 |" in lines


def bounded(forward: float, backward: float) -> dict:
    """Return figures of attention's kernels whose unmasked loops keep these shares of their speed with dropout."""
    made: dict = {}
    tiles = {"fwd": [128, 64], "bwd_dq": [128, 64], "bwd_dkdv": [32, 128]}
    for kernel, tile in tiles.items():
        for label, share in (("", 1.0), (" dropout", forward if kernel == "fwd" else backward)):
            pipes = {"tensor": 500, "mufu": 10, "fma": 20, "alu": 30, "issue": round(1000 / share) - 500, "shared": 400}
            loops = [LOOP | {"pipes": pipes | {"issue": 10000}}, LOOP | {"pipes": pipes}]
            figure = KERNEL | {"loops": loops, "tile": tile}
            made[f"attention {kernel} D=64 bfloat16{label}"] = {TARGETED: figure}
    codegen.add_dropout(made)
    return made


@pytest.mark.parametrize(
    ("forward", "backward", "complaints"),
    [
        pytest.param(0.66, 0.72, [], id="holds"),
        pytest.param(0.64, 0.72, ["dropout leaves forward 0.640 of its speed; expected at least 0.65"], id="forward"),
        pytest.param(0.66, 0.70, ["dropout leaves backward 0.700 of its speed; expected at least 0.71"], id="backward"),
    ],
)
def test_what_dropout_leaves_of_the_speed(forward, backward, complaints):
    assert codegen.broken_statements(bounded(forward, backward)) == [
        f"attention D=64 bfloat16 {TARGETED}: {line}" for line in complaints
    ]
    assert codegen.broken_statements(bounded(forward, backward), "3.9") == []  # Triton 3.9 is judged by budgets alone


def test_backward_counts_both_kernels_by_the_scores_of_a_tile():
    """The cycles of the dK and dV kernel count twice, because its tiles have half as many scores here."""
    made = bounded(forward=1.0, backward=1.0)
    made["attention bwd_dkdv D=64 bfloat16 dropout"][TARGETED]["loops"][-1]["pipes"]["issue"] += 1000
    assert codegen.dropout_speed(made, TARGETED, "backward", "D=64 bfloat16") == pytest.approx(3000 / 5000)


def test_predicted_rates_are_in_the_table():
    lines = codegen.speed_table(bounded(forward=0.8, backward=0.75), TARGETED)
    rows = {line.split(" | ")[0]: line for line in lines if line.startswith("| ")}
    assert rows["| forward D=64 bfloat16 dropout"].endswith("| 0.80 |")
    assert rows["| backward D=64 bfloat16 dropout"].endswith("| 0.75 |")
    rates = [int(cell) for cell in rows["| forward D=64 bfloat16"].split(" | ")[1:4]]
    assert rates == sorted(rates) and len(set(rates)) == 3  # longer sequences have a smaller share of masked tiles


def test_more_shared_memory_traffic_with_dropout_is_a_violation():
    got = figures(cost=200)
    got[DROPOUT][TARGETED]["loops"][1]["lds"] += 1
    assert codegen.broken_statements(got) == [f"{DROPOUT} {TARGETED}: loop 2 has 3 lds, 2 without dropout"]


def test_a_candidate_may_spill_what_any_kernel_may():
    """A candidate of the tuner is not shipped, so only the general limit of spills applies to it."""
    for spilled, complaints in ((codegen.SPILLS, 0), (codegen.SPILLS + 1, 1)):
        got = {"attention fwd D=64 bfloat16 candidate 128x64 w8": {TARGETED: KERNEL | {"spilled": spilled}}}
        assert len(codegen.broken_statements(got)) == complaints


def test_dropout_without_a_kernel_to_compare_is_a_violation():
    got = figures(cost=200)
    del got[PLAIN]
    assert codegen.broken_statements(got) == [
        f"{DROPOUT} {TARGETED}: no kernel without dropout is compiled to compare it with"
    ]


@pytest.mark.parametrize("target", [f"sm_{row.capability}" for row in ARCHITECTURES])
def test_spills_are_limited_on_every_architecture(target):
    """Spills are limited, except for head sizes over 128 and rows over 8,192, which do not fit in registers."""
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
