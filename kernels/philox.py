"""The dropout generator in Triton: philox4x32-7, and the rules that give an element its 16 random bits.

An element is dropped where its bits are below the threshold. The bits depend on seed, site and coordinates alone, so
every kernel here, the C++ kernels and the reference drop the same elements. Widening before a product makes one
instruction of its two halves.
"""

import triton
import triton.language as tl


@triton.jit
def _philox(c0, c1, c2, c3, seed_ptr):
    """Return the four uint32 words that philox4x32-7 generates at the counter (c0, c1, c2, c3) for the seed.

    The parts of the counter are uint32 tensors that broadcast against each other. `seed_ptr` points to one int64.
    """
    seed = tl.load(seed_ptr).to(tl.uint64, bitcast=True)
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    c0, c1 = tl.broadcast(c0, c1)
    c2, c3 = tl.broadcast(c2 + tl.zeros_like(c0), c3 + tl.zeros_like(c0))
    for _ in tl.static_range(7):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def keep_rows(i, j, site, threshold, seed_ptr):
    """Return bool [M, N], True where dropout keeps the element in row i [M, 1] and column j [1, N], both int.

    This is the rule of embedding and add_layer_norm. `site` is the number of the dropout within a forward pass. An
    element is kept if its 16 random bits, a function of the seed, `site`, i and j, are at least `threshold`. `seed_ptr`
    points to one int64.
    """
    i, j = i.to(tl.uint32), j.to(tl.uint32)  # unsigned: division by a power of two is a shift
    w0, w1, w2, w3 = _philox(j // 8, i, tl.zeros_like(j), site.to(tl.uint32), seed_ptr)
    word = (j // 2) % 4
    bits = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
    return ((bits >> (16 * (j % 2))) & 0xFFFF) >= threshold


@triton.jit
def keep_matrix(i, j, b, site, threshold, seed_ptr, COMPARES: tl.constexpr):
    """Return bool [M, N], True where dropout keeps the element (i, j) of matrix b.

    The ints i, j and b broadcast to [M, N]. This is the rule of attention and mlp. `site` is the number of the dropout
    within a forward pass. An element is kept if its 16 random bits, a function of the seed, `site`, b, i and j, are at
    least `threshold`. `seed_ptr` points to one int64.

    Either i has shape [M, 1] and j [1, N], or i has shape [1, N] and j [M, 1]. Eight elements that differ only in
    i // 8 % 2, j // 8 % 2 and j % 2 share one call of the generator.

    COMPARES chooses the instructions, not the result:

    - "lower" works for every threshold.
    - "upper" is for j [M, 1], where a GPU thread has only odd or only even j of a matrix product's tile.
    - "rotated" is for j [1, N], where a GPU thread has both odd and even j.

    "upper" and "rotated" need fewer instructions, but work only for a threshold of at least 1. For a threshold of 0
    their callers must skip dropout.
    """
    i, j = i.to(tl.uint32), j.to(tl.uint32)  # unsigned: division by a power of two is a shift
    c0 = (j // 16) * 4 + (j % 8) // 2
    c1 = (i // 16) * 8 + i % 8
    w0, w1, w2, w3 = _philox(c0, c1, b.to(tl.uint32), site.to(tl.uint32), seed_ptr)
    odd_j = (j // 8) % 2 == 1
    bits = tl.where((i // 8) % 2 == 1, tl.where(odd_j, w3, w2), tl.where(odd_j, w1, w0))
    if COMPARES == "lower":
        keep = ((bits >> (16 * (j % 2))) & 0xFFFF) >= threshold
    else:
        tl.static_assert(COMPARES == "upper" or COMPARES == "rotated")
        turn = 16 * (1 - j % 2)
        if COMPARES == "rotated":
            bits = (bits << turn) | (bits >> ((32 - turn) % 32))
        else:
            bits = bits << turn
        keep = bits > (threshold.to(tl.uint32) << 16) - 1
    return keep


def dropping_seed(seed, threshold: int):
    """Return `seed`, which turns dropout on in kernels, or None if the threshold is 0, so that nothing is dropped."""
    return seed if threshold > 0 else None
