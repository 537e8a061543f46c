"""Run folders: before its first checkpoint, a run is whole or not there."""

import stat
from pathlib import Path

import pytest

from gpt_fast.interrupts import Interrupted
from gpt_fast.training.runs import folder as runs


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_run_appears_whole(tmp_path):
    out = tmp_path / "runs" / "a"
    with runs.new_run(out) as run:
        (run.folder / "run.json").write_text("{}")
        assert not out.exists()
    assert listing(tmp_path) == ["runs", "runs/a", "runs/a/run.json"]
    assert stat.S_IMODE(out.stat().st_mode) == stat.S_IMODE(out.parent.stat().st_mode)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [False, True], ids=["new", "overwrite"])
def test_an_error_leaves_nothing(tmp_path, error, before):
    out = tmp_path / "runs" / "a"
    if before:
        out.mkdir(parents=True)
        (out / "run.json").write_text("old")
    held = listing(tmp_path)

    def fail() -> None:
        with runs.new_run(out, overwrite=before) as run:
            (run.folder / "run.json").write_text("new")
            raise error

    with pytest.raises(error):
        fail()
    assert listing(tmp_path) == held
    assert not before or (out / "run.json").read_text() == "old"


def test_a_stop_just_behind_the_first_checkpoint_keeps_it(tmp_path):
    """A second signal may come between the checkpoint and the call of `keep`."""
    out = tmp_path / "a"

    def stop() -> None:
        with runs.new_run(out, resume_command="gpt-fast this") as run:
            (run.checkpoints / "step-000000007").mkdir(parents=True)
            raise Interrupted(2)

    with pytest.raises(Interrupted) as stopped:
        stop()
    assert stopped.value.saved.startswith("stopped by SIGINT after update 7, whose checkpoint is saved")
    assert listing(out) == ["checkpoints", "checkpoints/step-000000007"]


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ([], "stopped by SIGINT; the weights are in {out}, which has no checkpoint"),
        (["run.json"], "stopped by SIGINT; the run in {out} is finished"),
        (
            ["checkpoints/step-000000007/checkpoint.json"],
            "stopped by SIGINT after update 7, whose checkpoint is saved; resume: gpt-fast this",
        ),
        (None, "stopped by SIGINT; nothing is left of this run"),
    ],
    ids=["weights", "finished", "checkpoint", "nothing"],
)
def test_a_stop_tells_what_is_left(tmp_path, files, told):
    out = tmp_path / "a"

    def stop() -> None:
        with runs.new_run(out, resume_command="gpt-fast this") as run:
            if files is not None:
                run.keep()
            for name in files or []:
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                (out / name).write_text("{}")
            raise Interrupted(2)

    with pytest.raises(Interrupted) as stopped:
        stop()
    assert stopped.value.saved == told.format(out=out)
    assert out.is_dir() == (files is not None)


def test_overwrite_replaces_a_run(tmp_path):
    out = tmp_path / "a"
    out.mkdir()
    (out / "metrics.jsonl").write_text("old")
    with pytest.raises(FileExistsError, match=r"already holds a run.*--overwrite"), runs.new_run(out):
        pass
    with runs.new_run(out, overwrite=True) as run:
        (run.folder / "run.json").write_text("new")
    assert listing(tmp_path) == ["a", "a/run.json"]


def test_overwrite_spares_what_is_no_run(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"holds what no run wrote \(thesis.tex\)"), runs.new_run(tmp_path, True):
        pass
    assert listing(tmp_path) == ["run.json", "thesis.tex"]


def test_an_empty_folder_is_taken(tmp_path):
    out = tmp_path / "a"
    out.mkdir()
    with runs.new_run(out) as run:
        (run.folder / "run.json").write_text("{}")
    assert listing(tmp_path) == ["a", "a/run.json"]


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file"), runs.new_run(tmp_path / "file"):
        pass
    with pytest.raises(ValueError, match="cannot write there"), runs.new_run(tmp_path / "file" / "a"):
        pass


