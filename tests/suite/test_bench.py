"""The benchmark suite's own logic: counts, turns, noise, files, refusals, reports. Nothing here measures a speed."""

import dataclasses
import json
import math
import subprocess
import sys
import types

import pytest
import torch

import gpt_fast
from benchmarks import counts, decode, models, plots, report, results, runner, tables, timing
from benchmarks.cases import PASSES, SUITES, TOPICS, Case, cases, select
from benchmarks.environment import ROOT, slug
from benchmarks.models import MODEL_PEERS
from benchmarks.peers import OURS, PEERS
from benchmarks.plain_gpt import PlainGPT
from gpt_fast import GPTConfig, GPTForCausalLM
from tests.command_line import ENVIRONMENT

SMALL = GPTConfig.preset("gpt2", num_tokens=61, hidden_dim=16, num_heads=2, num_layers=2, seq_len=32)
FLOORS = {
    "copy": {"rate": 10e9, "q1": 9e9, "q3": 11e9},
    "read": {"rate": 20e9, "q1": 19e9, "q3": 21e9},
    "matmul float32": {"rate": 100e9, "q1": 99e9, "q3": 101e9},
}


# ---- counting


@pytest.mark.parametrize(
    ("work", "bytes", "flops"),
    [
        # 3 pairs of 4 numbers, a multiply-add each, in two products or five; 8 numbers a tensor, 2 of lse.
        pytest.param(counts.attention(1, 1, 2, 4, 4, "forward"), 4 * 4 * 8 + 8, 2 * 2 * 3 * 4, id="attention"),
        pytest.param(
            counts.attention(1, 1, 2, 4, 4, "backward"), 8 * 4 * 8 + 8, 5 * 2 * 3 * 4, id="attention backward"
        ),
        pytest.param(counts.layer_norm(2, 3, 4, "forward"), 4 * (6 + 6 + 3 + 3) + 16, 0, id="layer_norm"),
        pytest.param(counts.layer_norm(2, 3, 4, "backward"), 4 * (6 * 3 + 3 * 3) + 16, 0, id="layer_norm backward"),
        pytest.param(counts.add_layer_norm(2, 3, 2, "forward", 0.1), 2 * (6 * 4 + 6) + 16, 0, id="add_layer_norm"),
        pytest.param(
            counts.add_layer_norm(2, 3, 2, "backward", 0.0), 2 * (6 * 4 + 9) + 16, 0, id="add_layer_norm backward"
        ),
        pytest.param(
            counts.add_layer_norm(2, 3, 2, "backward", 0.1), 2 * (6 * 5 + 9) + 16, 0, id="dropout: dx is its own"
        ),
        # M = 5, C = 2, F = 3: weights 6 + 6, biases 3 + 2.
        pytest.param(counts.mlp(5, 2, 3, 4, "forward"), 4 * (10 + 10 + 17), 2 * 2 * 5 * 2 * 3, id="mlp"),
        pytest.param(counts.mlp(5, 2, 3, 4, "backward"), 4 * (30 + 15 + 17), 4 * 2 * 5 * 2 * 3, id="mlp backward"),
        pytest.param(counts.linear_cross_entropy(5, 2, 7, 4), 4 * 2 * (10 + 14) + 40, 3 * 2 * 5 * 2 * 7, id="loss"),
        pytest.param(counts.embedding(2, 3, 7, 4, 4, "forward"), 4 * (24 + 24 + 12) + 48, 0, id="embedding"),
        pytest.param(counts.embedding(2, 3, 7, 4, 4, "backward"), 4 * (24 + 28 + 12) + 48, 0, id="embedding backward"),
        pytest.param(
            counts.decode_attention(2, 3, 5, 4, 2), 2 * (2 * 120 + 2 * 24), 4 * 2 * 3 * 5 * 4, id="decode_attention"
        ),
    ],
)
def test_work_by_hand(work, bytes, flops):
    assert (work.bytes, work.flops) == (bytes, flops)


