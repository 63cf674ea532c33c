"""`plot_heads_over_image`: patches over images and frames."""

import io

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from keras_mha import info, plot_heads_over_image
from tests.helpers import to_tensor

pytestmark = pytest.mark.once

GREY = np.linspace(0, 1, 64).reshape(8, 8)
CLIP = np.stack([GREY] * 3)


def overlay(axes):
    beneath, above = axes.images
    assert beneath.get_extent() == above.get_extent()
    return above.get_array()


def framed(axes):
    """Where patches are framed, as (x, y, width, height) in pixels."""
    return [patch.get_bbox().bounds for patch in axes.patches]


def test_a_panel_for_each_head_with_its_patches(weights, panels):
    scores = weights(2, 3, 16, 16)
    figure = plot_heads_over_image(scores, GREY, query=5, sample=1)
    titles = [axes.get_title() for axes in panels(figure)]
    assert titles == ["head 0", "head 1", "head 2"]
    for head, axes in enumerate(panels(figure)):
        expected = scores[1, head, 5].reshape(4, 4)
        np.testing.assert_allclose(overlay(axes), expected, rtol=1e-6)


def test_without_a_query_the_mean_over_all_is_drawn(weights, panels):
    scores = weights(1, 4, 4)
    (axes,) = panels(plot_heads_over_image(scores, GREY))
    expected = scores[0].mean(axis=0).reshape(2, 2)
    np.testing.assert_allclose(overlay(axes), expected, rtol=1e-6)
    assert not framed(axes)


def scale(figure, panels):
    """The ends of the scale that all panels share."""
    (limits,) = {axes.images[1].get_clim() for axes in panels(figure)}
    return limits


def colour_bar_label(figure):
    (bar,) = (axes for axes in figure.axes if axes.get_label() == "<colorbar>")
    return bar.get_ylabel()


def test_all_panels_share_one_scale_from_an_even_share(weights, panels):
    scores = weights(3, 16, 16)
    figure = plot_heads_over_image(scores, GREY, query=0)
    largest = scores[:, 0].max()
    assert largest > 2 / 16
    assert scale(figure, panels) == pytest.approx((1 / 16, largest), rel=1e-6)
    assert len(figure.axes) == 3 + 1


def test_the_colour_bar_tells_the_even_share(weights):
    label = colour_bar_label(plot_heads_over_image(weights(1, 64, 64), GREY))
    assert label == "attention weight,\nfrom an even share of 0.0156"


def test_the_even_share_is_of_what_the_patches_get(panels):
    scores = np.array([[[0.6, 0.3, 0.05, 0.05, 0.0]]])
    figure = plot_heads_over_image(scores, GREY, prefix_tokens=1)
    assert scale(figure, panels) == pytest.approx((0.1, 0.3), rel=1e-6)
    assert "0.1" in colour_bar_label(figure)


def test_nearly_even_attention_looks_nearly_even(panels):
    scores = np.array([[0.24, 0.26, 0.25, 0.25]])
    figure = plot_heads_over_image(scores, GREY)
    assert scale(figure, panels) == pytest.approx((0.25, 0.5), rel=1e-6)


def opacity(weight, figure, panels):
    """How much of the image a weight hides, from 0 to 1."""
    return panels(figure)[0].images[1].to_rgba(weight)[3]


def test_only_more_than_an_even_share_hides_the_image(weights, panels):
    figure = plot_heads_over_image(weights(1, 16, 16), GREY, query=0)
    even, largest = scale(figure, panels)
    hidden = [opacity(w, figure, panels) for w in (0, even / 2, even, largest)]
    assert hidden[:3] == [0, 0, 0]
    assert 0.7 < hidden[3] < 1


def test_the_patch_that_asks_is_framed(weights, panels):
    figure = plot_heads_over_image(weights(1, 16, 16), GREY, query=6)
    assert framed(panels(figure)[0]) == [(4, 2, 2, 2)]
    figure = plot_heads_over_image(weights(1, 16, 16), GREY, query=-1)
    assert framed(panels(figure)[0]) == [(6, 6, 2, 2)]


