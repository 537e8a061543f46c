"""Test how the suite measures: turns, rounds, pairs, memory, refusals and interruptions. No test measures a speed."""

import dataclasses
import signal
import subprocess
import sys
import types

import psutil
import pytest
import torch

from benchmarks import catalogue
from benchmarks.measure import busy, environment, floors, gate, memory, runner, timing
from benchmarks.report import pages, results
from benchmarks.topic import LEFT, OURS, Case, Study
from tests.suite.figures import FLOORS


def test_implementations_take_turns(monkeypatch):
    """Rounds are spread evenly: those of the slow implementation lie between those of the fast one."""
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


def test_turns_change_their_order():
    """An implementation that runs after another finds its inputs cached, so each has each place about equally often."""
    order = []
    watches = [timing.Stopwatch("cpu", [lambda name=name: order.append(name)]) for name in "abc"]
    timing.take_turns(watches, timing.Budget(0.0, 300))
    laps = [order[i : i + 3] for i in range(len(order) - 900, len(order), 3)]
    for place in range(3):
        assert all(70 < [lap[place] for lap in laps].count(name) < 130 for name in "abc")


def test_calls_of_the_warm_up_do_not_count(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(timing, "clock", lambda device, cpu_time: lambda: now[0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    watch = timing.Stopwatch("cpu", [lambda: (calls.append(1), now.__setitem__(0, now[0] + 3.0))])
    timing.take_turns([watch], timing.Budget(1.0, 3))
    assert len(watch.seconds) == 3
    assert len(calls) == 5  # the first call, one more of the warm-up, and three rounds


def test_very_long_calls_are_made_once(monkeypatch):
    """A very long call is made once, or twice if the first call compiles."""
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


@pytest.mark.skipif(not memory._CLEAR_REFS.exists(), reason="peak memory of the CPU is read from Linux's /proc")
def test_peak_memory_is_what_a_call_adds():
    kept = torch.ones(1 << 22)
    size = 64 << 20

    def two_tensors() -> None:
        (torch.ones(size // 4) + 1).sum()

    def none() -> None:
        kept.sum()

    assert 1.99 * size < memory.peak_memory("cpu", two_tensors) < 2.4 * size
    assert memory.peak_memory("cpu", none) < size / 8


def test_a_ratio_is_taken_over_pairs_of_neighbouring_rounds(monkeypatch):
    """A machine that slows down during the run changes the ratio of the medians, but not the ratio within a pair."""
    now, slow = [0.0], [1.0]
    monkeypatch.setattr(timing, "clock", lambda device, cpu_time: lambda: now[0])

    def call(duration):
        return lambda: now.__setitem__(0, now[0] + duration * slow[0])

    ours, peer = timing.Stopwatch("cpu", [call(0.1)]), timing.Stopwatch("cpu", [call(0.3)])
    for lap, factor in enumerate((1.0, 1.0, 5.0, 5.0)):
        slow[0] = factor
        ours.keep(ours.call(), lap)
        if lap in (0, 3):  # the slower implementation has fewer rounds
            peer.keep(peer.call(), lap)
    assert peer.ratio_to(ours) == pytest.approx({"median": 3.0, "q1": 3.0, "q3": 3.0})


@pytest.mark.parametrize("elements", [0, 1, 63, 1 << 20, (1 << 20) + 37])
def test_reading_reads_everything(elements):
    """The reader of the read floor sums all elements, including those that fill no whole vector."""
    x = torch.randn(elements)
    assert floors.reader(x)() == pytest.approx(x.double().sum().item(), abs=1e-2)


def test_reading_refuses_what_it_would_misread():
    with pytest.raises(ValueError, match="expected contiguous float32"):
        floors.reader(torch.zeros(4, 4).t()[1:])
    with pytest.raises(ValueError, match="expected contiguous float32"):
        floors.reader(torch.zeros(4, dtype=torch.int32))


# ---- a run


@pytest.fixture
def tiny(monkeypatch):
    """Return a topic with two small cases of layer_norm. Its floors are given, and its tests pass."""

    def two(device):
        for M in (3, 5):
            yield Case("layer_norm", device, (("M", M), ("N", 8)), torch.float32, peers=(OURS, "torch", "Liger"))

    monkeypatch.setattr(runner, "measure_floors", lambda device, cpu_time: FLOORS.items())
    monkeypatch.setattr(runner, "run_tests", lambda topic, device: "")
    monkeypatch.setattr(timing, "FULL", timing.Budget(0.0, 2))
    return dataclasses.replace(catalogue.ops()["layer_norm"], cases=two)


def files(folder):
    return list(folder.glob("*/*.json"))


def test_a_run_writes_what_it_measured(tiny, tmp_path):
    shown = []
    settings = runner.Settings("cpu", out=tmp_path, done=lambda run, records: shown.append(records))
    outcome = runner.run([tiny], settings)
    assert outcome.files == files(tmp_path)
    assert outcome.files[0].parent.name == environment.slug(results.read(outcome.files[0])["device"]["name"])
    run = results.read(outcome.files[0])
    assert not run["partial"]
    assert [(r["case"], r["peer"]) for r in run["records"]] == [
        (f"M={M} N=8 float32", peer) for M in (3, 5) for peer in (OURS, "torch")
    ]
    assert all(r["times"]["backward"]["rounds"] >= 2 and r["times"]["forward"]["median"] > 0 for r in run["records"])
    assert {entry["peer"] for entry in run["missing"]} == {"Liger"}  # cannot run here
    assert [len(records) for records in shown] == [2, 2]
    assert run["sessions"][0]["floors"] == FLOORS and run["sessions"][0]["keeps_freed"] is True
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
    assert "**Partial**" in pages.device_page(tmp_path, [run], {})
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


def test_an_implementation_that_compiles_is_measured_last(tiny, tmp_path):
    """A run that is interrupted while one compiles has the results of the others.

    The implementation that compiles still takes turns with ours.
    """
    torch_peer = next(peer for peer in tiny.peers if peer.name == "torch")

    def cut_off(case):
        raise KeyboardInterrupt

    def with_compiled(build):
        slow = dataclasses.replace(torch_peer, name="Liger", compiles=True, build=build)
        return dataclasses.replace(tiny, peers=(slow, tiny.peers[0], torch_peer))

    outcome = runner.run([with_compiled(cut_off)], runner.Settings("cpu", out=tmp_path))
    assert outcome.interrupted
    assert [record["peer"] for record in results.read(files(tmp_path)[0])["records"]] == [OURS, "torch"]
    runner.run([with_compiled(torch_peer.build)], runner.Settings("cpu", out=tmp_path))
    records = results.read(files(tmp_path)[0])["records"]
    assert [record["peer"] for record in records] == [OURS, "torch", "Liger"] * 2
    assert all("to_ours" in time for record in records[1:3] for time in record["times"].values())


@pytest.mark.parametrize("kind", [RuntimeError, AssertionError])
def test_an_implementation_that_fails_is_missing_and_ours_may_not(kind, tiny, tmp_path):
    """Another implementation that raises is listed as missing. An error of ours ends the run, unless memory runs out.

    AssertionError is tested too, because Liger asserts that it supports a call.
    """

    def fail(case):
        raise kind("no such kernel\nand more")

    peers = tuple(dataclasses.replace(peer, build=fail) if peer.name == "torch" else peer for peer in tiny.peers)
    runner.run([dataclasses.replace(tiny, peers=peers)], runner.Settings("cpu", out=tmp_path))
    run = results.read(files(tmp_path)[0])
    assert {r["peer"] for r in run["records"]} == {OURS}
    assert {"case": "M=3 N=8 float32", "peer": "torch", "reason": "no such kernel"} in run["missing"]
    assert "- torch: no such kernel" in pages.device_page(tmp_path, [run], {})
    ours = dataclasses.replace(tiny.peers[0], build=fail)
    with pytest.raises(kind, match="no such kernel"):
        runner.run([dataclasses.replace(tiny, peers=(ours,))], runner.Settings("cpu", out=tmp_path))

    def exhaust(case):
        raise torch.OutOfMemoryError("out of memory")

    ours = dataclasses.replace(tiny.peers[0], build=exhaust)
    runner.run([dataclasses.replace(tiny, peers=(ours,))], runner.Settings("cpu", out=tmp_path))
    assert {entry["reason"] for entry in results.read(files(tmp_path)[0])["missing"]} == {"out of memory"}


def test_cpu_time_is_that_of_the_process(tiny, tmp_path):
    """With `cpu_time`, waiting takes no time, and the device's name and page say that CPU time was measured."""
    watch = timing.Stopwatch("cpu", [lambda: timing.time.sleep(0.1)], cpu_time=True)
    assert watch.call() < 0.05
    assert timing.Stopwatch("cpu", [lambda: timing.time.sleep(0.1)]).call() >= 0.1
    outcome = runner.run([tiny], runner.Settings("cpu", cpu_time=True, out=tmp_path))
    assert outcome.files[0].parent.name.endswith("-cpu-time")
    assert "CPU seconds of one thread" in pages.device_page(tmp_path, [results.read(outcome.files[0])], {})


def test_the_busy_process_computes_and_ends_with_its_block():
    with busy.busy_process() as process:
        timing.time.sleep(0.3)
        assert process.poll() is None
        assert psutil.Process(process.pid).cpu_times().user > 0
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(KeyboardInterrupt), busy.busy_process() as process:
        raise KeyboardInterrupt
    assert process.returncode == -signal.SIGKILL


def test_the_busy_process_ends_if_the_suite_is_killed():
    code = "from benchmarks.measure.busy import *\nwith busy_process() as p:\n print(p.pid, flush=True)\n p.wait()"
    with subprocess.Popen([sys.executable, "-c", code], cwd=environment.ROOT, stdout=subprocess.PIPE) as suite:
        loop = psutil.Process(int(suite.stdout.readline()))
        suite.kill()
    loop.wait(timeout=60)  # raises TimeoutExpired if the process still runs


def test_a_busy_run_has_a_file_of_its_own_and_quiet_figures_of_one_thread_less(tiny, tmp_path, monkeypatch):
    before, used = torch.get_num_threads(), []
    build = tiny.peers[0].build

    def noted(case):
        used.append(torch.get_num_threads())
        return build(case)

    topic = dataclasses.replace(tiny, peers=(dataclasses.replace(tiny.peers[0], build=noted), *tiny.peers[1:]))
    runner.run([topic], runner.Settings("cpu", out=tmp_path))
    used.clear()
    outcome = runner.run([topic], runner.Settings("cpu", out=tmp_path, busy=True))
    assert [path.name for path in outcome.files] == ["layer_norm_busy.json"]
    run = results.read(outcome.files[0])
    assert run["busy"] is True
    assert [r["peer"] for r in run["records"]] == [f"{OURS}, {LEFT}", OURS, "torch"] * 2
    assert used == [max(1, before - 1), before] * 2
    assert torch.get_num_threads() == before
    (quiet, busy_run) = results.read_any(outcome.files[0].parent)
    assert (quiet.get("busy"), busy_run["busy"]) == (None, True)
    study = next(study for study in catalogue.studies().values() if not study.timed)
    assert runner.here([study, topic], "cpu", busy=True) == [topic]


def test_red_tests_refuse_a_time(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "run_tests", lambda topic, device: "1 failed")
    outcome = runner.run([tiny], runner.Settings("cpu", out=tmp_path))
    assert outcome.refused == {"layer_norm": "1 failed"}
    assert files(tmp_path) == []


def test_an_untested_run_says_so(tiny, tmp_path, monkeypatch):
    """An untested run is marked in its file and on its page, even if it resumes a tested run."""
    monkeypatch.setattr(runner, "run_tests", lambda topic, device: "")
    outcome = runner.run([tiny], runner.Settings("cpu", out=tmp_path))
    assert "untested" not in results.read(outcome.files[0])
    monkeypatch.setattr(runner, "run_tests", lambda topic, device: pytest.fail("ran the tests"))
    outcome = runner.run([tiny], runner.Settings("cpu", out=tmp_path, resume=True, untested=True))
    run = results.read(outcome.files[0])
    assert run["untested"] is True
    assert "may be of wrong results" in pages.device_page(tmp_path, [run], {})


def test_tests_are_run_again_when_files_change(tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "ROOT", tmp_path)
    monkeypatch.setattr(gate, "GREEN", tmp_path / "build" / "green.json")
    topic = types.SimpleNamespace(name="x", tests=("test_x.py",))
    test = tmp_path / "tests" / "test_x.py"
    test.parent.mkdir()
    test.write_text("def test_x():\n    assert 1 == 2\n")
    assert "1 failed" in gate.run_tests(topic, "cpu")
    assert "1 failed" in gate.run_tests(topic, "cpu")
    test.write_text("def test_x():\n    pass\n")
    assert gate.run_tests(topic, "cpu") == ""
    monkeypatch.setattr(gate.subprocess, "run", lambda *args, **options: pytest.fail("ran passed tests again"))
    assert gate.run_tests(topic, "cpu") == ""


def test_a_topic_without_a_test_for_the_device_is_refused(tmp_path, monkeypatch):
    """The message names the files that have no test for the device. pytest itself would only report an error."""
    monkeypatch.setattr(gate, "ROOT", tmp_path)
    monkeypatch.setattr(gate, "GREEN", tmp_path / "build" / "green.json")
    test = tmp_path / "tests" / "test_x.py"
    test.parent.mkdir()
    test.write_text("def test_x():\n    pass\n")
    topic = types.SimpleNamespace(name="x", tests=("test_x.py",))
    assert "tests/test_x.py: no test is marked for cuda" in gate.run_tests(topic, "cuda")


@pytest.mark.parametrize(("available", "paired"), [(100, True), (99, False)])
def test_a_model_in_training_takes_turns_with_ours_if_two_fit(tiny, tmp_path, monkeypatch, available, paired):
    """With `pair_bytes`, each implementation takes turns with ours alone, if the memory of the device suffices."""
    monkeypatch.setattr(runner, "available_memory", lambda device: available)
    topic = dataclasses.replace(tiny, pair_bytes=lambda case: 100)
    (path,) = runner.run([topic], runner.Settings("cpu", out=tmp_path)).files
    records = results.read(path)["records"]
    assert [record["peer"] for record in records] == [OURS, "torch"] * 2
    for record in records:
        for time in record["times"].values():
            assert ("to_ours" in time) == (paired and record["peer"] != OURS)


# ---- studies


@pytest.fixture
def study():
    """Return a study, and the list of the devices on which it was measured."""
    measured = []

    def measure(device, quick, cpu_time):
        measured.append(device)
        return {"answer": 42}

    return Study("overhead", "ops", measure, lambda record: [f"## {record['answer']}"], fields=("answer",)), measured


def test_a_study_writes_its_record_and_is_not_repeated_when_resumed(study, tmp_path):
    study, measured = study
    shown = []
    settings = runner.Settings("cpu", out=tmp_path, studied=lambda study, record: shown.append(study.lines(record)))
    (path,) = runner.run([study], settings).files
    record = results.read_study(path, study)
    assert (record["topic"], record["answer"], measured) == ("overhead", 42, ["cpu"])
    runner.run([study], dataclasses.replace(settings, resume=True))
    assert measured == ["cpu"]
    assert shown == [["## 42"]] * 2
    runner.run([study], settings)
    assert measured == ["cpu"] * 2
    path.write_text(path.read_text().replace("answer", "question"))
    with pytest.raises(ValueError, match=r"overhead\.json: a damaged results file: answer missing"):
        results.read_study(path, study)


def test_what_does_not_run_on_a_device_is_left_out(study):
    study, _ = study
    on_cpu = dataclasses.replace(study, devices=("cpu",))
    linear = catalogue.ops()["linear"]
    assert runner.here([study, on_cpu, linear], "cuda") == [study]
    assert runner.here([study, on_cpu, linear], "cpu") == [study, on_cpu, linear]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_full_run_measures_whatever_a_target_names(device):
    """A target against an implementation that a full run leaves out could never be judged."""
    for topic in catalogue.topics().values():
        anywhere = tuple(dataclasses.replace(peer, missing=lambda case: None) for peer in topic.peers)
        whole = dataclasses.replace(topic, peers=anywhere)
        for case in topic.cases(device):
            left_out = {peer.name for peer, reason in runner.runs_here(whole, case, quick=False)[1]}
            for target in topic.targets(case):
                peers = {target.peer} if isinstance(target.peer, str) else set(target.peer)
                assert not left_out & (peers | {target.who}), case.name
            if topic.pair_bytes:
                assert not any(peer.compiles for peer in runner.runs_here(whole, case, quick=True)[0])
