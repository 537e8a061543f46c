"""Run a hundred random sessions of DecodeSession, and test that such sessions find planted faults."""

import pytest

from gpt_fast import DecodeSession, build_info
from gpt_fast.generation import session as session_module
from gpt_fast.generation.cache import StepPass
from gpt_fast.generation.steps import CppStep
from tests.conftest import INTERPRETED
from tests.fuzz import sessions
from tests.fuzz.sessions import run_one

pytestmark = pytest.mark.skipif(
    build_info() is None or INTERPRETED, reason="the C++ step is what most sessions are about: it needs the extension"
)


def run_sessions(indices):
    for index in indices:
        run_one(seed=1, index=index)


@pytest.mark.parametrize("part", range(10))
def test_random_sessions(part, one_thread):
    """Run ten sessions for each part, with a fixed seed, so that a failure can be repeated."""
    run_sessions(range(10 * part, 10 * part + 10))


def lengths_kept_after_a_full_cache(monkeypatch):
    """Plant a fault: a refused step still counts its token."""
    check_room = DecodeSession.check_room

    def counts_first(self, more, rows=slice(None)):
        self.cache.lengths[rows] += more
        check_room(self, 0, rows)
        self.cache.lengths[rows] -= more

    monkeypatch.setattr(DecodeSession, "check_room", counts_first)


def stale_copies(monkeypatch):
    """Plant a fault: parameters that moved to other memory are not packed again."""
    make_step = DecodeSession._make_step

    def only_once(self):
        if not hasattr(self, "_step"):
            make_step(self)
        self._places = session_module._Places(self.model)

    monkeypatch.setattr(DecodeSession, "_make_step", only_once)


def late_position(monkeypatch):
    """Plant a fault: the step of the modules does not attend to the newest key."""
    attend = StepPass.attend

    def without_itself(self, layer, qkv, num_heads):
        self.positions = (self.positions - (layer == 0)).clamp(min=0)
        return attend(self, layer, qkv, num_heads)

    monkeypatch.setattr(StepPass, "attend", without_itself)


def swapped_rows(monkeypatch):
    """Plant a fault: the C++ step gives each row the token of another row."""
    step = CppStep._step
    monkeypatch.setattr(CppStep, "_step", lambda self, t, n, rows, *rest: step(self, t.flip(0), n, rows, *rest))


def wrong_padding(monkeypatch):
    """Plant a fault: all rows of a prompt get the length of the longest row."""
    check_prompt = session_module.check_prompt

    def longest(*arguments):
        counts = check_prompt(*arguments)
        return counts.new_full(counts.shape, int(counts.max()))

    monkeypatch.setattr(session_module, "check_prompt", longest)


FAULTS = (lengths_kept_after_a_full_cache, stale_copies, late_position, swapped_rows, wrong_padding)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_planted_faults_are_found(fault, monkeypatch, one_thread):
    """One of thirty sessions fails, and its message names the operation."""
    fault(monkeypatch)
    with pytest.raises(AssertionError, match=r"session 1/\d+, operation \d+ of "):
        run_sessions(range(30))


def test_seed_and_index_decide_a_session(monkeypatch, one_thread):
    """Seed and index decide a session's model, its operations and its rows, so a failure can be repeated."""

    def record(name):
        weight, operation = sessions.OPERATIONS[name]

        def recorded(fuzz):
            operation(fuzz)
            seen.append((name, repr(fuzz), fuzz.lengths, float(fuzz.trunk.pos_emb.detach().sum())))

        monkeypatch.setitem(sessions.OPERATIONS, name, (weight, recorded))

    for name in list(sessions.OPERATIONS):
        record(name)
    runs = []
    for index in (0, 0, 1):
        seen: list[tuple] = []
        run_one(seed=1, index=index)
        runs.append(seen)
    assert runs[0] == runs[1] != runs[2]


def test_many_draws_judge_what_few_find_inaccurate(monkeypatch):
    """An error that few random roundings do not allow is judged again by many. If they do not allow it, it remains."""
    runs = []

    def judged(fuzz, got, rows, label):
        runs.append(fuzz.draws)
        fuzz.checked.append(got)
        if fuzz.draws < sessions.MANY_DRAWS or always_wrong:
            raise sessions.Inaccurate("too far", got)

    monkeypatch.setattr(sessions, "check_logits", judged)
    monkeypatch.setattr(sessions, "MANY_DRAWS", 25)
    always_wrong = False
    index = next(index for index in range(20) if _checks(index, runs))
    assert {sessions.DRAWS, 25} == set(runs)
    always_wrong = True
    with pytest.raises(AssertionError, match="Inaccurate: too far"):
        run_one(seed=1, index=index)


def _checks(index: int, runs: list[int]) -> bool:
    run_one(seed=1, index=index)
    return bool(runs)