def test_parameters_are_those_of_the_model():
    assert counts.parameters(GPTConfig.preset("gpt2")) == 124_439_808
    assert counts.parameters(SMALL) == GPTForCausalLM(SMALL).num_parameters()
    matrices = [p for name, p in GPTForCausalLM(SMALL).named_parameters() if p.dim() == 2 and "pos_emb" not in name]
    assert counts.matrix_parameters(SMALL) == sum(p.numel() for p in matrices)


def test_model_work_follows_the_printed_formula():
    """A training step's FLOPs are tokens × (6 N + 6 L C (T + 1)); AdamW moves seven float32 numbers a parameter."""
    B, T, L, C = 3, 8, SMALL.num_layers, SMALL.hidden_dim
    N = 12 * L * C * C + SMALL.num_tokens * C
    assert "6 N + 6 L C (T + 1)" in counts.MFU_FORMULA
    work = counts.training_step(SMALL, B, T)
    assert work.flops == B * T * (6 * N + 6 * L * C * (T + 1))
    assert work.bytes == 28 * counts.parameters(SMALL)
    assert counts.finetuning_step(SMALL, B, T).flops == work.flops - 6 * B * T * SMALL.num_tokens * C
    # Two tokens after a prompt of five: every weight twice, the cache of 5 and of 6 tokens, keys and values.
    decode = counts.decode(SMALL, 1, 5, 2, 2, 4)
    assert decode.bytes == 2 * 2 * N + 4 * 2 * L * C * (5 + 6)
    assert decode.bound == counts.prefill(SMALL, 1, 5, 2).bound == "read"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_are_sound(device):
    """Each topic of a suite has cases, some of them quick; names are unique, work is positive, series grow."""
    assert {topic.suite for topic in TOPICS.values()} == set(SUITES)
    assert set(gpt_fast.ops.NAMES) == set(PEERS)
    assert set(PEERS) | set(MODEL_PEERS) == set(TOPICS)
    for topic in TOPICS.values():
        found = cases(topic, device)
        assert cases(topic, device, quick=True), topic.name
        assert len({case.name for case in found}) == len(found)
        assert set(topic.passes) <= set(PASSES)
        peers = {peer.name for peer in runner.peers_of(topic)}
        assert {OURS, "reference"} <= peers
        for case in found:
            assert set(case.peers) <= peers
            assert case.series == "" or case.series in plots.AXES
            for passes in topic.passes:
                work = topic.work(case, passes)
                assert work.bytes > 0
                assert work.flops >= 0


def test_select():
    assert [topic.name for topic in select("decode")] == ["prefill", "generation"]
    assert [topic.name for topic in select("mlp")] == ["mlp"]
    assert len(select("all")) == len(TOPICS)
    with pytest.raises(ValueError, match="--suite speed: wanted ops, train, decode or all, or one of attention"):
        select("speed")


# ---- implementations


@pytest.mark.parametrize("op", PEERS)
def test_peers_compute_the_same(op):
    """Without dropout, the outputs and gradients of whoever runs here are the reference's."""
    topic = TOPICS[op]
    for case in topic.small_cases("cpu"):
        if case.dropout:
            continue
        wanted = None
        for peer in reversed(PEERS[op]):  # the reference is last
            if peer.missing(case) or peer.compiles or peer.name in tables.NOT_THE_SAME:
                continue
            inputs = runner.make_inputs(topic, case)[0]
            outputs = [peer.build(case)(*inputs)]
            outputs = list(outputs[0]) if isinstance(outputs[0], tuple) else outputs
            got = [output.detach() for output in outputs]
            if topic.passes != ("inference",):
                torch.manual_seed(1)
                leaves = [value for value in inputs if value.requires_grad]
                got += torch.autograd.grad(outputs, leaves, [torch.randn(output.shape) for output in outputs])
            wanted = wanted or got
            for a, b in zip(got, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=lambda text, n=peer.name: f"{n}: {text}")


