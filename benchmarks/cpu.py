"""The C++ kernels against PyTorch on this CPU, in pairs: python -m benchmarks.cpu PART... [--out FOLDER]

Parts: floors, attention, rows (norms and embedding), mlp, loss, step-… (the training step), half-step, memory; step-,
half-step- and memory-accelerated compare a transformers model with itself as it was. Two functions take turns, each
going first as often as second, so that whatever slows the machine slows both; a figure is the median, a ratio the
median over the pairs with their quartiles. FOLDER/cpu.json keeps what other parts have measured before, FOLDER/cpu.md
is its table.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gpt_fast
from benchmarks.environment import describe
from gpt_fast import ops

WIDTHS = (768, 1024, 1280, 1600)  # of GPT-2
F32, BF16 = torch.float32, torch.bfloat16
VOCABULARY = 50257
DROPOUT = 0.1
Run = Callable[[], object]
Result = dict[str, Any]


def now() -> float:
    """Seconds; with one thread those of the CPU, which other programs do not lengthen."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def paired(ours: Run, peer: Run, seconds: float = 4.0, least: int = 5, most: int = 200, warm: int = 2) -> Result:
    """Milliseconds of both, and how many times as long the peer takes."""

    def timed(function: Run) -> float:
        start = now()
        function()
        return now() - start

    durations = [timed(ours) + timed(peer) for _ in range(warm)]
    pairs = max(least, min(most, int(seconds / durations[-1]))) if durations else least
    times: list[tuple[float, float]] = []
    for pair in range(pairs):
        if pair % 2:
            second = timed(peer)
            times.append((timed(ours), second))
        else:
            times.append((timed(ours), timed(peer)))
    low, middle, high = quartiles([theirs / mine for mine, theirs in times])
    return {
        "ours_ms": 1e3 * statistics.median(mine for mine, _ in times),
        "peer_ms": 1e3 * statistics.median(theirs for _, theirs in times),
        "ratio": middle,
        "ratio_quartiles": [low, high],
        "pairs": pairs,
    }


def long_pairs(ours: Run, peer: Run, dtype: torch.dtype) -> Result:
    """For products; in bfloat16 one pair, as PyTorch takes minutes where the CPU has no instructions for it."""
    return paired(ours, peer, least=3, warm=1) if dtype == F32 else paired(ours, peer, seconds=0, least=1, warm=1)


def both_ways(function: Callable[..., Tensor], inputs: tuple) -> Run:
    """The forward pass and the backward pass for a random gradient."""
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    upstream = torch.randn_like(function(*inputs))
    return lambda: torch.autograd.grad(function(*inputs), leaves, upstream)


def randn(*shape: int, dtype: torch.dtype = F32, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape)).to(dtype).requires_grad_()


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def seed() -> Tensor:
    return torch.tensor([1234])


# ---- what nothing does faster here


def floors() -> Iterator[Result]:
    """The rate of matrix products of the training step's shapes and of the best square one; copy and read bandwidth."""

    def median_time(run: Run) -> float:
        run()
        times = []
        for _ in range(9):
            start = now()
            run()
            times.append(now() - start)
        return statistics.median(times)

    M, C = 1024, WIDTHS[0]
    for N, K in ((3 * C, C), (C, C), (4 * C, C), (C, 4 * C), (4 * C, 4 * C)):
        x, weight, upstream = torch.randn(M, K), torch.randn(N, K), torch.randn(M, N)
        for name, run in {
            "PyTorch": partial(F.linear, x, weight),
            "PyTorch, dx": partial(torch.mm, upstream, weight),
            "PyTorch, dW": partial(torch.mm, upstream.t(), x),
            "gpt_fast": partial(ops.linear, x, weight),
        }.items():
            seconds = median_time(run)
            case = f"float32 product {M}x{N}x{K}, {name}"
            yield {"case": case, "ms": 1e3 * seconds, "gflops": 2e-9 * M * N * K / seconds}
    size = 64 << 20
    source, target = torch.randn(size), torch.empty(size)
    seconds = median_time(partial(target.copy_, source))
    yield {"case": "copy", "ms": 1e3 * seconds, "gbytes": 8e-9 * size / seconds}
    seconds = median_time(source.sum)
    yield {"case": "read", "ms": 1e3 * seconds, "gbytes": 4e-9 * size / seconds}


