"""Drawing: intervals at their ends, numbers that can be read, titles as they were given."""

import warnings

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from mmheads import plots
from mmheads.heads import Head

QUESTIONS = [
    "is $5 more than 3% of $100 ?",
    r"what does \frac{1}{2}$ # _ ^ mean $",
    "from $5 to $6",
]


@pytest.mark.parametrize("text", QUESTIONS)
def test_a_title_is_the_text_that_was_given(tmp_path, text):
    figure, axis = plt.subplots()
    plots.set_title(axis, text)
    plots.set_title(figure, text)
    figure.savefig(tmp_path / "a.png")
    assert axis.get_title() == figure.get_suptitle() == text


def test_a_long_title_is_wrapped():
    _, axis = plt.subplots()
    plots.set_title(axis, "word " * 100 + "x" * 100 + "\nlast", width=30)
    lines = axis.get_title().splitlines()
    assert max(map(len, lines)) <= 30
    assert lines[-1] == "last"


def test_signs_that_the_font_lacks_are_boxes_with_one_warning(tmp_path):
    figure, axis = plt.subplots()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        plots.set_title(axis, "总额是多少 total?")
        figure.savefig(tmp_path / "a.png")
        figure.savefig(tmp_path / "a.pdf")
    (warning,) = said
    assert "the font of the figures lacks" in str(warning.message)
    assert axis.get_title() == "□□□□□ total?"


POINTS = pd.DataFrame(
    {
        "task": ["text", "text", "image", "image"],
        "length": [128, 256, 128, 256],
        "value": [0.5, 0.6, 0.7, 0.8],
        "low": [0.4, 0.6, 0.5, np.nan],
        "high": [0.7, 0.6, 0.8, np.nan],
    }
)


def drawn_bars(series) -> np.ndarray:
    """Ends of the bars of one series, [point, end, coordinate]."""
    return np.array(series[2][0].get_segments())


def test_intervals_are_drawn_side_by_side_at_their_ends():
    _, axis = plt.subplots()
    colors = {"image": "C1", "text": "C0"}
    plots.intervals(axis, POINTS, "length", by="task", order=[128, 256], colors=colors, dodge=0.2)
    image, text = axis.containers
    assert (image.get_label(), text.get_label()) == ("image", "text")
    assert image[0].get_color() == "C1"
    np.testing.assert_allclose(image[0].get_xdata(orig=False), [-0.1, 0.9])
    np.testing.assert_allclose(text[0].get_xdata(orig=False), [0.1, 1.1])
    np.testing.assert_allclose(text[0].get_ydata(orig=False), [0.5, 0.6])
    np.testing.assert_allclose(
        drawn_bars(text), [[[0.1, 0.4], [0.1, 0.7]], [[1.1, 0.6], [1.1, 0.6]]]
    )
    assert [label.get_text() for label in axis.get_xticklabels()] == ["128", "256"]


def test_intervals_across_run_from_top_to_bottom():
    _, axis = plt.subplots()
    rows = POINTS[POINTS["task"] == "text"]
    names = {128: "short", 256: "long"}
    plots.intervals(axis, rows, "length", order=names, across=True, color="0.3")
    (bars,) = axis.containers
    np.testing.assert_allclose(bars[0].get_xdata(orig=False), [0.5, 0.6])
    np.testing.assert_allclose(bars[0].get_ydata(orig=False), [0, 1])
    np.testing.assert_allclose(drawn_bars(bars)[0], [[0.4, 0], [0.7, 0]])
    assert axis.yaxis_inverted()
    assert [label.get_text() for label in axis.get_yticklabels()] == ["short", "long"]


def test_without_an_order_numbers_are_positions():
    _, axis = plt.subplots()
    plots.intervals(axis, POINTS[:2], "length")
    np.testing.assert_allclose(axis.containers[0][0].get_xdata(orig=False), [128, 256])


def test_numbers_are_white_on_dark_cells_only():
    _, axis = plt.subplots()
    table = pd.DataFrame([[0.0, 1.0], [np.nan, 0.2]], index=["a", "b"], columns=["x", "y"])
    plots.number_matrix(axis, 100 * table, text="{:.0f}", limits=(0, 100))
    shown = {text.get_text(): (text.get_position(), text.get_color()) for text in axis.texts}
    assert shown == {
        "0": ((0, 0), "black"),
        "100": ((1, 0), "white"),
        "20": ((1, 1), "black"),
    }
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b"]


def test_a_heat_map_marks_heads_and_leaves_out_those_without_a_value():
    _, axis = plt.subplots()
    values = np.array([[0.1, np.nan, 0.3], [0.2, 0.0, 0.1]])
    image = plots.heat_map(axis, values, marked=[Head(0, 2), Head(1, 0)])
    assert image.get_clim() == (0, 0.3)
    assert [tuple(np.ravel(line.get_data())) for line in axis.lines] == [(2, 0), (0, 1)]
    assert plots.heat_map(axis, values - 0.25).get_clim() == (-0.25, 0.25)


def test_values_are_written_with_their_intervals():
    texts = plots.interval_texts(POINTS[:2], digits=1)
    assert texts.tolist() == ["0.5 [0.4, 0.7]", "0.6 [0.6, 0.6]"]