def test_plain_model_computes_ours():
    ours = GPTForCausalLM(SMALL).eval()
    plain = PlainGPT(SMALL).copy_weights(ours).eval()
    tokens = torch.randint(SMALL.num_tokens, (2, 20))
    torch.testing.assert_close(plain(tokens), ours(tokens).logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain.loss(tokens), ours(tokens, tokens).loss)
    assert plain.generate(tokens, 3).equal(gpt_fast.generate(ours, tokens, max_new_tokens=3, temperature=0))
    assert sum(p.numel() for p in plain.parameters()) == ours.num_parameters()


@pytest.mark.parametrize("name", MODEL_PEERS)
def test_whole_models_run(name, monkeypatch):
    """Each implementation does its job: a loss near that of a uniform guess, or as many tokens as were asked for."""
    monkeypatch.setattr(Case, "config", SMALL)
    sizes = (
        {"model": "gpt2", "B": 2, "T": 8} if name != "generation" else {"model": "gpt2", "B": 2, "prompt": 4, "new": 5}
    )
    case = Case(name, "cpu", tuple(sizes.items()), torch.float32, 0.1)
    (tokens, *rest), _ = runner.make_inputs(TOPICS[name], case)
    for peer in MODEL_PEERS[name]:
        if peer.missing(case) or peer.compiles:
            continue
        job = peer.build(case)
        out = job(tokens, *rest)
        if name in ("prefill", "generation"):
            assert out.shape == (2, tokens.shape[1] + (5 if name == "generation" else 1)), peer.name
            assert out[:, : tokens.shape[1]].equal(tokens)
            assert job.state_bytes() >= 4 * counts.parameters(SMALL)
        else:
            classes = SMALL.num_tokens if name == "training_step" else 2
            assert float(out) == pytest.approx(math.log(classes), abs=0.7), peer.name
            # Weights, and AdamW's two moments of the parameters.
            assert job.state_bytes() >= 3 * 4 * counts.parameters(SMALL), peer.name


# ---- timing


def test_implementations_take_turns(monkeypatch):
    """Rounds are spread evenly: the slow one's come between the fast one's."""
    now, order = [0.0], []

    def make(name, duration):
        def call():
            order.append(name)
            now[0] += duration

        return call

    monkeypatch.setattr(timing, "clock", lambda device, cpu_time: lambda: now[0])
    fast, slow = (timing.Stopwatch("cpu", [make(name, d)]) for name, d in (("fast", 0.125), ("slow", 0.5)))
    timing.take_turns([fast, slow], timing.Budget(1.0, 2))
    assert fast.seconds == [0.125] * 8
    assert slow.seconds == [0.5] * 2
    assert sorted(order[-10:-5]) == sorted(order[-5:]) == ["fast"] * 4 + ["slow"]
    assert fast.summary() == {"median": 0.125, "q1": 0.125, "q3": 0.125, "rounds": 8, "first": 0.125}


@pytest.mark.parametrize(("gib", "fits"), [(30, True), (29, False)])
def test_a_model_is_trained_where_it_fits(gib, fits, monkeypatch):
    """GPT-2 XL's 1.56 billion parameters take 16 bytes each, and a quarter more."""
    monkeypatch.setattr(models, "available_memory", lambda device: gib << 30)
    (case,) = (c for c in cases(TOPICS["training_step"], "cpu") if c.size["model"] == "gpt2-xl")
    reasons = {peer.name: peer.missing(case) for peer in MODEL_PEERS["training_step"]}
    assert (reasons[OURS] is None) == (reasons["plain"] is None) == fits
    if not fits:
        assert set(reasons.values()) == {"needs more than 23.2 GiB"}


def test_turns_change_their_order():
    """Who follows another finds its inputs cached: each of three has each place, about as often."""
    order = []
    watches = [timing.Stopwatch("cpu", [lambda name=name: order.append(name)]) for name in "abc"]
    timing.take_turns(watches, timing.Budget(0.0, 300))
    laps = [order[i : i + 3] for i in range(len(order) - 900, len(order), 3)]
    for place in range(3):
        assert all(70 < [lap[place] for lap in laps].count(name) < 130 for name in "abc")


