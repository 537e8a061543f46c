"""Test the definitions of the benchmarks of ops and jobs: their work, cases, implementations and launches."""

import ast
import graphlib
import importlib
import math
import pathlib
import subprocess
import sys

import pytest
import torch

import gpt_fast
from benchmarks import catalogue
from benchmarks.engines.peers import ENGINE_PEERS
from benchmarks.measure.calls import make_inputs
from benchmarks.measure.environment import ROOT
from benchmarks.measure.gate import files_of_tests
from benchmarks.models import counts, training
from benchmarks.models.plain_gpt import PlainGPT
from benchmarks.topic import BF16, F32, FLOOR, LEFT, OURS, PASSES, SUITES, TOKENS, Case, Study
from gpt_fast import GPTConfig, GPTForCausalLM

OPS, TOPICS = catalogue.ops(), catalogue.topics()
JOBS = [name for name in TOPICS if name not in OPS]
SMALL = GPTConfig.preset("gpt2", num_tokens=61, hidden_dim=16, num_heads=2, num_layers=2, seq_len=32)


def work(topic: str, passes: str, dtype: torch.dtype = F32, dropout: float = 0.0, **sizes):
    return TOPICS[topic].work(Case(topic, "cpu", tuple(sizes.items()), dtype, dropout), passes)


@pytest.mark.parametrize(
    ("found", "bytes", "flops"),
    [
        # Causal attention of 2 tokens has 3 pairs of 4 numbers, a multiply-add each, in two products (backward: five).
        # A tensor has 8 numbers, and lse has 2.
        pytest.param(
            work("attention", "forward", B=1, H=1, T=2, D=4), 4 * 4 * 8 + 8, 2 * 2 * 3 * 4, id="attention"
        ),
        pytest.param(
            work("attention", "backward", B=1, H=1, T=2, D=4), 8 * 4 * 8 + 8, 5 * 2 * 3 * 4, id="attention backward"
        ),
        pytest.param(work("layer_norm", "forward", M=2, N=3), 4 * (6 + 6 + 3 + 3) + 16, 0, id="layer_norm"),
        pytest.param(work("layer_norm", "backward", M=2, N=3), 4 * (6 * 3 + 3 * 3) + 16, 0, id="layer_norm backward"),
        pytest.param(
            work("add_layer_norm", "forward", BF16, 0.1, M=2, N=3), 2 * (6 * 4 + 6) + 16, 0, id="add_layer_norm"
        ),
        pytest.param(
            work("add_layer_norm", "backward", BF16, M=2, N=3), 2 * (6 * 4 + 9) + 16, 0, id="add_layer_norm backward"
        ),
        pytest.param(
            work("add_layer_norm", "backward", BF16, 0.1, M=2, N=3), 2 * (6 * 5 + 9) + 16, 0, id="dropout: own dx"
        ),
        # For M = 5, C = 2 and F = 8 the weights have 16 + 16 numbers and the biases 8 + 2.
        pytest.param(work("mlp", "forward", M=5, C=2), 4 * (10 + 10 + 42), 2 * 2 * 5 * 2 * 8, id="mlp"),
        pytest.param(work("mlp", "backward", M=5, C=2), 4 * (30 + 40 + 42), 4 * 2 * 5 * 2 * 8, id="mlp backward"),
        # For M = 5, N = 3 and K = 2, x has 10 numbers, the weight 6 and y 15.
        pytest.param(work("linear", "forward", M=5, N=3, K=2), 4 * (10 + 6 + 15), 2 * 5 * 3 * 2, id="linear"),
        pytest.param(
            work("linear", "backward", M=5, N=3, K=2), 4 * (15 + 20 + 12), 2 * 2 * 5 * 3 * 2, id="linear backward"
        ),
        pytest.param(
            work("linear_cross_entropy", "training", N=5, C=2, V=7), 4 * 2 * (10 + 14) + 40, 3 * 2 * 5 * 2 * 7,
            id="linear_cross_entropy",
        ),
        pytest.param(work("embedding", "forward", B=2, T=3, V=7, C=4), 4 * (24 + 24 + 12) + 48, 0, id="embedding"),
        pytest.param(
            work("embedding", "backward", B=2, T=3, V=7, C=4), 4 * (24 + 28 + 12) + 48, 0, id="embedding backward"
        ),
        pytest.param(
            work("decode_attention", "inference", BF16, B=2, H=3, S=5, D=4), 2 * (2 * 120 + 2 * 24), 4 * 2 * 3 * 5 * 4,
            id="decode_attention",
        ),
    ],
)  # fmt: skip
def test_work_by_hand(found, bytes, flops):
    assert (found.bytes, found.flops) == (bytes, flops)


