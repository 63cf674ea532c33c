"""`plot_attention`: what is on the picture, and what it refuses."""

import io
import itertools
import pickle

import keras
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure
from PIL import Image

import keras_mha
from keras_mha import info, masks, plot_attention
from keras_mha.plotting import text
from tests.helpers import to_tensor

pytestmark = pytest.mark.once

WORDS = ["the", "cat", "sat"]


def png(figure):
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return np.asarray(Image.open(file).convert("L"))


def written(axis):
    labels = axis.get_ticklabels()
    return [label.get_text() for label in labels if label.get_visible()]


def values(axes):
    return axes.images[0].get_array()


def test_a_panel_for_each_head_with_its_number_and_weights(weights, panels):
    scores = weights(2, 6, 3, 5)
    figure = plot_attention(scores, sample=1)
    assert [axes.get_title() for axes in panels(figure)] == [
        f"head {head}" for head in range(6)
    ]
    for head, axes in enumerate(panels(figure)):
        np.testing.assert_allclose(values(axes), scores[1, head], rtol=1e-6)


@pytest.mark.parametrize("heads", [[3, -3], (3, 1), np.array([3, 1])])
def test_chosen_heads_come_in_the_order_asked_for(weights, panels, heads):
    figure = plot_attention(weights(4, 3, 3), heads=heads)
    assert [axes.get_title() for axes in panels(figure)] == ["head 3", "head 1"]


def test_one_map_needs_no_number_of_a_head(weights, panels):
    (axes,) = panels(plot_attention(weights(3, 3)))
    assert axes.get_title() == ""
    (axes,) = panels(plot_attention(weights(2, 3, 3), heads=1))
    assert axes.get_title() == "head 1"


def test_columns_say_how_many_stand_in_a_row(weights, panels):
    figure = plot_attention(weights(5, 3, 3), columns=2)
    figure.draw_without_rendering()
    tops = [round(axes.get_position().y1, 3) for axes in panels(figure)]
    assert [tops.count(top) for top in sorted(set(tops), reverse=True)] == [2, 2, 1]


def test_axes_are_named_and_labelled_with_the_tokens(weights, panels):
    figure = plot_attention(weights(2, 3, 2), WORDS, ["le", "chat"])
    first, second = panels(figure)
    assert (first.get_ylabel(), first.get_xlabel()) == ("query", "key")
    assert written(first.yaxis) == WORDS
    assert written(first.xaxis) == written(second.xaxis) == ["le", "chat"]
    # The second stands beside the first, whose labels hold for it too.
    assert written(second.yaxis) == []


def test_each_column_is_labelled_at_its_lowest_panel(weights, panels):
    figure = plot_attention(weights(3, 3, 3), WORDS, WORDS, columns=2)
    labelled = [written(axes.xaxis) == WORDS for axes in panels(figure)]
    assert labelled == [False, True, True]


def test_positions_are_numbered_without_tokens(weights, panels):
    (axes,) = panels(plot_attention(weights(4, 4)))
    assert {"0", "1", "2", "3"} <= set(written(axes.xaxis))


def test_all_heads_share_one_scale_and_one_colour_bar(weights, panels):
    scores = weights(4, 5, 5)
    scores[3] = np.eye(5)
    figure = plot_attention(scores)
    assert {axes.images[0].get_clim() for axes in panels(figure)} == {(0, 1)}
    assert len(figure.axes) == 4 + 1
    assert figure.axes[-1].get_ylabel() == "attention weight"
    # Only what is drawn counts.
    (axes,) = panels(plot_attention(scores, heads=0))
    assert axes.images[0].get_clim() == (0, pytest.approx(scores[0].max(), rel=1e-6))


def test_masked_cells_are_hatched_and_explained(weights, panels):
    figure = plot_attention(weights(2, 4, 4, causal=True))
    for axes in panels(figure):
        np.testing.assert_array_equal(values(axes).mask, ~np.tri(4, dtype=bool))
        assert axes.patch.get_hatch()
    (legend,) = figure.legends
    assert [entry.get_text() for entry in legend.get_texts()] == ["masked"]
    assert legend.get_patches()[0].get_hatch()


def middle(figure, panels):
    """How the middle of the first panel looks."""
    picture = png(figure)
    box = panels(figure)[0].get_window_extent()
    x, y = int(box.x0 + box.x1) // 2, len(picture) - int(box.y0 + box.y1) // 2
    return picture[y - 10 : y + 10, x - 10 : x + 10]


