"""Plots: they return the figure, draw into the one they are given, and show nothing."""

import math
import sys
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from lab import figures
from matplotlib.figure import Figure
from PIL import Image, ImageSequence

from pyro_sparsevd import plots
from pyro_sparsevd.ops.divergence import kl_log_uniform
from pyro_sparsevd.plots import weights
from pyro_sparsevd.plots.style import BLUE, SIGNED, line_styles, plain_numbers
from pyro_sparsevd.sparsity.threshold import SweepPoint

HISTORY = [
    {"error": 0.5, "compression": 1.0, "nll": 900.0, "kl": 30.0},
    {"error": 0.02, "compression": 50.0, "nll": 100.0, "kl": 90.0},
]
POINTS = [SweepPoint(0.0, 0.03, 0.1, 0.99, 100.0), SweepPoint(3.0, 0.02, 0.1, 0.98, 50.0)]
DRAW = {
    "weight_images": lambda **kw: plots.weight_images(torch.randn(5, 4, 3), **kw),
    "weight_images of zeros": lambda **kw: plots.weight_images(torch.zeros(1, 4, 3), **kw),
    "log_alpha_histogram": lambda **kw: plots.log_alpha_histogram({"w": torch.tensor([1.0, torch.inf])}, **kw),
    "kept_weights": lambda **kw: plots.kept_weights({"0.weight": (20, 1000), "2.weight": (0, 10)}, **kw),
    "training_curves": lambda **kw: plots.training_curves(HISTORY, baseline=0.01, **kw),
    "training_curves of the bound": lambda **kw: plots.training_curves(HISTORY, [("nll", "kl")], **kw),
    "threshold_curves": lambda **kw: plots.threshold_curves(POINTS, chosen=3.0, baseline=0.01, count=500, **kw),
    "compression_curves": lambda **kw: figures.compression_curves([10, 99], {"a": [0.1, 0.2]}, baseline=0.05, **kw),
    "mean_and_scale": lambda **kw: plots.mean_and_scale(torch.randn(50), torch.randn(50), threshold=3.0, **kw),
    "mean_and_scale without a threshold": lambda **kw: plots.mean_and_scale(torch.randn(50), torch.randn(50), **kw),
    "mean_and_scale of zeros": lambda **kw: plots.mean_and_scale(torch.zeros(5), torch.zeros(5), threshold=3.0, **kw),
    "prior_and_posteriors": lambda **kw: figures.prior_and_posteriors({"kept": (1.0, -3.0)}, **kw),
    "divergences": lambda **kw: figures.divergences(samples={-2.0: 1.5, 2.0: 0.1}, **kw),
    "intervals": lambda **kw: plots.intervals({"error": {"a": [0.1, 0.2], "b": [0.3]}}, **kw),
    "intervals of nothing": lambda **kw: plots.intervals({"error": {"a": [math.nan]}}, **kw),
    "connections": lambda **kw: figures.connections([torch.eye(3), torch.tensor([[1.0, -1.0, 0.0]])], **kw),
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
    figure = plots.weight_images(torch.randn(10, 4, 3), count=4, colorbar_label=None)
    assert [len(axis.images) for axis in figure.axes] == [1, 1, 1, 1]
    assert figure.get_supxlabel() == "4 of 10 units"


def test_units_stand_in_the_order_of_the_weights_they_have_left():
    weight = torch.tensor([[[0.0, 0.0, 0.0]], [[1.0, 0.0, 0.0]], [[2.0, 2.0, 2.0]], [[3.0, 0.0, 0.0]]])
    figure = plots.weight_images(weight, colorbar_label=None)
    drawn = [float(axis.images[0].get_array().max()) for axis in figure.axes if axis.images]
    assert drawn == [2, 1, 3]
    assert figure.get_supxlabel() == "3 of 4 units, 1 without weights"


def test_colors_of_weights_are_darker_the_larger_they_are_and_zeros_white():
    lightness = lambda colors: np.asarray(colors)[..., :3] @ [0.299, 0.587, 0.114]  # noqa: E731
    negative, positive = (np.diff(lightness(SIGNED(np.linspace(*ends, 48)))) for ends in ((0, 0.499), (0.501, 1)))
    assert negative.min() > 0 > positive.max()
    below, zero, above = (lightness(SIGNED(v)) for v in (0.499, np.ma.masked, 0.501))
    assert zero == pytest.approx(1)
    assert min(zero - below, zero - above) > 1.5 * np.median(negative)
    assert SIGNED(0.4)[2] > SIGNED(0.4)[0]  # blue
    assert SIGNED(0.6)[0] > SIGNED(0.6)[2]  # red


def test_weights_are_colored_by_their_value_and_only_zeros_are_masked():
    figure = plots.weight_images(torch.tensor([[[-2.0, 0.0, 1e-6]]]))
    image = figure.axes[0].images[0]
    assert image.get_array().mask.tolist() == [[False, True, False]]
    assert (image.cmap.name, image.get_clim()) == ("signed", (-2, 2))


@pytest.mark.parametrize(("lowest", "limits"), [(-2.0, (-3, 3)), (0.0, (0, 3))])
def test_the_color_bar_has_its_label_and_no_negative_half_for_counts(lowest, limits):
    weight = torch.tensor([[[lowest, 3.0]]])
    bar = plots.weight_images(weight, colorbar_label="hidden units").axes[-1]
    assert (bar.get_ylabel(), bar.get_ylim()) == ("hidden units", limits)
    assert plots.weight_images(weight, limit=5.0).axes[-1].get_ylim()[1] == 5


def test_weights_must_be_images():
    with pytest.raises(ValueError, match=r"weight: expected shape \(units, height, width\), but got \(3, 4\)"):
        plots.weight_images(torch.randn(3, 4))


@pytest.mark.parametrize("draw", DRAW.values(), ids=DRAW)
def test_every_axis_of_a_chart_says_what_it_shows(draw):
    for axis in draw().axes:
        if axis.axison and not axis.images:
            assert axis.get_ylabel() or axis.get_xlabel()


def test_training_curves_are_logarithmic_only_where_that_shows_more():
    history = [{"nll": 100.0 / n, "sparsity": 1 - 1 / n, "error": 0.1 - n / 1000} for n in range(1, 30)]
    axes = plots.training_curves(history).axes
    found = [(axis.get_ylabel(), axis.get_yscale()) for axis in axes]
    assert found == [("NLL, nats", "log"), ("sparsity, %", "linear"), ("error, %", "linear")]


def test_training_curves_draw_fractions_in_percent_and_nothing_else():
    history = [{"error": 0.5, "sparsity": 0.1, "loss": 0.5}, {"error": 0.25, "sparsity": 0.9, "loss": 0.25}]
    axes = plots.training_curves(history, ["error", "sparsity", "loss"], baseline=0.125).axes
    drawn = [list(line.get_ydata()) for axis in axes for line in axis.get_lines()]
    assert drawn == [[50, 25], [12.5, 12.5], [10, 90], [0.5, 0.25]]
    (other,) = plots.training_curves(history, ["error"], fractions=(), labels={"error": "MSE"}, baseline=0.125).axes
    assert [list(line.get_ydata()) for line in other.get_lines()] == [[0.5, 0.25], [0.125, 0.125]]
    assert other.get_legend().get_texts()[0].get_text() == "MSE"


def test_quantities_of_one_panel_have_a_legend():
    (axis,) = plots.training_curves(HISTORY, [("nll", "kl")]).axes
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["NLL, nats", "KL, nats"]


def test_the_band_of_errors_is_a_binomial_standard_error():
    axis = plots.threshold_curves(POINTS, count=400).axes[0]
    (band,) = axis.collections
    heights = band.get_paths()[0].vertices[:, 1]
    sds = [100 * (p * (1 - p) / 400) ** 0.5 for p in (0.02, 0.03)]
    assert heights.min() == pytest.approx(2 - sds[0])
    assert heights.max() == pytest.approx(3 + sds[1])


def test_squared_errors_are_drawn_as_they_are():
    points = [point._replace(error=35.5, error_name="mean squared error") for point in POINTS]
    axis = plots.threshold_curves(points, baseline=30.0).axes[0]
    assert axis.get_ylabel() == "mean squared error"
    assert [line.get_ydata()[0] for line in axis.get_lines()] == [35.5, 30.0]
    with pytest.raises(ValueError, match="count: expected it for errors that are fractions, but got mean squared"):
        plots.threshold_curves(points, count=10)


def test_thresholds_stand_beside_their_points():
    axis = plots.threshold_curves(POINTS, chosen=3.0).axes[0]
    assert [(text.get_text(), text.xy) for text in axis.texts] == [("3", (50, 2)), ("0", (100, 3))]
    (chosen,) = (line for line in axis.get_lines() if line.get_label() == "chosen")
    assert chosen.get_xydata().tolist() == [[50, 2]]


def test_the_histogram_spans_the_data_and_names_layers_by_their_sizes():
    values = torch.linspace(-4, 2, 6000).view(20, 300)
    axis = plots.log_alpha_histogram({"0.weight": values, "1.weight": torch.zeros(5, 2, 3, 3)}, threshold=1.0).axes[0]
    assert axis.get_xlim() == pytest.approx((-4.5, 2.5), abs=0.01)
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == ["0.weight (300 → 20)", "1.weight (2 → 5, 3×3)", "dropped: log α > 1"]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ((5, 200), [5, 10, 20, 50, 100, 200]),
        ((0.3, 2.9), [0.3, 0.5, 0.7, 1, 2]),
        ((2, 5), [2, 3, 4, 5]),
        ((1, 1e5), [1, 10, 100, 1000, 10000, 100000]),
    ],
)
def test_logarithmic_axes_have_plain_numbers_as_many_as_there_is_room_for(limits, expected):
    axis = Figure().subplots()
    axis.set(xscale="log", xlim=limits)
    plain_numbers(axis.xaxis)
    axis.figure.canvas.draw()
    shown = [label for which in ("major", "minor") for label in axis.get_xticklabels(which=which)]
    found = {
        label.get_text() for label in shown if label.get_text() and limits[0] <= label.get_position()[0] <= limits[1]
    }
    assert found == {f"{value:g}" for value in expected}