def test_tokens_before_the_patches_are_left_out(weights, panels):
    scores = weights(2, 17, 17)
    for query, frames in [(0, []), (1, [(0, 0, 2, 2)])]:
        figure = plot_heads_over_image(scores, GREY, query=query, prefix_tokens=1)
        axes = panels(figure)[0]
        expected = scores[0, query, 1:].reshape(4, 4)
        np.testing.assert_allclose(overlay(axes), expected, rtol=1e-6)
        assert framed(axes) == frames


def test_queries_from_elsewhere_are_no_patches(weights, panels):
    figure = plot_heads_over_image(weights(1, 3, 16), GREY, query=1)
    assert not framed(panels(figure)[0])


def test_a_grid_need_not_be_square(weights, panels):
    scores = weights(1, 8, 8)
    figure = plot_heads_over_image(scores, GREY, grid=(2, 4), query=7)
    assert overlay(panels(figure)[0]).shape == (2, 4)
    assert framed(panels(figure)[0]) == [(6, 4, 2, 4)]


def test_frames_stand_in_a_row_for_each_head(weights, panels):
    scores = weights(2, 12, 12)
    figure = plot_heads_over_image(scores, CLIP, query=5)
    found = panels(figure)
    assert [axes.get_title() for axes in found] == ["frame 0", "frame 1", "frame 2"] * 2
    assert [axes.get_ylabel() for axes in found[::3]] == ["head 0", "head 1"]
    expected = scores[1, 5].reshape(3, 2, 2)
    for axes, patches in zip(found[3:], expected, strict=True):
        np.testing.assert_allclose(overlay(axes), patches, rtol=1e-6)
    # Query 5 is the second patch of the second frame.
    assert [framed(axes) for axes in found] == [[], [(4, 0, 4, 4)], []] * 2


def test_a_patch_can_span_several_frames(weights, panels):
    clip = np.stack([GREY] * 4)
    scores = weights(1, 8, 8)
    figure = plot_heads_over_image(scores, clip, grid=(2, 2, 2), query=0)
    first, second, third, fourth = (overlay(axes) for axes in panels(figure))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(third, fourth)
    assert (first != third).any()
    assert [len(framed(axes)) for axes in panels(figure)] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    "image, grid, count",
    [
        (GREY, None, 1),
        (GREY[..., None], None, 1),
        (np.stack([GREY] * 3, -1), None, 1),
        (np.stack([GREY] * 4, -1), None, 1),
        (CLIP[:1], (1, 2, 2), 1),
        (np.ones((2, 8, 3)), (2, 1, 2), 2),  # the grid tells: frames of 8 x 3
        (np.ones((2, 8, 3)), (2, 2), 1),  # an image of 2 x 8 with 3 channels
        (CLIP[:1, ..., None], None, 1),
    ],
)
def test_shapes_of_images_and_frames(weights, panels, image, grid, count):
    figure = plot_heads_over_image(weights(1, 4, 4), image, grid=grid)
    assert len(panels(figure)) == count


def beneath(image, weights, panels):
    figure = plot_heads_over_image(weights(1, 4, 4), image)
    return np.asarray(panels(figure)[0].images[0].get_array())


def test_the_same_image_in_other_numbers_looks_the_same(weights, panels):
    image = np.rint(GREY * 255)
    reference = beneath(image / 255, weights, panels)
    for other in (image.astype("uint8"), image.astype("int32"), image / 100 - 1):
        np.testing.assert_allclose(
            beneath(other, weights, panels), reference, atol=0.01
        )


def test_images_leave_their_darkest_and_brightest_to_be_drawn_over(weights, panels):
    pixels = beneath(GREY, weights, panels)
    assert pixels.shape == (8, 8, 3)
    assert 0.1 < pixels.min() < 0.3 and 0.7 < pixels.max() < 0.9
    colours = np.zeros((8, 8, 3))
    colours[..., 0] = 1
    red, green, blue = beneath(colours, weights, panels)[0, 0]
    assert red > green == blue


