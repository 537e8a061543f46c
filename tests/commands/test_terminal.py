"""How results are printed: on a terminal, and into a file or pipe."""

import pytest

from gpt_fast_cli.terminal import print_table

ROWS = [("run folder", "runs/" + "a" * 120), ("loss", "2.5 [nats] per token"), ("名", "x")]


@pytest.mark.parametrize("width", ["20", "80", "400"])
def test_a_pipe_gets_values_whole(capsys, monkeypatch, width):
    """Values are neither cut nor folded. There are no colours, no markup and no spaces at the ends of lines."""
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.setenv("TERM", "xterm-256color")
    print_table("pre-trained " * 10, ROWS)
    assert capsys.readouterr().out == (
        f"{'pre-trained ' * 10}".rstrip() + "\n"
        f"  run folder  runs/{'a' * 120}\n"
        "  loss        2.5 [nats] per token\n"
        "  名          x\n"
    )


def test_a_terminal_folds_values_inside_their_column(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    print_table("pre-trained", ROWS)
    title, first, second, *_ = capsys.readouterr().out.splitlines()
    assert title == "\x1b[1mpre-trained\x1b[0m"
    assert first.startswith("  run folder  runs/aaa")
    assert second.startswith(" " * 14 + "aaa")
