"""Static bounds of compiled loops, from SASS: the cycles that a multiprocessor of sm_90 needs for one turn, by pipe.

A bound counts instructions and operands. It knows no latency, no dependency and no cache, and nothing is run. `cycles`
adds the products to the busiest pipe of all other work, as if the two never overlapped. `rate` turns the cycles of
causal attention into TFLOP/s. Its one fitted number makes Triton's tutorial attention agree with its published 403
TFLOP/s (not causal, D = 64, 16,384 tokens, H100; Shah et al. 2024, "FlashAttention-3").
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

PIPES = ("tensor", "mufu", "fma", "alu", "issue", "shared")

# Rates of one multiprocessor per cycle, from the CUDA programming guide and NVIDIA's figures for an H100 SXM.
TENSOR_FLOP = 4096  # dense, 16 bits: 132 multiprocessors x 4096 x 1.83 GHz = 989 TFLOP/s
ISSUED = 4  # warp instructions
LANES = {"mufu": 16, "fma": 128, "imad": 64, "alu": 64}
SHARED_BYTES = 128
WARP = 32

MULTIPROCESSORS, HERTZ, FITTED = 132, 1.83e9, 0.84

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_WGMMA = re.compile(r"HGMMA\.64x(\d+)x(\d+)\.")
_FMA = {"FFMA", "FMUL", "FADD", "HFMA2", "HADD2", "HMUL2", "FFMA2"}
_MEMORY = {
    "LDS", "STS", "LDSM", "STSM", "LDG", "STG", "LDL", "STL", "SHFL", "ATOMS", "UTMALDG", "UTMASTG", "LDGSTS", "REDUX",
}  # fmt: skip
_CONTROL = {
    "BRA", "BAR", "WARPSYNC", "SYNCS", "DEPBAR", "HGMMA", "WARPGROUP", "R2UR", "S2R", "S2UR", "FENCE", "ELECT", "PLOP3",
    "CS2R", "BSYNC", "BSSY", "YIELD", "MEMBAR", "ERRBAR", "CCTL", "LEPC", "CALL", "NOP",
}  # fmt: skip


class Instruction(NamedTuple):
    """One line of SASS, without its predicate."""

    address: int
    name: str  # with its suffixes, such as LDS.128
    operands: str

    @property
    def opcode(self) -> str:
        """Return the instruction's name up to its first dot, such as LDS for LDS.128."""
        return self.name.split(".")[0]


def parse(sass: str) -> list[Instruction]:
    """Return the instructions in `sass`, the text that `cuobjdump -sass` prints, in their order.

    An `Instruction` has address, name with suffixes, and operands as text. Predicates are dropped, lines of another
    form are skipped.
    """
    return [Instruction(int(address, 16), name, rest) for address, name, rest in _INSTRUCTION.findall(sass)]


def product_loops(instructions: Sequence[Instruction]) -> list[list[Instruction]]:
    """Return the innermost loops that contain a matrix product, each as the list of its instructions, by address.

    A loop is a stretch of code from the target of a backward branch to that branch. A matrix product is an instruction
    whose opcode ends in MMA. A stretch with an EXIT in it is no loop: code that waits for memory is placed behind the
    kernel's end and jumps back too.
    """
    stretches = []
    for address, name, operands in instructions:
        target = re.search(r"0x([0-9a-f]+)", operands)
        if name.startswith("BRA") and target and int(target[1], 16) < address:
            stretches.append((int(target[1], 16), address))
    found = {}
    for first, last in stretches:
        body = [instruction for instruction in instructions if first <= instruction.address <= last]
        opcodes = {instruction.opcode for instruction in body}
        if any(opcode.endswith("MMA") for opcode in opcodes) and "EXIT" not in opcodes:
            found[first, last] = body
    return [
        body
        for (first, last), body in sorted(found.items())
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in found)
    ]


def bound(body: Sequence[Instruction], warps: int) -> dict[str, int]:
    """Return {pipe: cycles} for one iteration of a loop, in one program of `warps` warps.

    `body` has the loop's instructions. The keys are "tensor", "mufu", "fma", "alu" (execution units of a
    multiprocessor), "issue" (its issue slots) and "shared" (its shared memory). The cycles are rounded. Latencies and
    dependencies do not count, and neither do NOPs. Each of the four warps that issue a wgmma together takes an issue
    slot of its own.
    """
    issued = [instruction for instruction in body if instruction.opcode != "NOP"]
    lanes = {"mufu": 0, "fma": 0, "imad": 0, "alu": 0}
    for instruction in issued:
        pipe = _lanes(instruction.opcode)
        if pipe is not None:
            lanes[pipe] += 1
    by_lanes = {pipe: count * warps * WARP / LANES[pipe] for pipe, count in lanes.items()}
    found = {
        "tensor": sum(map(_flops, issued)) * warps / 4 / TENSOR_FLOP,
        "mufu": by_lanes["mufu"],
        "fma": by_lanes["fma"] + by_lanes["imad"],  # integer products run on half of the same pipe
        "alu": by_lanes["alu"],
        "issue": len(issued) * warps / ISSUED,
        "shared": sum(map(_shared_bytes, issued)) * warps / SHARED_BYTES,
    }
    return {pipe: round(found[pipe]) for pipe in PIPES}