# ---- the ops


def attention() -> Iterator[Result]:
    B, H, D = 4, 12, 64
    for dtype in (F32, BF16):
        for T in (256, 1024):
            for p in (0.0, DROPOUT):
                q, k, v = randn(3, B, H, T, D, dtype=dtype).detach().unbind(0)
                inputs = tuple(x.requires_grad_() for x in (q, k, v))
                ours = both_ways(lambda q, k, v, p=p: ops.attention(q, k, v, dropout_p=p, seed=seed()), inputs)
                peer = both_ways(
                    lambda q, k, v, p=p: F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True), inputs
                )
                times = paired(ours, peer)
                flops = 7 * 2 * B * H * D * T * (T + 1) // 2
                wanted = (2 if T == 256 else 5) if p else 1
                case = f"attention {short(dtype)}, T = {T}, dropout {p:g}"
                yield {"case": case, "flops": flops, "wanted": wanted, **times}


def rows(M: int = 1024) -> Iterator[Result]:
    """Passes bound by memory, at the rows of the training step."""
    inputs: tuple
    for dtype in (F32, BF16):
        for C in WIDTHS:
            x, residual = randn(M, C, dtype=dtype), randn(M, C, dtype=dtype)
            weight, bias = randn(C, dtype=dtype), randn(C, dtype=dtype)
            size = M * C * dtype.itemsize
            ours = both_ways(ops.layer_norm, (x, weight, bias, 1e-5))
            peer = both_ways(lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b), (x, weight, bias))
            yield {
                "case": f"layer_norm {short(dtype)}, C = {C}",
                "bytes": 5 * size,
                "wanted": 1,
                **paired(ours, peer, 2.0),
            }
            for p in (0.0, DROPOUT):
                inputs = (x, residual, weight, bias)
                ours = both_ways(
                    lambda x, r, w, b, p=p: torch.cat(ops.add_layer_norm(x, r, w, b, 1e-5, p, seed())), inputs
                )
                peer = both_ways(lambda x, r, w, b, p=p: torch.cat(_add_layer_norm(x, r, w, b, p)), inputs)
                times = paired(ours, peer, 2.0)
                case = f"add_layer_norm {short(dtype)}, C = {C}, dropout {p:g}"
                yield {"case": case, "bytes": 9 * size, "wanted": 1, **times}
    for C in WIDTHS:
        tokens = torch.randint(0, VOCABULARY, (4, 256))
        inputs = (randn(VOCABULARY, C), randn(1024, C))
        for p in (0.0, DROPOUT):
            ours = both_ways(lambda t, w, p=p, tokens=tokens: ops.embedding(tokens, t, w, None, p, seed()), inputs)
            peer = both_ways(lambda t, w, p=p, tokens=tokens: F.dropout(F.embedding(tokens, t) + w[:256], p), inputs)
            yield {"case": f"embedding float32, C = {C}, dropout {p:g}", "wanted": 1, **paired(ours, peer, 2.0)}


def _add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, p: float) -> tuple[Tensor, Tensor]:
    summed = residual + F.dropout(x, p)
    return F.layer_norm(summed, summed.shape[-1:], weight, bias), summed


