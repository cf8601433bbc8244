"""Plots: they return the figure, draw into the one they are given, and show nothing."""

import sys

import pytest
import torch
from matplotlib.figure import Figure

from pyro_sparsevd import plots

HISTORY = [{"error": 0.5, "compression": 1.0}, {"error": 0.02, "compression": 50.0}]
DRAW = {
    "weight_images": lambda **kw: plots.weight_images(torch.randn(5, 4, 3), **kw),
    "weight_images of zeros": lambda **kw: plots.weight_images(torch.zeros(1, 4, 3), **kw),
    "log_alpha_histogram": lambda **kw: plots.log_alpha_histogram({"w": torch.tensor([1.0, torch.inf])}, **kw),
    "training_curves": lambda **kw: plots.training_curves(HISTORY, baseline=0.01, **kw),
}


@pytest.mark.parametrize("draw", DRAW.values(), ids=DRAW)
def test_a_new_figure_is_returned_and_can_be_saved(draw, tmp_path):
    figure = draw()
    figure.savefig(tmp_path / "figure.png")
    assert isinstance(figure, Figure)
    assert (tmp_path / "figure.png").stat().st_size > 1000


@pytest.mark.parametrize("draw", DRAW.values(), ids=DRAW)
def test_the_given_figure_is_drawn_into(draw):
    figure = Figure()
    left, right = figure.subfigures(1, 2)
    assert draw(figure=left) is left
    assert left.axes
    assert not right.axes


def test_no_more_units_than_asked_for_are_drawn():
    figure = plots.weight_images(torch.randn(10, 4, 3), count=4)
    assert sum(bool(axis.images) for axis in figure.axes) == 4


def test_weights_must_be_images():
    with pytest.raises(ValueError, match=r"weight: expected shape \(units, height, width\), but got \(3, 4\)"):
        plots.weight_images(torch.randn(3, 4))


def test_pyplot_is_not_imported():
    assert "matplotlib.pyplot" not in sys.modules or "pyplot" not in vars(plots)
