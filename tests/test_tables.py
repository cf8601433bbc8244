"""Tables as text and as HTML."""

import pytest

from pyro_sparsevd import _tables as tables

ROWS = [("site", "kept", ""), ("w", "1,234", "x"), ("longer", "5", "")]


def test_the_first_column_is_on_the_left_and_lines_have_no_trailing_space():
    assert tables.as_text(ROWS).split("\n") == ["site     kept", "w       1,234  x", "longer      5"]


def test_rows_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        tables.as_text([("a", "b"), ("c",)])


def test_html_is_escaped():
    found = tables.as_html([("<site>",), ("a & b",)])
    assert found == "<table><tr><th>&lt;site&gt;</th></tr><tr><td>a &amp; b</td></tr></table>"