def mlp(M: int = 1024) -> Iterator[Result]:
    def eager(x: Tensor, fc: Tensor, fc_bias: Tensor, proj: Tensor, proj_bias: Tensor, p: float) -> Tensor:
        hidden = F.gelu(F.linear(x, fc, fc_bias), approximate="tanh")
        return F.linear(F.dropout(hidden, p), proj, proj_bias)

    for dtype in (F32, BF16):
        for C in WIDTHS if dtype == F32 else WIDTHS[:1]:
            inputs: tuple = (
                randn(M, C, dtype=dtype), randn(4 * C, C, dtype=dtype, scale=0.02), randn(4 * C, dtype=dtype),
                randn(C, 4 * C, dtype=dtype, scale=0.02), randn(C, dtype=dtype),
            )  # fmt: skip
            for p in (0.0, DROPOUT) if C == WIDTHS[0] else (0.0,):
                ours = both_ways(lambda x, f, b, w, c, p=p: ops.mlp(x, f, b, w, c, "gelu_tanh", p, seed()), inputs)
                peer = both_ways(lambda x, f, b, w, c, p=p: eager(x, f, b, w, c, p), inputs)
                case = f"mlp {short(dtype)}, C = {C}, dropout {p:g}"
                yield {"case": case, "flops": 6 * 2 * M * C * 4 * C, "wanted": 1, **long_pairs(ours, peer, dtype)}


def loss(M: int = 1024) -> Iterator[Result]:
    for dtype in (F32, BF16):
        for C in WIDTHS if dtype == F32 else WIDTHS[:1]:
            target = torch.randint(0, VOCABULARY, (M,))
            inputs = (randn(M, C, dtype=dtype), randn(VOCABULARY, C, dtype=dtype, scale=0.02))
            ours = both_ways(lambda x, w, target=target: ops.linear_cross_entropy(x, w, target), inputs)
            peer = both_ways(lambda x, w, target=target: F.cross_entropy(F.linear(x, w), target), inputs)
            case = f"linear_cross_entropy {short(dtype)}, C = {C}"
            yield {"case": case, "flops": 3 * 2 * M * C * VOCABULARY, "wanted": 1, **long_pairs(ours, peer, dtype)}


# ---- the training step of GPT-2 124M


# Of matrix products, 6 a parameter and token, and of attention's seven.
STEP_FLOPS = 6 * 1024 * (12 * 12 * 768**2 + VOCABULARY * 768) + 12 * 7 * 2 * 4 * 12 * 64 * 256 * 257 // 2


def training_step(name: str, dtype: torch.dtype, p: float, layers: int = 12, B: int = 4, T: int = 256) -> Run:
    """Forward, backward and fused AdamW of "ours", or of transformers' "eager", "sdpa", "compiled" or "accelerated"."""
    torch.manual_seed(0)
    if name == "ours":
        model: Any = gpt_fast.GPTForCausalLM(gpt_fast.GPTConfig.preset("gpt2", dropout=p, num_layers=layers))
        options = {}
    else:
        import transformers

        config = transformers.GPT2Config(n_layer=layers, embd_pdrop=p, attn_pdrop=p, resid_pdrop=p)
        attention = "eager" if name == "eager" else "sdpa"
        model = transformers.GPT2LMHeadModel._from_config(config, attn_implementation=attention)
        options = {"use_cache": False}
        if name == "accelerated":
            gpt_fast.accelerate(model, strict=True)

    def compute(tokens: Tensor) -> Tensor:
        return model(tokens, labels=tokens, **options).loss

    if name == "compiled":
        compute = torch.compile(compute, dynamic=False)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, VOCABULARY, (B, T))

    def step() -> float:
        with torch.autocast("cpu", dtype) if dtype != F32 else nullcontext():
            value = compute(tokens)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        return value.item()

    return step


PEERS = ("sdpa", "eager", "compiled")


def step(peer: str, dropouts: tuple[float, ...] = (DROPOUT, 0.0)) -> Iterator[Result]:
    for p in dropouts:
        wanted = 1.1 if peer == "compiled" else 2 if p else 1.2
        ours, theirs = training_step("ours", F32, p), training_step(peer, F32, p)
        times = paired(ours, theirs, least=3, most=3, warm=1)
        case = f"training step float32, dropout {p:g}, transformers {peer}"
        yield {"case": case, "wanted": wanted, "flops": STEP_FLOPS, **times}