@pytest.mark.parametrize("skip", ["", BLUE])
def test_styles_of_lines_repeat_late_and_neighbours_differ_without_colors(skip):
    styles = list(islice(line_styles(skip), 30))
    assert len({(style.color, style.line) for style in styles}) == len({style[::2] for style in styles}) == 30
    assert all(a.line != b.line and a.marker != b.marker for a, b in pairwise(styles))
    assert skip not in {style.color for style in styles}


def test_divergences_are_those_of_the_package():
    above, below = figures.divergences().axes
    assert below.get_ylabel() == "difference from\nthe exact KL, nats"
    exact = next(line for line in above.get_lines() if line.get_label() == "exact")
    log_alpha, drawn = (torch.as_tensor(v) for v in exact.get_data())
    torch.testing.assert_close(drawn, kl_log_uniform(torch.ones_like(log_alpha), log_alpha, "exact"))
    assert 0.005 < abs(below.get_lines()[0].get_ydata()).max() < 0.0094


def test_dropped_weights_lie_above_the_line_of_slope_1_of_the_threshold():
    loc, log_variance = torch.tensor([1.0, -1.0, 0.1, 0.01]), torch.tensor([2.9, 3.1, -2.0, -6.0])
    axis = plots.mean_and_scale(loc, log_variance, threshold=3.0).axes[0]
    dropped, kept, line = axis.get_lines()
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    x, y = (np.log(values) for values in line.get_data())
    np.testing.assert_allclose(y - x, 1.5)
    assert [dropped.get_label(), kept.get_label()] == ["dropped: 2", "kept: 2"]
    assert (dropped.get_ydata() > dropped.get_xdata() * math.exp(1.5)).all()
    assert (kept.get_ydata() < kept.get_xdata() * math.exp(1.5)).all()
    assert dropped.get_marker() != kept.get_marker()


