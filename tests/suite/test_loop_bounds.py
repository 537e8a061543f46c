"""Test the static bounds of loops: the cycles of each pipe, for small pieces of SASS that were counted by hand."""

import pytest

from tools import loop_bounds

# instruction → cycles of each pipe for one warpgroup. The first product has its operand A in registers.
PIECES = {
    "HGMMA.64x64x16.F32.BF16 R56, R100, gdesc[UR16].tnspB, R56": {"tensor": 32, "issue": 1, "shared": 16},
    "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR24], RZ, !UPT": {"tensor": 32, "issue": 1, "shared": 32},
    "MUFU.EX2 R5, R5": {"mufu": 8, "issue": 1},
    "FFMA R5, R5, R6, R7": {"fma": 1, "issue": 1},
    "IMAD.WIDE.U32 R4, R5, -0x2daee0ad, RZ": {"fma": 2, "issue": 1},
    "LOP3.LUT R4, R5, R6, R7, 0x96, !PT": {"alu": 2, "issue": 1},
    "F2FP.BF16.F32.PACK_AB R4, R5, R6": {"alu": 2, "issue": 1},
    "UIADD3 UR4, UR5, 0x10, URZ": {"issue": 1},
    "BAR.SYNC.DEFER_BLOCKING 0x0": {"issue": 1},
    "LDS.128 R4, [R5]": {"issue": 1, "shared": 16},
    "LDS R4, [R5]": {"issue": 1, "shared": 4},
    "STSM.16.M88.4 [R5], R8": {"issue": 1, "shared": 16},
    "SHFL.BFLY PT, R4, R5, 0x1, 0x1f": {"issue": 1, "shared": 4},
    "LDG.E.128 R4, desc[UR4][R6.64]": {"issue": 1},
    "NOP": {},
}


def sass(*lines: str) -> str:
    """Return the lines in the form of cuobjdump, at the addresses 0x0100, 0x0110, ..."""
    return "\n".join(
        f"        /*{256 + 16 * number:04x}*/                   {line} ;    /* 0x000000000000 */"
        for number, line in enumerate(lines)
    )


@pytest.mark.parametrize("line", PIECES)
def test_an_instruction_counts_for_its_pipes(line):
    """An instruction takes these cycles of each pipe for one warpgroup, which is four warps of 32 lanes."""
    (instruction,) = loop_bounds.parse(sass(line))
    assert loop_bounds.bound([instruction], warps=4) == dict.fromkeys(loop_bounds.PIPES, 0) | PIECES[line]


def test_two_warpgroups_need_twice_the_cycles():
    body = loop_bounds.parse(sass(*PIECES))
    once, twice = (loop_bounds.bound(body, warps) for warps in (4, 8))
    assert twice == {pipe: 2 * cycles for pipe, cycles in once.items()}


def test_a_predicate_is_no_part_of_the_name():
    instructions = loop_bounds.parse(sass("@!P0 FADD R5, -R5, -RZ", "@UP1 UMOV UR4, UR5"))
    assert [instruction.name for instruction in instructions] == ["FADD", "UMOV"]


HGMMA = "HGMMA.64x64x16.F32.BF16 R56, R100, gdesc[UR16], R56"


@pytest.mark.parametrize(
    ("lines", "lengths"),
    [
        pytest.param(["FADD R1, R2, R3", HGMMA, "FMUL R1, R2, R3", "@P0 BRA 0x110"], [3], id="from_the_target_on"),
        pytest.param([HGMMA, "@P0 BRA 0x100", "FADD R1, R2, R3", HGMMA, "@P0 BRA 0x120"], [2, 3], id="two_loops"),
        pytest.param(["FADD R1, R2, R3", HGMMA, "@P0 BRA 0x110", "@P1 BRA 0x100"], [2], id="only_the_inner_one"),
        pytest.param(["FADD R1, R2, R3", "@P0 BRA 0x100"], [], id="no_product"),
        pytest.param([HGMMA, "@P0 BRA 0x120", "EXIT"], [], id="forward"),
        pytest.param([HGMMA, "EXIT", "SYNCS R4", "@!P0 BRA 0x100"], [], id="waiting_out_of_line"),
    ],
)
def test_loops_around_products(lines, lengths):
    assert [len(body) for body in loop_bounds.product_loops(loop_bounds.parse(sass(*lines)))] == lengths


def test_products_overlap_with_their_operands_and_with_nothing_else():
    pipes = {"tensor": 100, "mufu": 70, "fma": 10, "alu": 20, "issue": 80, "shared": 90}
    assert loop_bounds.cycles(pipes) == 180
    assert loop_bounds.cycles(pipes | {"shared": 120}) == 200
    assert loop_bounds.cycles(pipes | {"alu": 95}) == 195


@pytest.mark.parametrize(
    ("own", "walked", "T", "masked", "unmasked"),
    [(128, 128, 512, 4, 6), (128, 64, 256, 4, 2), (64, 128, 256, 4, 2), (128, 64, 128, 2, 0)],
)
def test_turns_of_causal_attention(own, walked, T, masked, unmasked):
    """The masked loop runs once for each tile on the diagonal, and the unmasked loop once for each tile below it."""
    assert loop_bounds.causal_cycles(1, 0, own, walked, T) == masked
    assert loop_bounds.causal_cycles(0, 1, own, walked, T) == unmasked


def test_the_rate_is_fitted_to_the_published_figure():
    """In this model a tile of 128 x 64 of Triton's tutorial, D = 64, takes 1,056 cycles. It published 403 TFLOP/s."""
    T = 16384
    total = T // 128 * (T // 64) / 2 * 1056  # causal attention computes half of all tiles
    assert loop_bounds.rate(2, 64, T, total) == pytest.approx(403, rel=0.01)