def step_accelerated() -> Iterator[Result]:
    accelerated, original = training_step("accelerated", F32, DROPOUT), training_step("sdpa", F32, DROPOUT)
    times = paired(accelerated, original, least=3, most=3, warm=1)
    case = f"training step float32, dropout {DROPOUT:g}, accelerated against itself (sdpa)"
    yield {"case": case, "wanted": 1.8, "flops": STEP_FLOPS, **times}
    ours = training_step("ours", F32, DROPOUT)
    times = paired(ours, accelerated, least=3, most=3, warm=1)
    case = f"training step float32, dropout {DROPOUT:g}, against an accelerated transformers model"
    yield {"case": case, "wanted": 1, "flops": STEP_FLOPS, **times}


def half_step(layers: int = 2) -> Iterator[Result]:
    """In bfloat16 one pair, not warmed up, of a part of the layers: see `long_pairs`."""
    for p in (DROPOUT, 0.0):
        ours, peer = training_step("ours", BF16, p, layers), training_step("sdpa", BF16, p, layers)
        times = paired(ours, peer, seconds=0, least=1, warm=0)
        case = f"training step bfloat16, {layers} of 12 layers, dropout {p:g}, transformers sdpa"
        yield {"case": case, "wanted": 1.25, **times}


def half_step_accelerated(layers: int = 1, T: int = 128) -> Iterator[Result]:
    """One pair again, of less: the output layer alone takes PyTorch minutes."""
    accelerated, original = (training_step(name, BF16, DROPOUT, layers, T=T) for name in ("accelerated", "sdpa"))
    times = paired(accelerated, original, seconds=0, least=1, warm=0)
    case = f"training step bfloat16, {layers} of 12 layers, T = {T}, dropout {DROPOUT:g}, accelerated against itself"
    yield {"case": case, "wanted": 1.2, **times}


# What is measured in float32, and, see `long_pairs`, in bfloat16: layers and tokens in a row.
MEMORY_SIZES = ((F32, 12, 256), (BF16, 2, 128))


