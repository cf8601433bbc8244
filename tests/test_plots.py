"""Plots: they return the figure, draw into the one they are given, and show nothing."""

import math
import sys

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from pyro_sparsevd import plots
from pyro_sparsevd.comparison import PriorComparison, PriorResult
from pyro_sparsevd.divergence import kl_log_uniform
from pyro_sparsevd.sweep import SweepPoint

HISTORY = [
    {"error": 0.5, "compression": 1.0, "nll": 900.0, "kl": 30.0},
    {"error": 0.02, "compression": 50.0, "nll": 100.0, "kl": 90.0},
]
POINTS = [SweepPoint(0.0, 0.03, 0.1, 0.99, 100.0), SweepPoint(3.0, 0.02, 0.1, 0.98, 50.0)]
RESULTS = (
    PriorResult("normal", 0, 0.05, 0.2, 0.01, 0.08, 0.06, math.nan, math.nan, math.nan, 2e-3),
    PriorResult("log-uniform", 0, 0.06, 0.3, 0.01, 0.05, 0.06, 40.0, 1.5, 0.07, 2e-3),
    PriorResult("log-uniform", 1, 0.06, 0.3, 0.01, 0.05, 0.06, math.inf, -math.inf, 0.07, 2e-3),
)
DRAW = {
    "weight_images": lambda **kw: plots.weight_images(torch.randn(5, 4, 3), **kw),
    "weight_images of zeros": lambda **kw: plots.weight_images(torch.zeros(1, 4, 3), **kw),
    "log_alpha_histogram": lambda **kw: plots.log_alpha_histogram({"w": torch.tensor([1.0, torch.inf])}, **kw),
    "training_curves": lambda **kw: plots.training_curves(HISTORY, baseline=0.01, **kw),
    "training_curves of the bound": lambda **kw: plots.training_curves(HISTORY, left={"nll": "NLL"}, right={}, **kw),
    "threshold_curves": lambda **kw: plots.threshold_curves(POINTS, chosen=3.0, **kw),
    "compression_curves": lambda **kw: plots.compression_curves([10, 99], {"a": [0.1, 0.2]}, baseline=0.05, **kw),
    "mean_and_scale": lambda **kw: plots.mean_and_scale(torch.randn(50), torch.randn(50), threshold=3.0, **kw),
    "mean_and_scale of zeros": lambda **kw: plots.mean_and_scale(torch.zeros(5), torch.zeros(5), threshold=3.0, **kw),
    "prior_and_posteriors": lambda **kw: plots.prior_and_posteriors({"kept": (1.0, -3.0)}, **kw),
    "divergences": lambda **kw: plots.divergences(samples={-2.0: 1.5, 2.0: 0.1}, **kw),
    "prior_comparison": lambda **kw: plots.prior_comparison(PriorComparison(RESULTS, "error"), **kw),
    "prior_comparison of squared errors": lambda **kw: plots.prior_comparison(PriorComparison(RESULTS, "mse"), **kw),
    "connections": lambda **kw: plots.connections([torch.eye(3), torch.tensor([[1.0, -1.0, 0.0]])], **kw),
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


@pytest.mark.parametrize("draw", DRAW.values(), ids=DRAW)
def test_every_axis_of_a_chart_says_what_it_shows(draw):
    for axis in draw().axes:
        if axis.axison:
            assert axis.get_ylabel() or axis.get_xlabel()


def test_training_curves_name_their_axes_and_are_logarithmic_only_where_that_shows_more():
    history = [{"nll": 100.0 / n, "sparsity": 1 - 1 / n, "error": 0.1 - n / 1000} for n in range(1, 30)]
    (bound,) = plots.training_curves(history, left={"nll": "NLL, nats"}, right={}).axes
    assert (bound.get_ylabel(), bound.get_yscale()) == ("NLL, nats", "log")
    left, right = plots.training_curves(history, right={"sparsity": "sparsity"}).axes
    assert (left.get_ylabel(), left.get_yscale()) == ("error", "linear")
    assert (right.get_ylabel(), right.get_yscale()) == ("sparsity", "linear")


def test_divergences_are_those_of_the_package():
    above, below = plots.divergences().axes
    exact = next(line for line in above.get_lines() if line.get_label() == "exact")
    log_alpha, drawn = (torch.as_tensor(v) for v in exact.get_data())
    torch.testing.assert_close(drawn, kl_log_uniform(torch.ones_like(log_alpha), log_alpha, "exact"))
    assert 0.005 < abs(below.get_lines()[0].get_ydata()).max() < 0.0094


def test_dropped_weights_lie_above_the_lines_of_the_threshold():
    loc, log_variance = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 4.0])
    points, line = plots.mean_and_scale(loc, log_variance, threshold=3.0).axes[0].get_lines()
    limit = line.get_ydata()[2]
    assert [scale > limit for scale in points.get_ydata()] == [False, True]


def test_a_prior_that_missed_the_level_is_a_hollow_mark_at_1_with_its_whole_error():
    by_name = lambda axis, label: next(a for a in axis.axes if a.get_ylabel() == label)  # noqa: E731
    figure = plots.prior_comparison(PriorComparison(RESULTS, "error"))
    missed, reached, _ = by_name(figure, "error, %").get_lines()
    assert [line.get_xdata()[0] for line in (missed, reached)] == [1, 40]
    assert [line.get_ydata()[0] for line in (missed, reached)] == pytest.approx([5, 7])
    assert [line.get_fillstyle() for line in (missed, reached)] == ["none", "full"]
    assert missed.get_marker() != reached.get_marker()
    assert [line.get_ydata()[0] for line in by_name(figure, "NLL, nats").get_lines()] == [0.2, 0.3, 0.3]


def test_connections_are_the_weights_that_are_not_zero():
    weights = [torch.tensor([[1.0, 0.0], [-2.0, 0.5]]), torch.tensor([[0.0, 3.0]])]
    axis = plots.connections(weights).axes[0]
    segments = [tuple(map(tuple, s)) for c in axis.collections if hasattr(c, "get_segments") for s in c.get_segments()]
    assert len(set(segments)) == len(segments) == 4
    assert sum(start[0] == 0 for start, _ in segments) == 3


@pytest.mark.parametrize("shapes", [[], [(3,)], [(2, 3), (2, 3)]], ids=str)
def test_connections_need_layers_in_a_row(shapes):
    with pytest.raises(ValueError, match=r"weights: expected shapes \(b, a\), \(c, b\), \.\.\. of layers in a row"):
        plots.connections([torch.ones(shape) for shape in shapes])


def test_an_animation_has_a_frame_for_each_entry_and_is_small(tmp_path):
    path = tmp_path / "weights.gif"
    plots.animate_weight_images([torch.randn(36, 28, 28) for _ in range(6)], path)
    with Image.open(path) as image:
        assert (image.format, image.n_frames) == ("GIF", 6)
    assert path.stat().st_size < 3e6


def test_an_animation_needs_a_frame(tmp_path):
    with pytest.raises(ValueError, match="history: expected the weights of at least one frame"):
        plots.animate_weight_images([], tmp_path / "weights.gif")


def test_pyplot_is_not_imported():
    assert "matplotlib.pyplot" not in sys.modules or "pyplot" not in vars(plots)