def test_parameters_are_those_of_the_model():
    assert counts.parameters(GPTConfig.preset("gpt2")) == 124_439_808
    assert counts.parameters(SMALL) == GPTForCausalLM(SMALL).num_parameters()
    matrices = [p for name, p in GPTForCausalLM(SMALL).named_parameters() if p.dim() == 2 and "pos_emb" not in name]
    assert counts.matrix_parameters(SMALL) == sum(p.numel() for p in matrices)


def test_model_work_follows_the_printed_formula(monkeypatch):
    """A training step has tokens × (6 N + 6 L C (T + 1)) FLOPs, and AdamW moves seven float32 numbers per parameter."""
    monkeypatch.setattr(Case, "config", SMALL)
    B, T, L, C = 3, 8, SMALL.num_layers, SMALL.hidden_dim
    N = 12 * L * C * C + SMALL.num_tokens * C
    assert "6 N + 6 L C (T + 1)" in counts.MFU_FORMULA
    step = work("training_step", "step", model="small", B=B, T=T)
    assert step.flops == B * T * (6 * N + 6 * L * C * (T + 1))
    assert step.bytes == 28 * counts.parameters(SMALL)
    finetuning = work("finetuning_step", "step", model="small", B=B, T=T)
    assert finetuning.flops == step.flops - 6 * B * T * SMALL.num_tokens * C
    # Two tokens after a prompt of five read every weight twice, and the keys and values of 5 and of 6 tokens.
    decoding = counts.decoding(SMALL, 1, 5, 2, 2, 4)
    assert decoding.bytes == 2 * 2 * N + 4 * 2 * L * C * (5 + 6)
    # In the last layer of a prompt four tokens of each row need 2 C² parameters, keys and values, and no attention.
    prompt = work("prefill", "step", model="small", B=2, T=5)
    assert decoding.bound == prompt.bound == "read"
    layer, pairs = 12 * C * C, 1 + 2 + 3 + 4 + 5
    products = 5 * (L - 1) * layer + layer + 4 * 2 * C * C + SMALL.num_tokens * C
    assert prompt.flops == 2 * (2 * products + 4 * C * ((L - 1) * pairs + 5))


# ---- the catalogue


def test_every_op_has_a_benchmark_and_every_kernel_its_launches():
    assert set(gpt_fast.ops.NAMES) | {"linear"} == set(OPS)
    assert list(OPS)[: len(gpt_fast.ops.NAMES)] == list(gpt_fast.ops.NAMES)
    assert {name for name, topic in OPS.items() if topic.launches} == set(gpt_fast.ops.NAMES)
    assert {name for name, topic in OPS.items() if topic.tiny} == set(gpt_fast.ops.NAMES)


@pytest.mark.parametrize("folder", ["ops", "jobs"])
def test_a_file_defines_what_its_name_says(folder):
    for path in (pathlib.Path(catalogue.__file__).parent / folder).glob("[!_]*.py"):
        module = importlib.import_module(f"benchmarks.{folder}.{path.stem}")
        assert (module.TOPIC if hasattr(module, "TOPIC") else module.STUDY).name == path.stem