def test_masked_cells_look_unlike_a_weight_of_nothing(panels):
    scores = np.full((1, 6, 6), 1e-9)
    scores[..., 0] = 1
    nothing, hidden = (
        plot_attention(scores),
        plot_attention(scores, mask=masks.Prefix(1)),
    )
    assert np.ptp(middle(nothing, panels)) == 0
    assert np.ptp(middle(hidden, panels)) > 40


@pytest.mark.parametrize(
    "mask",
    [
        masks.Causal(),
        np.tri(4, dtype=bool),
        np.tri(4, dtype=bool)[None, None],
        np.tri(4, dtype=bool).tolist(),
    ],
    ids=["object", "array", "array of four axes", "list"],
)
def test_a_mask_says_what_is_masked_whatever_the_weights(weights, panels, mask):
    figure = plot_attention(weights(2, 2, 4, 4), mask=mask)
    for axes in panels(figure):
        np.testing.assert_array_equal(values(axes).mask, ~np.tri(4, dtype=bool))


def test_a_given_mask_leaves_zeros_alone(panels):
    scores = np.eye(3)[None]
    figure = plot_attention(scores, mask=np.ones((3, 3), bool))
    assert not values(panels(figure)[0]).mask.any()
    assert not figure.legends


def test_sample_is_the_row_of_the_mask_too(weights, panels):
    valid = np.array([[1, 1, 1, 1], [1, 1, 0, 0]], bool)
    figure = plot_attention(weights(2, 3, 4, 4), mask=masks.Padding(valid), sample=-1)
    for axes in panels(figure):
        assert values(axes).mask.all(axis=0).tolist() == [False, False, True, True]


def test_a_mask_by_head_goes_with_its_head(weights, panels):
    by_head = np.stack([np.tri(4, dtype=bool), np.eye(4, dtype=bool)])
    for mask in (by_head, by_head[None], masks.Dense(by_head[None])):
        figure = plot_attention(weights(2, 4, 4), mask=mask, heads=[1, 0])
        for axes, head in zip(panels(figure), (1, 0), strict=True):
            np.testing.assert_array_equal(values(axes).mask, ~by_head[head])


def test_everything_masked_can_be_drawn(panels):
    figure = plot_attention(np.zeros((2, 3, 3)))
    assert values(panels(figure)[0]).mask.all()
    png(figure)


def test_a_single_query_and_a_single_key_can_be_drawn(weights):
    png(plot_attention(weights(1, 20)))
    png(plot_attention(weights(20, 1), ["x"] * 20, ["y"]))
    png(plot_attention(np.ones((1, 1))))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_tensors_of_every_dtype_are_drawn(weights, panels, dtype):
    scores = weights(1, 2, 3, 3)
    figure = plot_attention(to_tensor(scores, dtype))
    np.testing.assert_allclose(values(panels(figure)[1]), scores[0, 1], rtol=0.01)


def test_scores_come_straight_from_the_layer(panels):
    layer = keras_mha.MultiHeadAttention(2, 4)
    x = np.random.default_rng(0).normal(size=(1, 3, 8)).astype("float32")
    _, scores = layer(x, x, use_causal_mask=True, return_attention_scores=True)
    figure = plot_attention(scores, WORDS, WORDS)
    assert values(panels(figure)[0]).mask.tolist() == (~np.tri(3, dtype=bool)).tolist()


def overlaps(figure, labels):
    """How many neighbouring labels run into each other."""
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in labels if label.get_text()]
    return sum(a.overlaps(b) for a, b in itertools.pairwise(boxes))


@pytest.mark.parametrize("count, length", [(1, 3), (2, 12), (1, 77)])
def test_labels_do_not_run_into_each_other(weights, panels, count, length):
    tokens = [f"token{i}" for i in range(length)]
    figure = plot_attention(weights(count, length, length), tokens, tokens)
    first = panels(figure)[0]
    assert not overlaps(figure, first.get_xticklabels())
    assert not overlaps(figure, first.get_yticklabels())


def test_eight_heads_of_thirty_tokens_can_be_read(weights, panels):
    tokens = [f"token{i}" for i in range(30)]
    figure = plot_attention(weights(8, 30, 30, causal=True), tokens, tokens)
    below = panels(figure)[4]
    for labels in (below.get_xticklabels(), below.get_yticklabels()):
        assert [label.get_text() for label in labels] == tokens
        assert not overlaps(figure, labels)
        assert labels[0].get_size() >= 6


def test_many_tokens_are_thinned_at_their_own_places(weights, panels):
    tokens = [f"t{i}" for i in range(200)]
    (axes,) = panels(plot_attention(weights(200, 200), tokens, tokens))
    places = axes.get_xticks().astype(int)
    assert 10 < len(places) < 100
    assert written(axes.xaxis) == [f"t{place}" for place in places]


