"""Benchmark of attention: causal, with and without dropout, against each of SDPA's backends and FlexAttention."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.ops._shared import DROPOUT_RULE, compiled, cuda_only, dropout, fits, meta, ours, reference, short
from benchmarks.topic import BF16, F32, Case, Function, Launches, Peer, Target, Topic, Work, every, is_slow

OP = "attention"
LENGTHS = (1024, 2048, 4096, 8192, 16384)


def inputs(case: Case) -> tuple:
    """Return normal random tensors q, k, v [B, H, T, D], which require grad; B, H, T, D are the case's sizes.

    In memory they are laid out as [B, T, H, D], as the projection before attention writes them.
    """
    B, H, T, D = case.size.values()

    def one() -> Tensor:
        return torch.randn(B, T, H, D, device=case.device).to(case.dtype).transpose(1, 2).requires_grad_()

    return one(), one(), one()


def work(case: Case, passes: str) -> Work:
    """Return the least bytes and FLOPs of one pass over the case; `passes` is "forward" or "backward".

    Forward reads q, k, v and writes the output and the logsumexp. Backward also reads the output, its gradient and the
    logsumexp, and writes three gradients. There are two matrix products forward and five backward (scores, dV, dP, dQ,
    dK), over the pairs of query and key that the causal mask keeps.
    """
    B, H, T, D = case.size.values()
    element = case.dtype.itemsize
    pairs = B * H * T * (T + 1) // 2
    values, lse = B * H * T * D, 4 * B * H * T
    if passes == "forward":  # reads q, k, v; writes out and lse
        return Work(element * 4 * values + lse, 2 * 2 * pairs * D)
    return Work(element * 8 * values + lse, 5 * 2 * pairs * D)  # reads q, k, v, out, dout, lse; writes dq, dk, dv


def cases(device: str) -> Iterator[Case]:
    """Yield the cases to benchmark on a device, "cpu" or "cuda".

    On a GPU, each case has 16384 tokens, in bfloat16, with dropout 0 and 0.1. Head size 64 has a series over the
    sequence length T, from 1024 to 16384. Head size 128 has T = 1024 and 4096. Those of head size 64 with T = 1024 and
    4096 have the field `quick` set, so that a quick run measures them too.

    On a CPU, batches of 4 sequences with T = 256 and 1024 have dropout 0 and 0.1. Their dtypes are float32 and
    bfloat16. If the CPU lacks instructions for bfloat16, that dtype is limited to three implementations. A series of
    one sequence over T, 1024 to 16384, is in float32 without dropout, for six implementations. The cases with T = 256
    that are not limited have `quick` set.
    """
    if device == "cuda":  # 16k tokens in each: GPT-1's and GPT-2's head size, then 128
        for T in LENGTHS:
            sizes = [{"B": 16384 // T, "H": 12, "T": T, "D": 64}]
            yield from every(OP, device, sizes, dropouts=(0.0, 0.1), series="T", quick=T in (1024, 4096))
        for T in (1024, 4096):
            yield from every(OP, device, [{"B": 16384 // T, "H": 6, "T": T, "D": 128}], dropouts=(0.0, 0.1))
        return
    for T in (256, 1024):
        sizes = [{"B": 4, "H": 12, "T": T, "D": 64}]
        yield from every(OP, device, sizes, dropouts=(0.0, 0.1), quick=T == 256)
        if is_slow(device, BF16):
            yield from every(OP, device, sizes, (BF16,), (0.0, 0.1), peers=("gpt_fast", "sdpa math", "sdpa flash"))
    grows = ("gpt_fast", "sdpa math", "sdpa flash", "sdpa cudnn", "FlexAttention", "reference")
    sizes = [{"B": 1, "H": 2, "T": T, "D": 64} for T in LENGTHS]
    yield from every(OP, device, sizes, (F32,), series="T", peers=grows)


def targets(case: Case) -> Iterator[Target]:
    """Yield the speed targets of a case. A GPU case with dropout, and a CPU case with a batch of 1, have none.

    On a GPU, the rival at head size 64 is the faster of SDPA's flash and cuDNN backends, at other sizes cuDNN. Forward
    must be as fast as the rival. Backward must reach 0.9 of its speed at head size 64, else 0.7.

    On a CPU, forward and backward together have the faster of SDPA's flash and math backends as rival. They must be as
    fast without dropout. With dropout they must be 2 times as fast at T = 256, else 5 times.
    """
    T, D = case.size["T"], case.size["D"]
    if case.device == "cuda":
        if not case.dropout:
            fastest = ("sdpa flash", "sdpa cudnn") if D == 64 else "sdpa cudnn"
            yield Target(fastest, 1.0, ("forward",))
            yield Target(fastest, 0.9 if D == 64 else 0.7, ("backward",))
    elif case.size["B"] > 1:
        times = (2.0 if T == 256 else 5.0) if case.dropout else 1.0
        yield Target(("sdpa flash", "sdpa math"), times)  # as PyTorch chooses: it has no dropout in flash on the CPU


# ---- implementations


def scores(copies: int) -> Callable[[Case], int]:
    """Return a function from a case to the bytes of `copies` float32 tensors [B, H, T, T].

    It estimates the memory of an implementation that stores attention scores. B, H and T are the case's sizes.
    """

    def memory(case: Case) -> int:
        size = case.size
        return copies * 4 * size["B"] * size["H"] * size["T"] ** 2

    return memory


def reference_memory(case: Case) -> int:
    """Return the estimated bytes that the reference needs: 6 float32 tensors [B, H, T, T], or 30 with dropout."""
    return scores(30 if case.dropout else 6)(case)  # dropout: 64-bit words of the generator for each pair


def sdpa(backend: SDPBackend | None) -> Callable[[Case], Function]:
    """Return a function that builds PyTorch's causal `scaled_dot_product_attention` with the dropout of a case.

    The function takes a case and returns a function (q, k, v) → out [B, H, T, D]. `backend` is the only backend that
    may run; None leaves the choice to PyTorch.
    """

    def build(case: Case) -> Function:
        """Return causal SDPA with the case's dropout as a function (q, k, v) → out.

        The outer function's `backend` is the only one allowed, or None for PyTorch's choice.
        """

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if backend is None:
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=case.dropout)
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=case.dropout)

        return run

    return build


def flash_missing(case: Case) -> str | None:
    """Return a reason if the case has dropout on a CPU, where SDPA's flash backend cannot run it, else None."""
    return "no dropout on the CPU: PyTorch takes math instead" if case.dropout and case.device == "cpu" else None


