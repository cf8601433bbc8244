"""Ranges of values over seeds: what is drawn where, and what is said of values that have no place."""

import math

import pytest

from pyro_sparsevd.evaluation import PriorComparison, PriorResult
from pyro_sparsevd.plots import intervals


def rows_of(axis):
    """Returns for each row the values of its line, dots and mark, in this order."""
    found = {}
    for line in axis.get_lines():
        found.setdefault(int(line.get_ydata()[0]), []).append(list(map(float, line.get_xdata())))
    return found


def test_a_row_has_the_range_the_values_and_their_median():
    figure = intervals({"error": {"a": [3.0, 1.0, 2.5], "b": [7.0]}, "NLL": {"a": [1.0], "b": [2.0, 4.0]}})
    errors, likelihoods = figure.axes
    assert rows_of(errors) == {0: [[1.0, 3.0], [3.0, 1.0, 2.5], [2.5]], 1: [[7.0, 7.0], [7.0], [7.0]]}
    assert rows_of(likelihoods)[1] == [[2.0, 4.0], [2.0, 4.0], [3.0]]
    assert [label.get_text() for label in errors.get_yticklabels()] == ["a", "b"]
    assert [axis.get_xlabel() for axis in figure.axes] == ["error", "NLL"]
    top, bottom = (errors.transData.transform((1, row))[1] for row in (0, 1))
    assert top > bottom


def test_values_that_are_not_finite_are_counted_not_drawn():
    (axis,) = intervals(
        {"compression": {"all": [2.0, 3.0], "some": [2.0, math.nan, math.inf], "none": [math.nan]}}
    ).axes
    assert list(rows_of(axis)) == [0, 1]
    assert [text.get_text() for text in axis.texts] == ["1 of 3", "0 of 1"]


@pytest.mark.parametrize(("largest", "scale"), [(4.0, "linear"), (40.0, "log")])
def test_a_panel_is_logarithmic_where_values_differ_much(largest, scale):
    (axis,) = intervals({"compression": {"a": [1.0, largest]}}).axes
    assert axis.get_xscale() == scale


@pytest.mark.parametrize("panels", [{}, {"error": {}}, {"error": {"a": [1.0]}, "NLL": {"b": [1.0]}}], ids=str)
def test_panels_must_have_the_same_rows(panels):
    with pytest.raises(ValueError, match="panels: expected the same rows, one or more, in each panel, but got"):
        intervals(panels)


def test_a_comparison_draws_itself():
    def result(prior, seed, compression, sparse_error):
        return PriorResult(prior, seed, 0.05, {"nll": 0.2 + seed}, 0.05, 0.06, compression, 1.0, sparse_error, 2e-3)

    results = (result("ard", 0, 40.0, 0.06), result("ard", 1, 50.0, 0.05), result("normal", 0, math.nan, math.nan))
    compression, error, nll = PriorComparison(results, "error").plot(title="digits").axes
    assert rows_of(compression)[0][1] == [40.0, 50.0]
    assert list(rows_of(compression)) == list(rows_of(error)) == [0]
    assert rows_of(nll)[0][1] == [0.2, 1.2]
    assert compression.figure.get_suptitle() == "digits"
