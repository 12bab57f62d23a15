"""Curves of runs: what smoothing leaves alone, and the band of seeds."""

import numpy as np
import pytest

from v4jax.train import curves


def test_smoothing_keeps_lines_and_bridges_gaps():
    line = np.full(120, 3.0)
    np.testing.assert_allclose(curves.smoothed(line), 3.0, rtol=1e-12)
    line[50] = np.nan
    np.testing.assert_allclose(curves.smoothed(line), 3.0, rtol=1e-12)
    slope = np.arange(120.0)  # all but where the window is cut
    np.testing.assert_allclose(curves.smoothed(slope)[3:-3], slope[3:-3], rtol=1e-12)


def test_smoothing_nothing_finite_leaves_gaps():
    assert np.isnan(curves.smoothed(np.full(40, np.nan))).all()


def test_seeds_are_a_mean_in_a_band_over_faint_curves(tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    figure, axis = plt.subplots()
    runs = [[(step, value) for step in range(4)] for value in (1.0, 3.0)]
    runs[1].pop()  # one has got less far
    look = {"color": "C0", "linestyle": "-"}
    curve = curves._draw_runs(axis, runs, curves.PANELS[0], look)
    np.testing.assert_array_equal(curve.get_xdata(), [0, 1, 2])
    np.testing.assert_array_equal(curve.get_ydata(), 2.0)
    band = axis.collections[0].get_paths()[0].vertices[:, 1]
    np.testing.assert_allclose([band.min(), band.max()], [2 - 2**0.5, 2 + 2**0.5])
    assert [line.get_alpha() for line in axis.lines] == [0.25, 0.25, None]
    plt.close(figure)


def test_every_panel_has_a_title_and_a_unit(tmp_path):
    pytest.importorskip("matplotlib")
    assert all(panel.title and panel.unit for panel in curves.PANELS)
    lines = [{"step": step, "loss": 5.0 - 0.01 * step} for step in range(1, 60)]
    curves.draw({"a": [lines, lines], "b": [lines[:3]]}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
