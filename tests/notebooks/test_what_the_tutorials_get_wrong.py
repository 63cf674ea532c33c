"""Each mistake shows its symptom under this backend, and what is right does not.

No training is cut short here, so the kept notebook and the run show the same.
"""

import re

import nbformat
import numpy as np
import pytest

from notebooks.execute import HERE
from tests.notebooks.notebooks import number_after, pictures, printed, run_quickly

PATH = HERE / "1_what_the_tutorials_get_wrong.ipynb"
POINTS = [
    *(f"A{number}" for number in range(1, 7)),
    *(f"B{number}" for number in range(1, 5)),
    *(f"C{number}" for number in range(1, 7)),
    "D",
    *(f"E{number}" for number in range(1, 5)),
]


@pytest.fixture(scope="module", params=["kept", "run"])
def notebook(request, tmp_path_factory):
    if request.param == "kept":
        return nbformat.read(PATH, as_version=4)
    return run_quickly(PATH, tmp_path_factory.mktemp("notebook"))


@pytest.fixture(scope="module")
def texts(notebook):
    return printed(notebook)


def numbers(text):
    return [float(x) for x in re.findall(r"-?\d[\d,]*\.?\d*", text.replace(",", ""))]


def lines(text, *words):
    """The lines of a text that hold all of these words."""
    return [x for x in text.splitlines() if all(word in x for word in words)]


def line(text, *words):
    (found,) = lines(text, *words)
    return found


def test_every_point_of_the_errata_has_its_place(notebook):
    written = "".join(x.source for x in notebook.cells if x.cell_type == "markdown")
    missing = [point for point in POINTS if not re.search(rf"\b{point}\b", written)]
    assert not missing


def test_a_does_not_read_its_number_of_heads(texts):
    for heads in (2, 8):
        found = line(texts["a-heads"], f"{heads} heads instead of 1")
        assert number_after("change the output by", found) == 0
        assert number_after("in A, by", found) > 0.1


def test_a_saturates_as_heads_get_wider(texts):
    rows = [numbers(x) for x in texts["a-scale"].splitlines()]
    table = np.array([row for row in rows if len(row) == 5])
    assert table[:, 0].tolist() == [4, 16, 64, 256, 1024]
    entropy_a, entropy_ours, slope_a, slope_ours = table[:, 1:].T
    assert (np.diff(entropy_a) < 0).all() and entropy_a[-1] < 0.2
    assert (np.diff(slope_a) < 0).all() and slope_a[-1] < 0.1
    assert np.ptp(entropy_ours) < 0.1 and np.ptp(slope_ours) < 0.05
    assert entropy_ours.min() > 1.5


@pytest.mark.parametrize(
    "case, a, ours",
    [
        ("(2, 5, 16) in:", "(10, 16)", "(2, 5, 16)"),
        ("(None, 5, 16) in a model:", "(None, 16)", "(None, 5, 16)"),
        ("x + layer(x), batch of 1:", "(1, 5, 16)", "(1, 5, 16)"),
        ("x + layer(x), batch of 2:", "Error", "(2, 5, 16)"),
        ("with d_v = 8, batch of 1:", "Error", "(1, 5, 16)"),
        ("with d_v = 8, batch of 2:", "(5, 16)", "(2, 5, 16)"),
    ],
)
def test_a_merges_batch_and_time(texts, case, a, ours):
    its, our = lines(texts["a-shape"], case)
    its = its.removeprefix(f"A    {case} ")
    assert "Error" in its if a == "Error" else its == a
    assert our == f"ours {case} {ours}"


def test_a_cannot_be_loaded(texts):
    its, our = texts["a-save"].splitlines()
    assert "TypeError: LayerA.__init__() got an unexpected keyword argument" in its
    assert number_after("differ by", our) < 1e-6


def test_a_has_a_matrix_that_fits_one_length_only(texts):
    text = texts["a-formula"]
    assert line(text, "5 words, A W^A").endswith("(2, 5, 5)")
    assert "Error" in line(text, "7 words, A W^A")
    assert line(text, "7 words, ours").endswith("(2, 2, 7, 7)")
    assert abs(number_after("A W^A adds up to", text) - 1) > 0.1
    assert number_after("one of ours to", text) == 1


def test_b_lacks_an_import(texts):
    assert "NameError: name 'math'" in line(texts["b-layer"], "B at first")
    for name in ("B with its import", "ours"):
        assert line(texts["b-layer"], name) == f"{name}: (2, 4, 512)"


def test_b_attends_to_what_is_hidden(texts):
    text = texts["b-mask"]
    assert "[0.333 0.333 0.333]" in line(text, "float32", " B ")
    for dtype in ("float32", "float16"):
        assert "[0. 0. 0.]" in line(text, f"{dtype}, ", " ours ")
    half = line(text, "float16, ", " B ")
    assert "nan nan nan" in half or "Error" in half


def test_b_says_late_what_does_not_fit(texts):
    text = texts["b-late"]
    assert "Error" in line(text, "B, 512 features in 7 heads")
    assert line(text, "ours, 7 heads of 64").endswith("(2, 4, 512)")
    assert "Error" in line(text, "B, a mask for each sentence")
    assert line(text, "ours: ").endswith("(2, 8, 4, 6)")
    assert line(text, "B, a mask for a single").endswith(": (1, 8, 4, 6)")
    assert line(text, "B, two sentences and one head").endswith(": (2, 2, 4, 6)")
    assert line(text, "ours, two sentences and one head").endswith(": (2, 1, 4, 6)")