def test_the_line_of_the_threshold_leaves_the_axes_to_the_weights():
    loc, log_variance = torch.tensor([1e-8, 0.0, 1.0]), torch.tensor([-2.0, -2.0, -3.0])
    limits = [
        plots.mean_and_scale(loc, log_variance, threshold=threshold).axes[0].get_ylim() for threshold in (None, 3.0)
    ]
    assert limits[0] == limits[1]


def test_means_and_scales_of_zero_are_drawn_at_the_lower_end_and_counted():
    loc, log_variance = torch.tensor([0.0, 0.5, 2.0]), torch.tensor([0.0, -math.inf, 2.0])
    axis = plots.mean_and_scale(loc, log_variance, threshold=3.0).axes[0]
    dropped, kept, zeros, _ = axis.get_lines()
    assert zeros.get_label() == "of them θ = 0 or σ = 0, drawn at the end: 2"
    assert list(dropped.get_xdata()) == [0.25]
    assert min(kept.get_ydata()) == 0.5
    assert sorted(zeros.get_xdata()) == [0.25, 0.5]


def test_connections_are_the_weights_that_are_not_zero():
    weights = [torch.tensor([[1.0, 0.0], [-2.0, 0.5]]), torch.tensor([[0.0, 3.0]])]
    axis = figures.connections(weights).axes[0]
    segments = [tuple(map(tuple, s)) for c in axis.collections if hasattr(c, "get_segments") for s in c.get_segments()]
    assert len(set(segments)) == len(segments) == 4
    assert sum(start[0] == 0 for start, _ in segments) == 3