def peak(name: str, dtype: torch.dtype, p: float, layers: int, T: int) -> float:
    """MiB of resident memory at most, of a process of its own that takes two steps."""
    code = (
        "import resource, torch\nfrom benchmarks.cpu import training_step\n"
        f"step = training_step({name!r}, {dtype}, {p}, {layers}, T={T})\nstep(), step()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout) / 1024


def memory() -> Iterator[Result]:
    for dtype, layers, T in MEMORY_SIZES:
        for p in (DROPOUT, 0.0):
            peaks = {name: peak(name, dtype, p, layers, T) for name in ("ours", *PEERS[: 2 if dtype == F32 else 1])}
            part = "" if layers == 12 else f", {layers} of 12 layers, T = {T}"
            yield {"case": f"peak memory of a training step {short(dtype)}{part}, dropout {p:g}", **peaks}


def memory_accelerated() -> Iterator[Result]:
    for dtype, layers, T in MEMORY_SIZES:
        peaks = {name: peak(name, dtype, DROPOUT, layers, T) for name in ("accelerated", "sdpa")}
        part = "" if layers == 12 else f", {layers} of 12 layers, T = {T}"
        yield {
            "case": f"peak memory of an accelerated training step {short(dtype)}{part}, dropout {DROPOUT:g}",
            **peaks,
        }


PARTS: dict[str, Callable[[], Iterator[Result]]] = {
    "floors": floors, "attention": attention, "rows": rows, "mlp": mlp, "loss": loss,
    "step-sdpa": partial(step, "sdpa"), "step-eager": partial(step, "eager"),
    "step-compiled": partial(step, "compiled", (0.0,)), "step-compiled-dropout": partial(step, "compiled", (DROPOUT,)),
    "half-step": half_step, "memory": memory, "step-accelerated": step_accelerated,
    "half-step-accelerated": half_step_accelerated, "memory-accelerated": memory_accelerated,
}  # fmt: skip


def table(record: Result) -> str:
    """Markdown of a record; the floor is the measured rate of products, or copy bandwidth, in the same record."""
    results = record["results"].values()
    rate = max((r["gflops"] for r in results if "gflops" in r), default=None)
    bandwidth = next((r["gbytes"] for r in results if r["case"] == "copy"), None)

    def of_floor(r: Result) -> str:
        if "flops" in r and rate:
            return f"{r['ours_ms'] / (1e-6 * r['flops'] / rate):.2f}"
        return f"{r['ours_ms'] / (1e-6 * r['bytes'] / bandwidth):.2f}" if "bytes" in r and bandwidth else ""

    device, versions = record["device"], record["versions"]
    lines = [
        f"{device['name']} ({device['extension']['vector']}), PyTorch {versions['torch']}; made by",
        "`python -m benchmarks.cpu`, one thread by CPU time, more by the wall's. Forward and backward; ratio: how many",
        "times as long PyTorch takes, the median over pairs with their quartiles; floor: our time over that of its",
        "products at the best rate below, or of its bytes at copy bandwidth (under 1 where they stay in the cache).",
        "",
        "| floor | |",
        "| --- | ---: |",
    ]
    for r in results:
        if r["part"] == "floors":
            lines.append(
                f"| {r['case']} | {r.get('gflops', r.get('gbytes')):.1f} G{'FLOP' if 'gflops' in r else 'B'}/s |"
            )
    lines += [
        "",
        "| case | gpt_fast | PyTorch | ratio | wanted | floor |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in results:
        if "ratio" in r:
            spread = " ({:.2f} to {:.2f})".format(*r["ratio_quartiles"]) if "ratio_quartiles" in r else ""
            lines.append(
                f"| {r['case']} | {r['ours_ms']:.4g} ms | {r['peer_ms']:.4g} ms | {r['ratio']:.2f}{spread} "
                f"| {r['wanted']:g} | {of_floor(r)} |"
            )
    peaks = [r for r in results if r["part"].startswith("memory")]
    if peaks:
        lines += [
            "",
            "| peak resident memory, MiB | gpt_fast | accelerated | sdpa | eager |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        names = ("ours", "accelerated", "sdpa", "eager")
        lines += [
            f"| {r['case']} | " + " | ".join(f"{r[n]:.0f}" if n in r else "" for n in names) + " |" for r in peaks
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one-thread", action="store_true", help="CPU time of one thread, for a machine that is busy")
    arguments = parser.parse_args()
    if arguments.one_thread:
        torch.set_num_threads(1)
    facts = describe("cpu")
    here = {"device": facts["device"], "versions": facts["versions"]}
    path = arguments.out / "cpu.json" if arguments.out else None

    def record() -> Result:
        """What has been measured so far, by this process and those before it."""
        if path is None or not path.exists():
            return here | {"results": {}}
        found = json.loads(path.read_text("utf-8"))
        if any(found[key] != here[key] for key in here):
            sys.exit(f"benchmarks.cpu: {path} was measured elsewhere: {found['device']}, {found['versions']}")
        return found

    record()
    for part in arguments.parts:
        for result in PARTS[part]():
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in result.items()}, flush=True)
            if path is None:
                continue
            whole = record()
            whole["results"][result["case"]] = {
                "part": part, "commit": facts["commit"],
                "command": f"python -m benchmarks.cpu {part}" + " --one-thread" * arguments.one_thread,
                "load": os.getloadavg()[0], **result
            }  # fmt: skip
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
            path.with_suffix(".md").write_text(table(whole), encoding="utf-8")


if __name__ == "__main__":
    main()