def cycles(pipes: dict[str, int]) -> int:
    """Return the cycles of one loop iteration if other work never overlaps with the matrix products.

    `pipes` is {pipe: cycles} with the keys PIPES: "tensor", "mufu", "fma", "alu", "issue" and "shared". The tensor
    cores read shared memory while they multiply, so the greater of "tensor" and "shared" is the products' time. The
    greatest of the other four is added.
    """
    products = ("tensor", "shared")
    return max(pipes[pipe] for pipe in products) + max(pipes[pipe] for pipe in PIPES if pipe not in products)


def causal_cycles(masked: int, unmasked: int, own: int, walked: int, T: int) -> float:
    """Return the cycles of causal attention's loops for one head of T tokens, all programs added up.

    A program owns `own` rows of one axis (queries or keys) and loops over the other axis, `walked` rows in each
    iteration. An iteration takes `masked` cycles if its tile meets the diagonal, which needs a mask. It takes
    `unmasked` cycles if its tile lies wholly among the pairs that the causal mask keeps. The total is the same whether
    programs own queries or keys.
    """
    total = 0
    for start in range(0, T, own):
        total += start // walked * unmasked
        total += (-(-(start + own) // walked) - start // walked) * masked
    return total


def rate(products: int, D: int, T: int, total: float) -> float:
    """Return the predicted TFLOP/s of causal attention on an H100 SXM, if one head needs `total` cycles.

    `products` is the number of matrix products (2 forward, 5 backward), D the head size and T the number of tokens.
    Half of the T × T pairs count. The prediction is scaled by FITTED, a factor below 1 that was fitted to a published
    rate.
    """
    flops = products * 2 * D * T * T / 2
    return FITTED * flops / total * MULTIPROCESSORS * HERTZ / 1e12


def _lanes(opcode: str) -> str | None:
    """Return the key of LANES that has the rate of an opcode: "mufu", "fma", "imad" or "alu", or None.

    The result is None for memory, control flow, tensor cores and the uniform datapath. Of the other opcodes, "mufu" is
    for special functions such as exp2, "fma" for floating-point arithmetic, and "imad" for integer multiply-add. "alu"
    is for all the rest, such as logic and comparisons.
    """
    if opcode in _MEMORY or opcode in _CONTROL:
        return None
    if opcode == "MUFU":
        return "mufu"
    if opcode in _FMA:
        return "fma"
    if opcode == "IMAD":
        return "imad"
    return None if opcode.startswith("U") else "alu"


def _flops(instruction: Instruction) -> int:
    """Return the FLOPs of a wgmma instruction for its group of four warps together, 0 for each other instruction."""
    shape = _WGMMA.match(instruction.name)
    return 2 * 64 * int(shape[1]) * int(shape[2]) if shape else 0


def _shared_bytes(instruction: Instruction) -> float:
    """Return the bytes of shared memory that an instruction moves for one warp, 0 if it does not use shared memory.

    For wgmma it is a quarter of the 16-bit operands' bytes in shared memory, because four warps share them. A shuffle
    counts, because it moves its bytes through the same ports.
    """
    shape = _WGMMA.match(instruction.name)
    if shape:
        N, K = int(shape[1]), int(shape[2])
        # A descriptor stands for both operands where A lies in shared memory, else registers precede it.
        from_registers = re.search(r"R\d+,\s*R\d+,\s*gdesc", instruction.operands) is not None
        return (N * K + (0 if from_registers else 64 * K)) * 2 / 4  # 16 bits, shared by the group's four warps
    opcode, *suffixes = instruction.name.split(".")
    if opcode in ("LDSM", "STSM"):
        matrices = next((int(suffix) for suffix in suffixes if suffix in ("2", "4")), 1)
        return matrices * 8 * 8 * 2
    if opcode in ("LDS", "STS"):
        bits = next((int(suffix) for suffix in suffixes if suffix in ("64", "128")), 32)
        return WARP * bits / 8
    return WARP * 4 if opcode == "SHFL" else 0
