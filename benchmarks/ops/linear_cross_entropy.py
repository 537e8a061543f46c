"""Benchmark of linear_cross_entropy: GPT-2's vocabulary, against PyTorch's losses and Liger's."""

from collections.abc import Iterator
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F

from benchmarks.ops._shared import compiled, cuda_only, meta, normal, ours, reference, short
from benchmarks.topic import BF16, F32, Case, Function, Launches, Peer, Target, Topic, Work, every, ids, is_slow

OP = "linear_cross_entropy"
VOCABULARIES = (8192, 16384, 32768, 65536, 131072)


def inputs(case: Case) -> tuple:
    """Return random (x [N, C], weight [V, C], target [N]); N, C, V are the case's sizes.

    x and weight are normal in the case's dtype and require grad; weight is scaled by 1/√C. The targets are int64 below
    V.
    """
    N, C, V = case.size.values()
    return normal(case, N, C), normal(case, V, C, scale=C**-0.5), ids(case, V, N)


def work(case: Case, passes: str) -> Work:
    """Return the least bytes and FLOPs of forward and backward together; `passes` is ignored.

    There are three matrix products: logits, dx and dweight. x, weight and target are read, dx and dweight are written.
    """
    N, C, V = case.size.values()
    return Work(case.dtype.itemsize * 2 * (N * C + V * C) + 8 * N, 3 * 2 * N * C * V)


def cases(device: str) -> Iterator[Case]:
    """Yield the cases to benchmark on a device, "cpu" or "cuda": N rows, width C, vocabulary size V, no dropout.

    A GPU gets GPT-2's vocabulary at GPT-2's four widths, with 16384 rows, and a series over V with 8192 rows, all in
    bfloat16. The case of width 768 with GPT-2's vocabulary has the field `quick` set, so that a quick run measures it
    too.

    A CPU gets GPT-2's vocabulary at GPT-2's four widths, with 1024 rows, in float32. The three larger widths are
    limited to gpt_fast and PyTorch. Width 768 also runs in bfloat16, limited to gpt_fast and PyTorch if the CPU lacks
    instructions for it. A series over V with 512 rows is in float32, limited to gpt_fast, PyTorch and the reference. A
    further case, with `quick` set, has 256 rows of width 768 in float32.
    """
    if device == "cuda":
        yield from every(OP, device, [{"N": 16384, "C": 768, "V": 50257}], quick=True)
        yield from every(OP, device, [{"N": 16384, "C": C, "V": 50257} for C in (1024, 1280, 1600)])
        yield from every(OP, device, [{"N": 8192, "C": 768, "V": V} for V in VOCABULARIES], series="V")
        return
    yield from every(OP, device, [{"N": 256, "C": 768, "V": 50257}], (F32,), quick=True)
    yield from every(OP, device, [{"N": 1024, "C": 768, "V": 50257}])
    two = ("gpt_fast", "torch")
    yield from every(OP, device, [{"N": 1024, "C": C, "V": 50257} for C in (1024, 1280, 1600)], (F32,), peers=two)
    if is_slow(device, BF16):
        yield from every(OP, device, [{"N": 1024, "C": 768, "V": 50257}], (BF16,), peers=two)
    sizes = [{"N": 512, "C": 768, "V": V} for V in VOCABULARIES]
    yield from every(OP, device, sizes, (F32,), series="V", peers=(*two, "reference"))


def targets(case: Case) -> Iterator[Target]:
    """Yield the speed target of a case, for forward and backward together.

    On a GPU, gpt_fast may take 2 % more time than torch.compile. On a CPU it must be as fast as PyTorch.
    """
    yield Target("torch.compile", 1 / 1.02) if case.device == "cuda" else Target("torch", 1.0)


# ---- implementations


def torch_loss(case: Case) -> Function:
    """Return a function (x, weight, target) → mean loss that calls PyTorch's linear and cross_entropy.

    The logits are computed in the dtype of x, then all of them are stored in float32. `case` is not used.
    """
    return lambda x, weight, target: F.cross_entropy(F.linear(x, weight).float(), target)