def test_b_takes_sentences_for_heads(texts):
    its, ours = texts["b-late"].split("B    with 2 heads")[1].split("ours with 2 heads")
    its, ours = (
        np.array(re.findall(r"head \d (\S+?),? head \d (\S+)", x), "float")
        for x in (its, ours)
    )
    assert its.shape == ours.shape == (2, 2)  # sentences, heads
    assert (its[:, 0] > 0.1).all() and (its[:, 1] == 0).all()
    assert (ours[0] > 0.1).all() and (ours[1] == 0).all()


def test_the_worked_sentence_looks_meant_without_the_division(texts):
    undivided, divided, shapes, chance = texts["sentence"].splitlines()
    assert shapes == "11 tokens: output (1, 11, 512) weights (1, 8, 11, 11)"
    words = 'to "animal": ['
    assert number_after(words, undivided) > 0.95
    assert number_after(words, divided) < 0.5
    assert chance.endswith("53%")


def test_c_heads_split_the_features(texts):
    text = texts["c-split"]
    assert line(text, "C's text: the last").endswith("words [4, 5, 6, 7]")
    assert line(text, "ours: the last").endswith(f"words {list(range(8))}")
    assert "Error" in line(text, "C's text, 11 words in 8 pieces")
    assert line(text, "ours, 11 words").endswith("(1, 11, 4)")
    weights = line(text, "ours: weights")
    assert weights == "ours: weights (1, 2, 8, 8), all of them above 0: True"


def test_c_worked_example_has_its_true_numbers(texts):
    text = texts["c-example"]
    weights, outputs = text.split("weights of the three words:")[1].split("outputs")
    true = [[0.2994, 0.3321, 0.3685], [0.2514, 0.326, 0.4227], [0.2078, 0.3149, 0.4773]]
    for part in (weights, outputs.split("another")[0]):
        np.testing.assert_allclose(numbers(part), np.ravel(true), atol=1.01e-4)
    assert "softmax of the first alone: [1.]" in text
    embeddings, keys = map(numbers, text.splitlines()[-2:])
    np.testing.assert_allclose(embeddings, true[0], atol=1.01e-4)
    assert np.abs(np.subtract(keys, embeddings)).max() > 0.05


def test_c_more_heads_cost_as_much(texts):
    text = texts["c-cost"]
    assert line(text, "2 heads, (2, 3, 4) in").endswith(": (2, 3, 4)")
    one, eight = [numbers(x) for x in text.splitlines()[-3:-1]]
    assert (one[0], eight[0]) == (1, 8)
    assert one[1:] == eight[1:]
    assert one[4] == sum(one[1:4]) == 4 * 128 * 512**2 + 2 * 128**2 * 512
    assert one[5] == 4 * 512**2 + 4 * 512
    assert text.splitlines()[-1].endswith("16,384 for 1 head, 131,072 for 8")


def test_d_cosine_is_not_the_dot_product(texts):
    text = texts["d-cosine"]
    assert number_after("by up to", line(text, "dot product:")) > 0.05
    assert number_after("by up to", line(text, "cosine: ")) == 0
    assert number_after("as it is:", text) == 13.1
    assert number_after("times 8:", text) > 99


def test_e_numbers_are_ours_with_its_weights_and_scale(texts):
    text = texts["e-shared"]
    assert float(re.search(r"differ by (\S+)\n", text)[1]) < 1e-5
    assert "12,288 in E, 786,432 in ours" in text
    at_first, after = numbers(text.splitlines()[-1])
    assert at_first == 0 and after > 1e-4


def test_e_is_too_even_and_attends_to_what_is_hidden(texts):
    text = texts["e-rest"]
    found = [
        number_after("entropy", x)
        for x in lines(text.split("E, weights")[0], "heads: ")
    ]
    its, ours = found[::2], found[1::2]
    assert its[0] == pytest.approx(ours[0], abs=2e-3)
    assert its[0] < its[1] - 0.1 < its[2] - 0.1 < np.log(50)
    assert np.ptp(ours) < 0.15
    hidden = text.split("may see nothing:")[1]
    assert "[0.333 0.333 0.333]" in line(hidden, "float32 ")
    assert "[nan nan nan]" in line(hidden, "float16 ")


def test_e_checks_vanish(texts):
    text = texts["e-rest"]
    assert "AssertionError" in line(text, "python    E")
    assert "8 of 10 features" in line(text, "python -O E")
    assert line(text, "ours, 4 heads of 2, (1, 3, 10) in").endswith(": (1, 3, 10)")
    assert "`num_heads` must be an integer" in line(text, "ours, 0 heads")


def test_what_is_left_is_there(texts):
    text = texts["missing"]
    assert "output (2, 4, 16) weights (2, 2, 4, 6)" in text
    assert number_after("attention to padding:", text) == 0
    assert line(text, "in training").endswith("False")
    assert line(text, "otherwise").endswith("True")


def test_pictures_are_drawn(notebook):
    drawn = pictures(notebook)
    assert set(drawn) == {"b-mask", "sentence"}
    assert all(len(png) > 5_000 for pngs in drawn.values() for png in pngs)