@pytest.mark.parametrize("shapes", [[], [(3,)], [(2, 3), (2, 3)]], ids=str)
def test_connections_need_layers_in_a_row(shapes):
    with pytest.raises(ValueError, match=r"weights: expected shapes \(b, a\), \(c, b\), \.\.\. of layers in a row"):
        figures.connections([torch.ones(shape) for shape in shapes])


def test_an_animation_has_a_frame_for_each_entry_and_is_small(tmp_path):
    path = tmp_path / "weights.gif"
    plots.animate_weight_images([torch.randn(9, 28, 28) for _ in range(4)], path)
    with Image.open(path) as image:
        assert image.format == "GIF"
        assert sum(round(frame.info["duration"] / 200) for frame in ImageSequence.Iterator(image)) == 4 + 4
    assert path.stat().st_size < 3e6


def test_an_animation_of_fewer_colors_is_smaller(tmp_path):
    draw = lambda values, figure: figure.subplots().imshow(values)  # noqa: E731
    frames, sizes = list(torch.rand(3, 20, 20)), {}
    for colors in (8, 256):
        path = tmp_path / f"{colors}.gif"
        plots.animate(draw, frames, path, hold=3, colors=colors)
        with Image.open(path) as image:
            pictures = [(frame.info["duration"], frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
        assert [duration for duration, _ in pictures] == [200, 200, 600]
        assert (
            len({color for _, picture in pictures for _, color in picture.getcolors(10_000)}) <= colors + 1
        )  # some Pillows add black
        sizes[colors] = path.stat().st_size
    assert sizes[8] < sizes[256]


def test_frames_of_an_animation_have_one_scale_order_and_a_title_each(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(weights, "_grid", lambda images, *others: calls.append((images, *others)) or others[-1])
    before, after = torch.tensor([[[1.0, 9.0]], [[1.0, 2.0]]]), torch.tensor([[[0.0, 0.0]], [[0.0, -4.0]]])
    titles = []
    monkeypatch.setattr(Figure, "suptitle", lambda figure, text: titles.append(text))
    plots.animate_weight_images([before, after], tmp_path / "a.gif", title=["threshold 3", "threshold {}"])
    plots.animate_weight_images([before, after], tmp_path / "b.gif", colorbar_label="w", count=1)
    assert titles == ["threshold 3", "threshold {}", "epoch 1", "epoch 2"]
    assert [limit for _, limit, _, _ in calls] == [9, 9, 4, 4]
    assert [label for _, _, label, _ in calls] == ["weight", "weight", "w", "w"]
    assert calls[0][0][:, 0, 1].tolist() == [2, 9]  # the unit with weights left stands first in every frame
    assert calls[2][0].tolist() == [[[1, 2]]]


def test_an_animation_needs_a_title_for_each_frame(tmp_path):
    with pytest.raises(ValueError, match="title: expected one for each of 2 frames, but got 1"):
        plots.animate_weight_images(list(torch.randn(2, 1, 3, 3)), tmp_path / "weights.gif", title=["one"])


def test_an_animation_needs_a_frame(tmp_path):
    with pytest.raises(ValueError, match="frames: expected at least one, but got none"):
        plots.animate(lambda frame, figure: None, [], tmp_path / "weights.gif")
    with pytest.raises(ValueError, match="history: expected the weights of at least one frame"):
        plots.animate_weight_images([], tmp_path / "weights.gif")


def test_pyplot_is_not_imported():
    assert "matplotlib.pyplot" not in sys.modules or "pyplot" not in vars(plots)