def test_a_run_can_be_watched_from_its_first_update(tmp_path):
    """`publish` makes the run visible. An error before `keep` still restores the run that was there."""
    out = tmp_path / "a"
    out.mkdir()
    (out / "run.json").write_text("old")

    def fail(keep: bool) -> None:
        with runs.new_run(out, overwrite=True) as run:
            (run.folder / "metrics.jsonl").write_text("new")
            run.publish()
            assert listing(out) == ["metrics.jsonl"]
            if keep:
                run.keep()
            raise ValueError

    with pytest.raises(ValueError):
        fail(keep=False)
    assert listing(tmp_path) == ["a", "a/run.json"]
    with pytest.raises(ValueError):
        fail(keep=True)
    assert listing(tmp_path) == ["a", "a/metrics.jsonl"]


def test_resume_replaces_what_has_no_checkpoint(tmp_path):
    """A kill before the first checkpoint leaves such a folder. A finished run is not replaced."""
    out = tmp_path / "a"
    out.mkdir()
    (out / "metrics.jsonl").write_text("old")
    with runs.new_run(out, resume=True) as run:
        (run.folder / "run.json").write_text("{}")
    assert listing(tmp_path) == ["a", "a/run.json"]
    with pytest.raises(FileExistsError, match="already holds a run"), runs.new_run(out, resume=True):
        pass


def test_two_processes_cannot_train_in_one_folder(tmp_path):
    out = tmp_path / "a"
    (out / "checkpoints" / "step-000000001").mkdir(parents=True)
    with (
        runs.new_run(out, resume=True),
        pytest.raises(ValueError, match="another process is training there"),
        runs.new_run(out, resume=True),
    ):
        pass


@pytest.mark.parametrize("options", [{"resume": True}, {"overwrite": True}], ids=["resume", "overwrite"])
def test_no_process_replaces_what_another_has_just_begun(tmp_path, options):
    """The first run has no checkpoint yet, and may appear after the second run's start."""
    out = tmp_path / "a"
    with runs.new_run(out) as first:
        (first.folder / "metrics.jsonl").write_text("first")

        def begin() -> None:
            with runs.new_run(out, **options) as second:
                first.publish()
                (second.folder / "metrics.jsonl").write_text("second")
                second.publish()

        for _ in range(2):
            with pytest.raises(ValueError, match="another process is training there"):
                begin()
            assert listing(tmp_path) == ["a", "a/metrics.jsonl"]
    assert (out / "metrics.jsonl").read_text() == "first"


def test_what_a_kill_left_is_swept_up(tmp_path):
    """Folders of killed processes are removed. A folder that a living process holds is kept."""
    (tmp_path / ".a.new-dead").mkdir()
    (tmp_path / ".b.new-other").mkdir()

    def fail() -> None:
        with runs.new_run(tmp_path / "a"):
            assert first.folder.exists()
            raise KeyError

    with runs.new_run(tmp_path / "a") as first:
        assert not (tmp_path / ".a.new-dead").exists()
        with pytest.raises(KeyError):
            fail()
        (first.folder / "run.json").write_text("{}")
    assert listing(tmp_path) == [".b.new-other", "a", "a/run.json"]


@pytest.mark.parametrize("killed", ["between_the_moves", "in_training", "after_a_checkpoint"])
def test_a_run_that_overwrite_moved_away_is_put_back(tmp_path, killed):
    """The run is put back unless its replacement has a checkpoint, which is kept instead."""
    out, hidden = tmp_path / "a", tmp_path / ".a.old-x" / "a"
    hidden.mkdir(parents=True)
    (hidden / "run.json").write_text("old")
    if killed != "between_the_moves":
        out.mkdir()
        (out / "metrics.jsonl").write_text("")
    if killed == "after_a_checkpoint":
        (out / "checkpoints" / "step-000000001").mkdir(parents=True)
        with runs.new_run(out, resume=True):
            assert not hidden.parent.exists()
        return
    with pytest.warns(UserWarning, match="is back"), pytest.raises(FileExistsError), runs.new_run(out):
        pass
    assert listing(tmp_path) == ["a", "a/run.json"]
    assert (out / "run.json").read_text() == "old"


def test_overwrite_or_resume(tmp_path):
    with (
        pytest.raises(ValueError, match="--overwrite and --resume"),
        runs.new_run(tmp_path, overwrite=True, resume=True),
    ):
        pass
