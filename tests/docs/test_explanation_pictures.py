"""Test that the page that explains how the library works states the figures that the library gives."""

import torch

from benchmarks.measure.environment import ROOT
from gpt_fast import ops
from tools import explanation_pictures


def test_the_page_states_the_memory_that_is_counted():
    page = (ROOT / "docs" / "reference" / "how-it-works.md").read_text("utf-8")
    for op, (plain, ours) in explanation_pictures.kept_for_backward().items():
        assert f"| `{op}` | {plain:,.0f} MiB | {ours:,.0f} MiB |" in page


def test_what_is_kept_counts_tensors_once_and_not_what_was_given():
    """A norm keeps float32 statistics of each row besides its input, its gain and its bias."""
    x, weight, bias = (torch.ones(shape, requires_grad=True) for shape in ((1024, 8), (8,), (8,)))
    kept = explanation_pictures._kept(lambda: ops.layer_norm(x, weight, bias), x, weight, bias)
    assert kept == 2 * 4 * 1024 / explanation_pictures.MIB


def test_every_picture_is_drawn_and_committed():
    for name, draw in explanation_pictures.PICTURES.items():
        assert draw().axes
        assert (explanation_pictures.ASSETS / f"{name}.svg").exists()