@pytest.mark.parametrize(
    "token, shown",
    [
        (" ", "␣"),
        ("   ", "␣␣␣"),
        (" the", "␣the"),
        ("New York ", "New York␣"),
        ("\n", "\\n"),
        ("a\tb", "a\\tb"),
        ("\x00", "\\x00"),
        ("\u00a0", "\\xa0"),
        ("\u3000", "\\u3000"),
        ("\u200b", "\\u200b"),
        ("", ""),
        (b"caf\xc3\xa9", "café"),
        (7, "7"),
        ("$x$", "$x$"),
        ("a_b^c", "a_b^c"),
        ("##ing", "##ing"),
        ("antidisestablishment", "antidisestabl…"),
        ("e\u0301" * 10, "e\u0301" * 6 + "…"),
        # What joins and shapes letters stays where it has letters.
        ("بی\u200cتو", "بی\u200cتو"),
        ("שלום", "שלום"),
    ],
)
def test_tokens_are_shown_as_what_they_are(weights, panels, token, shown):
    (axes,) = panels(plot_attention(weights(1, 1), [token], ["key"]))
    assert written(axes.yaxis) == [shown]
    assert not axes.yaxis.get_ticklabels()[0].get_parse_math()


def test_a_string_is_its_characters(weights, panels):
    (axes,) = panels(plot_attention(weights(3, 3), "a b", "xyz"))
    assert written(axes.yaxis) == ["a", "␣", "b"]


def test_formulas_are_no_formulas(weights):
    tokens = ["$", "$$", "$x_1^2$", "\\frac{1", "_", "%", "{", "$\\"]
    png(plot_attention(weights(8, 8), tokens, tokens, title="$\\notacommand$"))


def picture_of(token, **kwargs):
    figure = Figure(figsize=(2, 0.6))
    figure.text(0.1, 0.4, token, fontsize=24, **kwargs)
    return png(figure) < 128


def test_right_to_left_text_runs_from_right_to_left():
    # Alef has ink to the right in "alef, lamed" if its reading starts there.
    backwards = "לא"[::-1]
    override = "\u202d" + backwards + "\u202c"  # asks for left to right
    np.testing.assert_array_equal(picture_of("לא"), picture_of(override))


def test_arabic_letters_are_joined():
    joined = picture_of("سلم")
    apart = picture_of("س\u200cل\u200cم")
    assert joined.any() and (joined != apart).any()


@pytest.fixture
def known_fonts(monkeypatch):
    """Only fonts that come with matplotlib, whatever else is installed."""
    from matplotlib import font_manager

    path = font_manager.cbook._get_data_path("fonts", "ttf")
    entries = [
        entry
        for entry in font_manager.fontManager.ttflist
        if entry.fname.startswith(str(path))
    ]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", entries)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [])
    text._fonts_for.cache_clear()
    yield
    text._fonts_for.cache_clear()


@pytest.mark.filterwarnings("error")
def test_usual_text_asks_for_no_other_font(known_fonts):
    assert "family" not in text.font_options(["naïve", "Ελλάδα", "שלום", "سلام", "␣"])


@pytest.mark.filterwarnings("error")
def test_another_font_is_found_by_what_it_has(known_fonts):
    fraktur = "\U0001d51e"  # of formulas: not in the usual font
    families = text.font_options([fraktur])["family"]
    assert families[-1] != text.LAST_RESORT
    assert families[0] == "sans-serif"


def test_characters_without_a_font_are_named_once(known_fonts, weights, recwarn):
    tokens = list("我爱猫あ")
    figure = plot_attention(weights(4, 4), tokens, tokens, title="猫")
    png(figure)
    png(figure)
    (warning,) = recwarn.list
    message = str(warning.message)
    assert "CJK" in message and "HIRAGANA" in message and "fonts-noto-cjk" in message
    assert warning.filename == __file__


def test_title_stands_above(weights):
    assert plot_attention(weights(2, 2), title="$5").get_suptitle() == "$5"


def test_a_given_figure_is_drawn_into_and_returned(weights, panels):
    figure = Figure(figsize=(7, 5))
    assert plot_attention(weights(3, 2, 2), figure=figure) is figure
    assert len(panels(figure)) == 3
    assert tuple(figure.get_size_inches()) == (7, 5)


def test_a_given_figure_is_laid_out_unless_it_has_a_layout(weights):
    bare, own = Figure(), Figure(layout="constrained")
    engine = own.get_layout_engine()
    for figure in (bare, own):
        plot_attention(weights(2, 3, 3), figure=figure)
    assert bare.get_layout_engine() is not None
    assert own.get_layout_engine() is engine