def test_imports_have_no_circles():
    """The imports at the head of the modules form no circle. Imports inside functions do not count: they run later."""
    root = pathlib.Path(catalogue.__file__).parents[1]
    paths = {
        ".".join(path.relative_to(root).with_suffix("").parts): path for path in (root / "benchmarks").rglob("*.py")
    }
    graph = {}
    for name, path in paths.items():
        imported = {
            f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in paths else str(node.module)
            for node in ast.parse(path.read_text("utf-8")).body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        graph[name] = imported & set(paths)
    assert graph["benchmarks.jobs.overhead"] >= {"benchmarks.catalogue", "benchmarks.topic"}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_every_topic_with_cases_on_a_gpu_has_tests_for_it():
    """The suite runs a topic's tests marked `cuda` before it times the topic on a GPU, and refuses it without them."""
    timed = [topic for topic in TOPICS.values() if catalogue.cases(topic, "cuda")]
    files = {topic.name: {f"tests/{name}" for name in files_of_tests(topic)} for topic in timed}
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "cuda and not slow"]
    done = subprocess.run(
        [*command, *sorted(set().union(*files.values()))], check=True, cwd=ROOT, capture_output=True, text=True
    )
    found = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert {name for name, tests in files.items() if not tests & found} == set()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_are_sound(device):
    """Each topic has quick cases, except `linear` on a GPU. Names are unique, work is positive, targets are sound."""
    assert {topic.suite for topic in TOPICS.values()} == set(SUITES)
    for topic in TOPICS.values():
        found = catalogue.cases(topic, device)
        assert catalogue.cases(topic, device, quick=True) or (topic.name, device) == ("linear", "cuda"), topic.name
        assert len({case.name for case in found}) == len(found)
        assert set(topic.passes) <= set(PASSES)
        peers = {peer.name for peer in topic.peers}
        assert topic.peers[0].name == OURS
        for case in found:
            assert set(case.peers) <= peers
            assert case.series == "" or case.series in case.size
            for passes in topic.passes:
                found_work = topic.work(case, passes)
                assert found_work.bytes > 0
                assert found_work.flops >= 0
            for target in topic.targets(case):
                against = {target.peer} if isinstance(target.peer, str) else set(target.peer)
                assert against <= peers | {FLOOR, TOKENS} | {f"{peer}, {LEFT}" for peer in peers if target.busy}
                assert target.who in peers
                assert set(target.passes) <= set(topic.passes)


def test_select():
    assert [topic.name for topic in catalogue.select("decode")] == [
        "generation", "prefill", "decoding", "perplexity"
    ]  # fmt: skip
    assert [topic.name for topic in catalogue.select("mlp")] == ["mlp"]
    assert isinstance(catalogue.select("overhead")[0], Study)
    assert len(catalogue.select("all")) == len(TOPICS) + len(catalogue.studies())
    with pytest.raises(ValueError, match="--suite is speed; expected ops, train, decode or all, or one of attention"):
        catalogue.select("speed")


# ---- implementations


@pytest.mark.parametrize("op", OPS)
def test_peers_compute_the_same(op):
    """Without dropout, all implementations that run here give the outputs and gradients of the reference, the last."""
    topic = OPS[op]
    assert topic.peers[-1].name == ("torch" if op == "linear" else "reference")
    for case in topic.small_cases("cpu"):
        if case.dropout:
            continue
        expected = None
        for peer in reversed(topic.peers):
            if peer.missing(case) or peer.compiles or not peer.same:
                continue
            inputs = make_inputs(topic, case)[0]
            outputs = [peer.build(case)(*inputs)]
            outputs = list(outputs[0]) if isinstance(outputs[0], tuple) else outputs
            got = [output.detach() for output in outputs]
            if topic.passes != ("inference",):
                torch.manual_seed(1)
                leaves = [value for value in inputs if value.requires_grad]
                got += torch.autograd.grad(outputs, leaves, [torch.randn(output.shape) for output in outputs])
            expected = expected or got
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=lambda text, n=peer.name: f"{n}: {text}")