def torch_loss_chunked(case: Case) -> Function:
    """Return PyTorch's own fused loss, which computes the logits in chunks, as (x, weight, target) → loss.

    Raise `AttributeError` if this PyTorch has no `F.linear_cross_entropy`. `case` is not used.
    """
    function, options = F.linear_cross_entropy, torch.nn.LinearCrossEntropyOptions()
    return lambda x, weight, target: function(x, weight, target, options=options)


def chunked_missing(case: Case) -> str | None:
    """Return the reason why PyTorch's chunked loss is not measured on the case, or None if it is.

    The reason is that this version of PyTorch lacks it, or else that a CPU case has more than 256 rows.
    """
    if not hasattr(F, "linear_cross_entropy"):
        return f"PyTorch {torch.__version__} does not have it"
    # 24 s when the others took 3 to 4 s, with 256 rows on one thread of a 2-core EPYC.
    return "left to the smallest case on a CPU" if case.device == "cpu" and case.size["N"] > 256 else None


def liger_fused_loss(case: Case) -> Function:
    """Return Liger's loss that is fused with the output layer, as (x, weight, target) → loss. `case` is not used.

    Raise `ImportError` if Liger is not installed.
    """
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda x, weight, target: loss(weight, x, target)


def liger_loss(case: Case) -> Function:
    """Return a function (x, weight, target) → loss that stores all logits and calls Liger's cross-entropy.

    Raise `ImportError` if Liger is not installed. `case` is not used.
    """
    from liger_kernel.transformers import LigerCrossEntropyLoss

    loss = LigerCrossEntropyLoss()
    return lambda x, weight, target: loss(F.linear(x, weight), target)


def launches(kernels: ModuleType) -> Launches:
    """Yield (label, call without arguments) for the loss over GPT-2's vocabulary, with 8192 rows of width 768.

    Plain bfloat16 gives three calls: the mean loss with gradients, without gradients (" no_grad"), and the backward
    pass of one loss per row (" single losses"). Then comes the mean loss with gradients for four variants. Two are in
    bfloat16: one with a bias and label smoothing, one with a transposed weight. Two have a bias, with x, weight and
    bias all in float16 or all in float32. A label is such as "V=50257 C=768 bfloat16 no_grad". The tensors are on the
    device `meta`, so no kernel runs: tools/record_launches.py records the types and constants of each launch, with
    which tools/codegen.py compiles the kernel. `kernels` is the module kernels/linear_cross_entropy.py.
    """
    V, C = 50257, 768
    bfloat16 = torch.bfloat16
    shapes = [("", bfloat16), ("bias smoothing", bfloat16), ("transposed", bfloat16)]
    shapes += [("bias", torch.float16), ("bias", torch.float32)]
    for options, dtype in shapes:
        x, target = meta(8192, C, dtype=dtype), meta(8192, dtype=torch.int64)
        weight = meta(C, V, dtype=dtype).t() if options == "transposed" else meta(V, C, dtype=dtype)
        bias = meta(V, dtype=dtype) if "bias" in options else None
        smoothing = 0.1 if "smoothing" in options else 0.0
        label = f"V={V} C={C} {short(dtype)} {options}".strip()
        arguments = (x, weight, target, bias, -100, smoothing)
        needs = (True, True, bias is not None)
        yield label, partial(kernels.forward, *arguments, "mean", *needs)
        if not options:
            yield f"{label} no_grad", partial(kernels.forward, *arguments, "mean", False, False, False)
            dloss = meta(8192, dtype=torch.float32)
            yield f"{label} single losses", partial(kernels.backward, dloss, *arguments, *needs)


TOPIC = Topic(
    OP, "ops", inputs, work, cases,
    peers=(
        ours(OP),
        Peer("torch", torch_loss),
        Peer("torch chunked", torch_loss_chunked, chunked_missing),
        compiled(torch_loss),
        Peer("Liger fused", liger_fused_loss, cuda_only("liger_kernel")),
        Peer("Liger cross-entropy", liger_loss, cuda_only("liger_kernel")),
        reference(OP),
    ),
    passes=("training",),
    targets=targets,
    small=({"N": 33, "C": 72, "V": 301},),
    tiny={"N": 4, "C": 8, "V": 16},
    launches=launches,
)  # fmt: skip