def test_long_calls_of_the_warm_up_count(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(timing, "clock", lambda device, cpu_time: lambda: now[0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    watch = timing.Stopwatch("cpu", [lambda: (calls.append(1), now.__setitem__(0, now[0] + 3.0))])
    timing.take_turns([watch], timing.Budget(1.0, 3))
    assert len(watch.seconds) == 3
    assert len(calls) == 4  # the first, one more, and two rounds


def test_very_long_calls_are_made_once(monkeypatch):
    """Unless the first one compiles."""
    now = [0.0]
    monkeypatch.setattr(timing, "clock", lambda device, cpu_time: lambda: now[0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    eager, compiled = (timing.Stopwatch("cpu", [lambda: now.__setitem__(0, now[0] + 20.0)], None, c) for c in (0, 1))
    timing.take_turns([eager, compiled], timing.Budget(1.0, 3))
    assert (eager.seconds, eager.taken) == ([20.0], 1)
    assert (compiled.seconds, compiled.taken) == ([20.0], 2)


def test_quartiles():
    assert timing.quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert timing.quartiles([5.0, 1.0, 2.0, 3.0, 4.0]) == (2.0, 3.0, 4.0)


@pytest.mark.skipif(not timing._CLEAR_REFS.exists(), reason="peak memory of the CPU is read from Linux's /proc")
def test_peak_memory_is_what_a_call_adds():
    kept = torch.ones(1 << 22)
    size = 64 << 20

    def two_tensors() -> None:
        (torch.ones(size // 4) + 1).sum()

    def none() -> None:
        kept.sum()

    assert 1.99 * size < timing.peak_memory("cpu", two_tensors) < 2.4 * size
    assert timing.peak_memory("cpu", none) < size / 8


# ---- results


def record(case="M=4 float32", peer=OURS, median=1.0, spread=0.0, **more):
    time = {"median": median, "q1": median - spread / 2, "q3": median + spread / 2, "rounds": 5, "first": 2.0}
    return {
        "case": case, "peer": peer, "sizes": {"M": 4}, "dtype": "float32", "dropout": 0.0,
        "series": "", "complete": True,
        "times": {"forward": time}, "work": {"forward": {"bytes": 5_000_000_000, "flops": 0, "bound": "copy"}},
        "tokens": None, "peak_memory": 3 << 20, "session": 0,
    } | more  # fmt: skip


def a_run(*records, **more):
    return {
        "schema": results.SCHEMA, "version": results.VERSION, "topic": "layer_norm", "suite": "ops", "quick": False,
        "partial": False, "device": {"type": "cpu", "name": "A CPU", "slug": "a-cpu", "bf16_products": False},
        "versions": {"torch": "2"}, "commit": {"id": "f" * 40, "dirty": False},
        "sessions": [{"date": "2026-01-01 00:00", "load": 0.1, "floors": FLOORS}], "records": list(records),
        "missing": [],
    } | more  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "beyond"),
    [
        pytest.param((1.0, 0.0), (1.02, 0.0), False, id="2 % are noise even without spread"),
        pytest.param((1.0, 0.02), (1.05, 0.02), True, id="5 % slower, spreads of 4 %"),
        pytest.param((1.0, 0.02), (0.95, 0.02), True, id="5 % faster"),
        pytest.param((1.0, 0.06), (1.1, 0.05), False, id="10 % slower within spreads of 11 %"),
        pytest.param((1.0, 0.5), (2.0, 0.4), True, id="twice as slow"),
    ],
)
def test_compare_knows_noise(old, new, beyond):
    (change,) = results.compare(
        [a_run(record(median=old[0], spread=old[1]))], [a_run(record(median=new[0], spread=new[1]))]
    )
    assert change["beyond"] == beyond
    assert change["ratio"] == pytest.approx(new[0] / old[0])


def test_compare_matches_case_pass_and_implementation():
    old = a_run(record(), record(peer="torch"), record(case="M=5 float32"))
    new = a_run(record(median=2.0), record(peer="Liger"))
    assert [(change["peer"], change["ratio"]) for change in results.compare([old], [new])] == [(OURS, 2.0)]
    assert results.compare([old], [a_run(record(), topic="mlp")]) == []


def test_floor_is_the_longer_of_moving_and_computing():
    run = a_run(record())
    work = {"forward": {"bytes": 20e9, "flops": 100e9, "bound": "copy"}}
    assert results.floor_seconds(record(work=work), "forward", FLOORS) == pytest.approx(2.0)
    work = {"forward": {"bytes": 20e9, "flops": 300e9, "bound": "read"}}
    assert results.floor_seconds(record(work=work), "forward", FLOORS) == pytest.approx(3.0)
    # bfloat16 on a CPU that multiplies it slowly may be widened.
    slow = FLOORS | {"matmul bfloat16": {"rate": 1e9}}
    assert results.floor_seconds(record(work=work, dtype="bfloat16"), "forward", slow) == pytest.approx(3.0)
    assert results.share_of_floor(run, run["records"][0], "forward") == pytest.approx(0.5)


def test_read_takes_what_was_written(tmp_path):
    run = a_run(record())
    results.write(run, tmp_path / "layer_norm.json")
    assert results.read_any(tmp_path) == results.read_any(tmp_path / "layer_norm.json") == [run]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("{", "not JSON", id="not JSON"),
        pytest.param("[1, 2]", "not a results file of gpt-fast bench; wanted schema", id="no object"),
        pytest.param('{"benchmarks": []}', "not a results file of gpt-fast bench", id="another program's"),
        pytest.param(json.dumps(a_run(version=7)), "version 7; this gpt-fast reads 1", id="another version"),
        pytest.param(
            json.dumps(a_run(records={}, missing=None)), "damaged results file: records, missing", id="damaged"
        ),
        pytest.param(json.dumps(a_run({"case": "x"})), "damaged results file: fields of a record", id="damaged record"),
    ],
)
def test_read_refuses(tmp_path, content, message):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        results.read(tmp_path / "x.json")
    assert "x.json" in str(error.value)


# ---- a run


@pytest.fixture
def tiny(monkeypatch):
    """Two small cases of layer_norm, instant floors, tests that pass."""

    def two(device):
        for M in (3, 5):
            yield Case("layer_norm", device, (("M", M), ("N", 8)), torch.float32, peers=(OURS, "torch", "Liger"))

    monkeypatch.setattr(runner, "measure_floors", lambda device, cpu_time: FLOORS.items())
    monkeypatch.setattr(runner, "run_tests", lambda topic, device: "")
    monkeypatch.setattr(timing, "FULL", timing.Budget(0.0, 2))
    return dataclasses.replace(TOPICS["layer_norm"], cases=two)


def files(folder):
    return list(folder.glob("*/*.json"))


def test_a_run_writes_what_it_measured(tiny, tmp_path):
    shown = []
    settings = runner.Settings("cpu", out=tmp_path, done=lambda run, records: shown.append(records))
    outcome = runner.run([tiny], settings)
    assert outcome.files == files(tmp_path)
    assert outcome.files[0].parent.name == slug(results.read(outcome.files[0])["device"]["name"])
    run = results.read(outcome.files[0])
    assert not run["partial"]
    assert [(r["case"], r["peer"]) for r in run["records"]] == [
        (f"M={M} N=8 float32", peer) for M in (3, 5) for peer in (OURS, "torch")
    ]
    assert all(r["times"]["backward"]["rounds"] >= 2 and r["times"]["forward"]["median"] > 0 for r in run["records"])
    assert {entry["peer"] for entry in run["missing"]} == {"Liger"}  # named, with the reason
    assert [len(records) for records in shown] == [2, 2]
    assert run["sessions"][0]["floors"] == FLOORS
    assert set(run["commit"]) == {"id", "dirty"}


def test_interrupted_results_are_kept_and_can_be_resumed(tiny, tmp_path, monkeypatch):
    def stop_at_the_second(done, label):
        if "M=5" in label:
            raise KeyboardInterrupt

    outcome = runner.run([tiny], runner.Settings("cpu", out=tmp_path, advance=stop_at_the_second))
    assert outcome.interrupted
    (path,) = files(tmp_path)
    run = results.read(path)
    assert run["partial"]
    assert {r["case"] for r in run["records"]} == {"M=3 N=8 float32"}
    assert "**Partial**" in tables.page([run], {})
    first = run["records"]

    again = runner.run([tiny], runner.Settings("cpu", out=tmp_path, resume=True))
    assert not again.interrupted
    run = results.read(path)
    assert not run["partial"]
    assert run["records"][:2] == first
    assert [r["session"] for r in run["records"]] == [0, 0, 1, 1]

    monkeypatch.setattr(runner.environment, "commit", lambda: {"id": "0" * 40, "dirty": False})
    with pytest.raises(ValueError, match=r"layer_norm\.json: cannot be resumed, its commit was"):
        runner.run([tiny], runner.Settings("cpu", out=tmp_path, resume=True))


def test_an_implementation_that_fails_is_missing_and_ours_may_not(tiny, tmp_path, monkeypatch):
    def fail(case):
        raise RuntimeError("no such kernel\nand more")

    peers = [dataclasses.replace(peer, build=fail) if peer.name == "torch" else peer for peer in PEERS["layer_norm"]]
    monkeypatch.setitem(PEERS, "layer_norm", tuple(peers))
    runner.run([tiny], runner.Settings("cpu", out=tmp_path))
    run = results.read(files(tmp_path)[0])
    assert {r["peer"] for r in run["records"]} == {OURS}
    assert {"case": "M=3 N=8 float32", "peer": "torch", "reason": "no such kernel"} in run["missing"]
    assert "- torch: no such kernel" in tables.page([run], {})
    monkeypatch.setitem(PEERS, "layer_norm", (dataclasses.replace(PEERS["layer_norm"][0], build=fail),))
    with pytest.raises(RuntimeError, match="no such kernel"):
        runner.run([tiny], runner.Settings("cpu", out=tmp_path))

    def exhaust(case):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setitem(PEERS, "layer_norm", (dataclasses.replace(PEERS["layer_norm"][0], build=exhaust),))
    runner.run([tiny], runner.Settings("cpu", out=tmp_path))
    assert {entry["reason"] for entry in results.read(files(tmp_path)[0])["missing"]} == {"out of memory"}


def test_cpu_time_is_that_of_the_process(tiny, tmp_path):
    """Waiting costs nothing, and the device's name says which time it is."""
    watch = timing.Stopwatch("cpu", [lambda: timing.time.sleep(0.1)], cpu_time=True)
    assert watch.call() < 0.05
    assert timing.Stopwatch("cpu", [lambda: timing.time.sleep(0.1)]).call() >= 0.1
    outcome = runner.run([tiny], runner.Settings("cpu", cpu_time=True, out=tmp_path))
    assert outcome.files[0].parent.name.endswith("-cpu-time")
    assert "CPU seconds of one thread" in tables.page([results.read(outcome.files[0])], {})


def test_red_tests_refuse_a_time(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "run_tests", lambda topic, device: "1 failed")
    outcome = runner.run([tiny], runner.Settings("cpu", out=tmp_path))
    assert outcome.refused == {"layer_norm": "1 failed"}
    assert files(tmp_path) == []


def test_tests_are_run_again_when_files_change(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    monkeypatch.setattr(runner, "TEST_RECORD", tmp_path / "build" / "green.json")
    topic = types.SimpleNamespace(name="x", tests=("test_x.py",))
    test = tmp_path / "tests" / "test_x.py"
    test.parent.mkdir()
    test.write_text("def test_x():\n    assert 1 == 2\n")
    assert "1 failed" in runner.run_tests(topic, "cpu")
    assert "1 failed" in runner.run_tests(topic, "cpu")
    test.write_text("def test_x():\n    pass\n")
    assert runner.run_tests(topic, "cpu") == ""
    monkeypatch.setattr(runner.subprocess, "run", lambda *args, **options: pytest.fail("ran passed tests again"))
    assert runner.run_tests(topic, "cpu") == ""


# ---- reports


def test_page_shows_every_figure():
    run = a_run(record(median=1.0, spread=0.1), record(peer="torch", median=1.5, spread=0.0))
    text = tables.page([run], {"layer_norm_bars.png": "bars"})
    assert "| gpt_fast | 1 s ± 5% | 1.00 | 50% | 3 MiB |" in text
    assert "| torch | 1.5 s ± 0% | 1.50 | 33% | 3 MiB |" in text
    assert "| layer_norm M=4 float32, forward | 1 s | 50% | 1.50 × torch |" in text
    assert "copy 10 GB/s, read 20 GB/s, matmul float32 100 GFLOP/s" in text
    assert "Commit ffffffffffff; torch 2." in text
    assert "![bars](layer_norm_bars.png)" in text


def test_data_sheets_are_shown_beside_the_floors_and_shares_are_not_taken_of_them():
    device = {"type": "cuda", "name": "NVIDIA H200", "slug": "nvidia-h200", "bf16_products": True}
    text = tables.page([a_run(record(median=1.0), device=device)], {})
    assert "copy 10 GB/s (data sheet 4.8 TB/s), read 20 GB/s" in text
    assert "| gpt_fast | 1 s ± 0% | 1.00 | 50% | 3 MiB |" in text


def test_highlights_put_passes_together():
    """README.md shows of each topic, dtype and dropout the largest case, and nobody who does less or is ours."""
    two = {"forward": record()["times"]["forward"], "backward": record(median=2.0)["times"]["forward"]}
    work = dict.fromkeys(two, record()["work"]["forward"])
    fast = {name: time | {"median": time["median"] / 4} for name, time in two.items()}
    rows = [
        record("M=1"),
        record(times=two, work=work),
        *(record(peer=peer, times=fast, work=work) for peer in ("products alone", "reference", "gpt_fast compiled")),
        record(peer="torch", times={"forward": fast["forward"]}),
        record(peer="Liger", times={name: time | {"median": 4.5} for name, time in two.items()}),
        record("M=9", complete=False),
    ]
    wanted = ["layer_norm M=4 float32, forward + backward", "3 s", "33%", "3.00 × Liger"]
    assert tables.highlights([a_run(*rows)]) == [wanted]


def test_training_shows_tokens_and_mfu():
    work = {"step": {"bytes": 0, "flops": 50e9, "bound": "copy"}}
    step = record(times={"step": record()["times"]["forward"]}, work=work, tokens=1234)
    run = a_run(step, topic="training_step", suite="train")
    assert tables.mfu(run, step) == pytest.approx(0.5)
    text = tables.page([run], {})
    assert "| gpt_fast | 1 s ± 0% | 1.00 | 50% | 1,234 | 50% | 3 MiB |" in text
    assert counts.MFU_FORMULA in text


def test_plots(tmp_path):
    """A series gives a picture of speed and one of memory, other cases bars; pictures of older runs go."""
    grows = [
        record(f"T={T}", peer, T / 1e6, sizes={"B": 1, "T": T}, series="T")
        for T in (1024, 2048)
        for peer in (OURS, "sdpa flash")
    ]
    (tmp_path / "old.png").write_bytes(b"")
    written = plots.draw([a_run(*grows, record("M=1"), record("M=2"), topic="attention")], tmp_path)
    assert set(written) == {"attention_T_float32.png", "attention_T_float32_memory.png", "attention_bars.png"}
    assert {path.name for path in tmp_path.iterdir()} == set(written)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())


def test_report_writes_a_page_for_each_device(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        results.write(a_run(record()), tmp_path / name / "layer_norm.json")
    (tmp_path / "empty").mkdir()
    pages = report.write_pages(tmp_path)
    assert [page.parent.name for page in pages] == ["one", "two"]
    assert "# A CPU" in pages[0].read_text()


def test_committed_pages_are_made_from_the_committed_files():
    """And so are README.md's figures: no number in them is typed."""
    found = report.devices(report.RESULTS)
    assert found
    for folder, runs in found.items():
        text = (folder / "README.md").read_text("utf-8")
        shown = {path.name: "" for path in folder.glob("*.png") if path.name != decode.PICTURE}
        page = report.device_page(folder, runs, shown)
        without = [line for line in text.splitlines() if not line.startswith("![")]
        assert without == [line for line in page.splitlines() if not line.startswith("![")], "make report"
        copies = report.DOCS_PICTURES / folder.name
        assert {p.name: p.read_bytes() for p in copies.glob("*")} == {
            p.name: p.read_bytes() for p in report.pictures(folder)
        }, "make report"
    assert report.figures(report.RESULTS) in (ROOT / "README.md").read_text("utf-8"), "README.md: make report"
    assert report.docs_page(report.RESULTS) == report.DOCS_PAGE.read_text("utf-8"), "make report"


def test_blocks_of_the_readme(monkeypatch):
    monkeypatch.setattr(report, "blocks", lambda: {"a": "new\n"})
    text = "x\n<!-- a: made by `make report` -->\nold\n<!-- /a -->\ny\n"
    assert report.rewritten(text) == text.replace("old", "new")
    with pytest.raises(ValueError, match="found 0 blocks of a"):
        report.rewritten("x")


# ---- the command


def refused(result, *messages):
    assert result.code == 2, result
    assert result.out == ""
    assert "Traceback" not in result.err
    for message in messages:
        assert message in result.err


def test_bad_input(cli, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "old.json").write_text(json.dumps(a_run(version=0)))
    (tmp_path / "ours.json").write_text(json.dumps(a_run(record())))
    (tmp_path / "empty").mkdir()
    refused(cli("bench", "--suite", "speed"), "--suite speed", "ops, train, decode")
    refused(cli("bench", "--device", "tpu"), "--device tpu", "auto, cpu or cuda")
    refused(cli("bench", "--suite", "mlp", "--out", tmp_path / "file"), "file")
    compare = ["bench", "--compare", tmp_path / "ours.json"]
    refused(cli(*compare, tmp_path / "none.json"), "none.json")
    refused(cli(*compare, tmp_path / "other.json"), "other.json: not a results file")
    refused(cli(*compare, tmp_path / "old.json"), "old.json: a results file of version 0")
    refused(cli(*compare, tmp_path / "empty"), "no results in this folder")
    refused(cli("bench", "--compare", tmp_path / "ours.json"), "--compare")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(cli):
    refused(cli("bench", "--device", "cuda"), "sees no CUDA device")


def test_compare_prints_what_moved(cli, tmp_path):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(a_run(record(), record(peer="torch"), record(case="M=5 float32"))))
    new.write_text(json.dumps(a_run(record(median=0.5), record(peer="torch"), record("M=5 float32", median=1.5))))
    result = cli("bench", "--compare", old, new)
    assert result.code == 0, result.err
    lines = [line.split() for line in result.out.splitlines()]
    assert lines[1][-6:] == [OURS, "1", "s", "500", "ms", "0.50"]
    assert lines[2][-6:] == [OURS, "1", "s", "1.5", "s", "1.50"]
    assert "3 figures in both: 1 faster, 1 slower, 1 within the noise" in result.out


def test_without_a_checkout_it_says_so(monkeypatch, tmp_path):
    from gpt_fast_cli import bench

    monkeypatch.setattr(bench, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="needs a checkout of the repository"):
        bench.bench()


def test_pytest_collects_the_cases():
    """One test for each case, pass and implementation."""
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "--collect-only", "-q"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    for topic in TOPICS.values():
        assert f"[{topic.name} " in done.stdout, topic.name