def test_plain_model_computes_ours():
    ours = GPTForCausalLM(SMALL).eval()
    plain = PlainGPT(SMALL).copy_weights(ours).eval()
    tokens = torch.randint(SMALL.num_tokens, (2, 20))
    torch.testing.assert_close(plain(tokens), ours(tokens).logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain.loss(tokens), ours(tokens, tokens).loss)
    assert plain.generate(tokens, 3).equal(gpt_fast.generate(ours, tokens, max_new_tokens=3, temperature=0))
    assert sum(p.numel() for p in plain.parameters()) == ours.num_parameters()


@pytest.mark.parametrize("name", JOBS)
def test_whole_models_run(name, monkeypatch):
    """Each implementation gives a loss near that of a uniform guess, or the requested number of tokens."""
    monkeypatch.setattr(Case, "config", SMALL)
    sizes = (
        {"model": "gpt2", "B": 2, "T": 8} if name != "generation" else {"model": "gpt2", "B": 2, "prompt": 4, "new": 5}
    )
    case = Case(name, "cpu", tuple(sizes.items()), torch.float32, 0.1)
    (tokens, *rest), _ = make_inputs(TOPICS[name], case)
    for peer in TOPICS[name].peers:
        if peer.missing(case) or peer.compiles or peer in ENGINE_PEERS:  # test_engines.py runs the engines
            continue
        job = peer.build(case)
        out = job(tokens, *rest)
        if name in ("prefill", "generation"):
            assert out.shape == (2, tokens.shape[1] + (5 if name == "generation" else 1)), peer.name
            assert out[:, : tokens.shape[1]].equal(tokens)
            least = 4 * counts.parameters(SMALL)
            if job.session is not None and job.session.kind != "torch":  # the matrices are packed beside the parameters
                width = SMALL.hidden_dim
                matrices = 12 * SMALL.num_layers * width**2 + SMALL.num_tokens * width
                least += {"float32": 4, "bfloat16": 2, "int8": 1, "int8-a16": 1}[job.session.kind] * matrices
            assert job.state_bytes() >= least, peer.name
        else:
            classes = 2 if name == "finetuning_step" else SMALL.num_tokens
            assert float(out) == pytest.approx(math.log(classes), abs=0.7), peer.name
            # The state holds the weights and AdamW's two moments.
            assert job.state_bytes() >= 3 * 4 * counts.parameters(SMALL), peer.name


@pytest.mark.parametrize(("gib", "fits"), [(30, True), (29, False)])
def test_a_model_is_trained_if_it_fits(gib, fits, monkeypatch):
    """GPT-2 XL has 1.56 billion parameters, which take 16 bytes each. A quarter more must be available."""
    monkeypatch.setattr(training, "available_memory", lambda device: gib << 30)
    topic = TOPICS["training_step"]
    (case,) = (c for c in catalogue.cases(topic, "cpu") if c.size["model"] == "gpt2-xl")
    reasons = {peer.name: peer.missing(case) for peer in topic.peers}
    assert (reasons[OURS] is None) == (reasons["plain"] is None) == fits
    if not fits:
        assert set(reasons.values()) == {"needs more than 23.2 GiB"}


def test_a_half_precision_step_is_measured_on_every_cpu(monkeypatch):
    """A CPU without bfloat16 products measures fewer layers, because PyTorch would take minutes for all of them."""
    for fast in (True, False):
        for module in ("benchmarks.topic", "benchmarks.measure.floors"):
            monkeypatch.setattr(f"{module}.bf16_products", lambda device, fast=fast: fast)
        found = [case for case in catalogue.cases(TOPICS["training_step"], "cpu") if case.dtype == BF16]
        assert {"layers" in case.size for case in found} == {not fast}
        assert any(OURS in case.peers or not case.peers for case in found)