def test_a_part_of_a_figure_is_drawn_into(weights, panels):
    whole = Figure(layout="constrained")
    left, right = whole.subfigures(1, 2)
    assert plot_attention(weights(2, 2, 2, causal=True), figure=left) is left
    plot_attention(weights(3, 2, 2), figure=right, title="right")
    assert (len(panels(left)), len(panels(right))) == (2, 3)
    png(whole)


def test_a_pyplot_figure_is_drawn_into(weights, panels):
    figure = pyplot.figure()
    try:
        assert plot_attention(weights(2, 2, 2, causal=True), figure=figure) is figure
        assert len(panels(figure)) == 2
    finally:
        pyplot.close(figure)


def test_a_notebook_shows_the_figure_by_itself(weights):
    figure = plot_attention(weights(2, 2))
    assert isinstance(figure, Figure)
    assert Image.open(io.BytesIO(figure._repr_png_())).format == "PNG"


def test_figures_can_be_pickled(weights, panels):
    figure = pickle.loads(pickle.dumps(plot_attention(weights(2, 3, 3))))
    assert len(panels(figure)) == 2


def test_without_matplotlib_the_extra_is_named(weights, monkeypatch):
    monkeypatch.setattr(info.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(info.MissingExtra, match=r"matplotlib.*keras-mha\[viz\]"):
        plot_attention(weights(2, 2))


@pytest.mark.parametrize(
    "kwargs, named",
    [
        ({"heads": 4}, "`heads` must be from -4 to 3"),
        ({"heads": [0, -5]}, "`heads`.*Received: heads=-5"),
        ({"heads": []}, "`heads` must name at least one"),
        ({"sample": 2}, "`sample` must be from -2 to 1"),
        ({"query_tokens": ["a"] * 4}, "`query_tokens`.*each of the 3 .*4 tokens"),
        ({"key_tokens": ["a"] * 3}, "`key_tokens`.*each of the 5 .*3 tokens"),
        ({"mask": np.ones((3, 4), bool)}, r"`mask`.*\(2, 4, 3, 5\).*\(3, 4\)"),
        ({"mask": masks.Padding(np.ones((2, 4), bool))}, "`valid` of Padding"),
        ({"columns": 0}, "`columns`"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else "",
)
def test_what_does_not_go_with_the_scores_is_refused(weights, kwargs, named):
    with pytest.raises(ValueError, match=named):
        plot_attention(weights(2, 4, 3, 5), **kwargs)


@pytest.mark.parametrize(
    "kwargs, named",
    [
        ({"heads": 1.5}, "heads"),
        ({"sample": "first"}, "`sample`"),
        ({"columns": 2.0}, "`columns`"),
        ({"query_tokens": 3}, "`query_tokens`"),
        ({"figure": 3}, "`figure` must be a matplotlib Figure"),
    ],
)
def test_arguments_of_another_type_are_refused(weights, kwargs, named):
    with pytest.raises(TypeError, match=named):
        plot_attention(weights(2, 4, 3, 5), **kwargs)


@pytest.mark.parametrize("shape", [(3,), (1, 2, 3, 4, 5), (0, 3), (2, 0, 3, 3)])
def test_scores_of_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"`scores`.*\(B, N, T, S\)"):
        plot_attention(np.ones(shape))


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_refused(weights, number):
    scores = weights(2, 3, 3)
    scores[1, 1, 1] = number
    with pytest.raises(ValueError, match="`scores` must be finite"):
        plot_attention(scores, heads=0)


@pytest.mark.parametrize("scores", ["abc", None, np.array([["a"]])])
def test_scores_that_are_no_numbers_are_refused(scores):
    with pytest.raises(TypeError, match="`scores`"):
        plot_attention(scores)


def test_symbolic_scores_are_refused_with_what_to_do():
    with pytest.raises(TypeError, match=r"`scores`.*attention_maps"):
        plot_attention(keras.KerasTensor((1, 2, 3, 3)))


def test_maps_of_several_layers_are_refused_with_what_to_do(weights):
    with pytest.raises(TypeError, match=r"take one by its path.* 'first', 'second'"):
        keras_mha.plot_attention(dict.fromkeys(("first", "second"), weights(2, 3, 3)))


def test_a_single_query_has_a_whole_number():
    axes = keras_mha.plot_attention(np.full((1, 20), 0.05)).axes[0]
    low, high = sorted(axes.get_ylim())
    assert [tick for tick in axes.get_yticks() if low <= tick <= high] == [0]


def test_a_title_of_any_kind_is_written(weights):
    assert keras_mha.plot_attention(weights(2, 3, 3), title=3).get_suptitle() == "3"