@pytest.mark.filterwarnings("error")
def test_what_is_transparent_lies_on_white(weights, panels):
    red, opacities = (1.0, 0.0, 0.0), [0.0, 0.25, 1.0]
    image = np.array([[(*red, opacity) for opacity in opacities]] * 2)
    on_white = np.array([[(1.0, 1 - x, 1 - x) for x in opacities]] * 2)
    drawn = [
        panels(plot_heads_over_image(weights(1, 3, 3), picture, grid=(1, 3)))[0]
        for picture in (image, on_white)
    ]
    found, expected = (axes.images[0].get_array() for axes in drawn)
    assert found.shape == (2, 3, 3)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_flat_images_and_weights_of_0_are_drawn(panels):
    figure = plot_heads_over_image(np.zeros((1, 4, 4)), np.full((4, 4), 7.5))
    figure.savefig(io.BytesIO())


def test_tensors_are_drawn_and_savefig_makes_a_picture(weights, panels):
    scores, image = to_tensor(weights(1, 2, 4, 4), "bfloat16"), to_tensor(GREY)
    figure = plot_heads_over_image(scores, image, title="$x")
    assert figure.get_suptitle() == "$x"
    file = io.BytesIO()
    figure.savefig(file, format="png")
    assert Image.open(file).size[0] > 200


def test_a_given_figure_is_drawn_into(weights, panels):
    left, _ = Figure(layout="constrained").subfigures(1, 2)
    assert plot_heads_over_image(weights(2, 4, 4), GREY, figure=left) is left
    assert len(panels(left)) == 2


def test_without_matplotlib_the_extra_is_named(weights, monkeypatch):
    monkeypatch.setattr(info.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(info.MissingExtra, match=r"matplotlib.*keras-mha\[viz\]"):
        plot_heads_over_image(weights(4, 4), GREY)


@pytest.mark.parametrize(
    "keys, image, kwargs, named",
    [
        (17, GREY, {}, "`grid` must be given.*a square.*17 keys"),
        (16, GREY, {"prefix_tokens": 1}, "`grid` must be given.*15 keys"),
        (16, GREY, {"prefix_tokens": 16}, "`grid` must be given.*0 keys"),
        (16, GREY, {"prefix_tokens": -1}, "`prefix_tokens`"),
        (16, CLIP, {}, "`grid` must be given.*3 squares"),
        (16, GREY, {"grid": (3, 4)}, r"`grid`.*16\. Received: grid=\(3, 4\).*12"),
        (16, GREY, {"grid": (16,)}, "`grid` must be"),
        (16, GREY, {"grid": 4}, "`grid` must be"),
        (16, GREY, {"grid": (4, 0)}, "`grid` must be an integer of at least 1"),
        (16, CLIP, {"grid": (2, 2, 4)}, "`grid`.*divides the image's, 3"),
        (16, GREY, {"grid": (1, 4, 4)}, r"`image`.*\(F, H, W\).*\(8, 8\)"),
        (16, CLIP[..., None], {"grid": (4, 4)}, r"`image`.*\(H, W\)"),
        (16, GREY[0], {}, r"`image`.*\(H, W\)"),
        (16, np.full((8, 8), np.nan), {}, "`image` must be finite"),
        (16, GREY, {"query": 16}, "`query` must be from -16 to 15"),
        (16, GREY, {"heads": 2}, "`heads` must be from -2 to 1"),
        (16, GREY, {"sample": 1}, "`sample` must be from -1 to 0"),
        (16, GREY, {"columns": 0}, "`columns`"),
    ],
)
def test_what_does_not_go_together_is_refused(weights, keys, image, kwargs, named):
    with pytest.raises(ValueError, match=named):
        plot_heads_over_image(weights(1, 2, 16, keys), image, **kwargs)


@pytest.mark.parametrize("image", ["cat.png", None])
def test_an_image_that_is_none_is_refused(weights, image):
    with pytest.raises(TypeError, match="`image` must be an array"):
        plot_heads_over_image(weights(4, 4), image)


@pytest.mark.parametrize("shape", [(16, 1600), (1600, 16)])
def test_long_images_are_seen_and_fit_on_a_page(shape):
    figure = plot_heads_over_image(np.full((4, 4), 0.25), np.zeros(shape), grid=(2, 2))
    assert max(figure.get_size_inches()) < 10
    figure.draw_without_rendering()
    box = figure.axes[0].get_window_extent()
    assert min(box.width, box.height) > 20