def flex(case: Case) -> Function:
    """Return FlexAttention with a causal mask, compiled, as a function (q, k, v) → out [B, H, T, D].

    The mask is for the case's length T and device. On a CPU FlexAttention has no backward pass: there the function
    detaches its inputs, so its result does not require grad.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    T = case.size["T"]
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=case.device)
    function = torch.compile(flex_attention, dynamic=False)
    if case.device == "cuda":
        return lambda q, k, v: function(q, k, v, block_mask=mask)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # On the CPU FlexAttention has no backward and refuses inputs that require a gradient.
        return function(q.detach(), k.detach(), v.detach(), block_mask=mask)

    return run


def flex_missing(case: Case) -> str | None:
    """Return a reason if the case has dropout, which FlexAttention lacks on each device, else None."""
    return "has no dropout" if case.dropout else None


def launches(kernels: ModuleType) -> Launches:
    """Yield (label, call without arguments) for the kernels of causal attention, to compile and compare their code.

    Each combination of head size, dtype and dropout gives two pairs: the forward call, then the backward call. Both
    have the same label, such as "D=64 bfloat16 dropout". Head sizes 64, 128 and 256 come in bfloat16 and float32, and
    size 64 also in float16. Each comes without and with dropout, except that sizes 128 and 256 in float32 have none.

    Then come candidates: launch configurations that no GPU has measured yet. A candidate is for the forward or the
    backward kernels. It gives two pairs in bfloat16: its call without dropout, then with dropout. The call does nothing
    if the current architecture is not the candidate's. The tensors are on the device `meta`, so no kernel runs:
    tools/record_launches.py records the types and constants of each launch, with which tools/codegen.py compiles the
    kernel. `kernels` is the module kernels/attention.py.
    """
    shapes = [(D, torch.bfloat16, p) for D in (64, 128, 256) for p in (0.0, 0.1)]
    shapes += [(64, dtype, p) for dtype in (torch.float16, torch.float32) for p in (0.0, 0.1)]
    shapes += [(D, torch.float32, 0.0) for D in (128, 256)]
    for D, dtype, p in shapes:
        label = f"D={D} {short(dtype)}{' dropout' if p else ''}"
        for call in calls(kernels, D, dtype, p):
            yield label, call
    for rows in candidates(kernels):
        config = kernels.Config(*rows[0].config)
        more = f"{' late' if config.late else ''}{f' r{config.registers}' if config.registers else ''}"
        for p in (0.0, 0.1):
            label = f"D={rows[0].size} bfloat16 candidate {config.queries}x{config.keys} w{config.warps}{more}"
            forward, backward = calls(kernels, rows[0].size, torch.bfloat16, p)
            call = forward if rows[0].kernel == "fwd" else backward
            yield f"{label}{' dropout' if p else ''}", partial(trying, kernels, rows, call)


def calls(kernels: ModuleType, D: int, dtype: torch.dtype, p: float) -> tuple[Callable[[], object], ...]:
    """Return (forward call, backward call) of causal attention with head size D, for tensors of `dtype`.

    The calls take no arguments. Their tensors are on the device `meta`, so no kernel runs, and only the launches are
    recorded. q, k and v are views of one packed projection, and backward computes the projection's gradient. B, T and H
    are constants. The dropout probability `p` must be 0 or 0.1, because the dropout threshold is a constant. `kernels`
    is the module kernels/attention.py.
    """
    B, T, H = 2, 4096, 4
    qkv, out = meta(B, T, 3 * H * D, dtype=dtype), meta(B, T, H, D, dtype=dtype).transpose(1, 2)
    q, k, v = qkv.unflatten(2, (3, H, D)).permute(2, 0, 3, 1, 4)
    lse, seed = meta(B, H, T, dtype=torch.float32), meta(1, dtype=torch.int64) if p else None
    options = kernels.Options(None, None, None, None, True, None, p, seed, 3, D**-0.5)
    rule = DROPOUT_RULE if p else (0, 1.0)
    return (
        partial(kernels.forward, q, k, v, options, *rule),
        partial(kernels.backward_qkv, out, qkv, H, out, lse, options, *rule),
    )


def candidates(kernels: ModuleType) -> list[list[Any]]:
    """Return groups of unmeasured launch configurations of attention, each group a list of rows to try together.

    A row is a `launch_configs.Row` of `launch_configs.CANDIDATES`. First comes a group of one for each row for the
    forward kernel. The last group has all rows for the backward kernels. `kernels` is the module kernels/attention.py.
    """
    rows = kernels.launch_configs.CANDIDATES[OP]
    return [*([row] for row in rows if row.kernel == "fwd"), [row for row in rows if row.kernel != "fwd"]]


def trying(kernels: ModuleType, rows: list[Any], call: Callable[[], object]) -> None:
    """Run `call` with the launch configurations `rows` in place of the shipped ones of the same kernels.

    `rows` is not empty, and its entries are `launch_configs.Row`s for one GPU architecture. If the current architecture
    is another one, `call` does not run. Afterwards the configurations from before are in use again. `kernels` is the
    module kernels/attention.py.
    """
    configs = kernels.launch_configs
    if configs.architecture(torch.device("meta")) == rows[0].architecture:
        with contextlib.ExitStack() as stack:
            for row in rows:
                stack.enter_context(configs.trying(OP, row))
            call()


TOPIC = Topic(
    OP, "ops", inputs, work, cases,
    peers=(
        ours(OP, dropout),
        Peer("sdpa math", sdpa(SDPBackend.MATH), fits(scores(5))),
        Peer("sdpa flash", sdpa(SDPBackend.FLASH_ATTENTION), flash_missing),
        Peer("sdpa efficient", sdpa(SDPBackend.EFFICIENT_ATTENTION), cuda_only()),
        Peer("sdpa cudnn", sdpa(SDPBackend.CUDNN_ATTENTION), cuda_only()),
        compiled(sdpa(None)),
        Peer("FlexAttention", flex, flex_missing, compiles=True),
        reference(OP, dropout, reference_memory),
    ),
    targets=targets,
    small=({"B": 1, "H": 2, "T": 67, "D": 64}, {"B": 2, "H": 1, "T": 17, "D": 40}),
    tiny={"B": 1, "H": 1, "T": 4, "D": 8},
    dropouts=(0.0, 0.1),
    launches=launches,
)  # fmt: skip
