"""One import, one archive, three backends: the notebook shows what it says of them."""

import importlib.util
import re

import keras
import nbformat

from notebooks.execute import HERE
from tests.notebooks.notebooks import number_after, pictures, printed, run_quickly

PATH = HERE / "2_from_import_to_archive.ipynb"
BACKENDS = ("tensorflow", "jax", "torch")
SMALL = re.compile(r"(\d\.\de[+-]\d\d)")
COMPARED = re.compile(
    r"^(\w+): (\S+)% right, largest difference .*: (\S+)$", re.MULTILINE
)
PICTURES = {
    "padding-picture",
    "objects",
    "scores",
    "cross-picture",
    "heads-picture",
}


def assert_shows_its_claims(notebook, compared_backends):
    """What must be so however short the training was."""
    texts = printed(notebook)
    assert float(SMALL.findall(texts["import"])[0]) <= 1e-5
    there_and_back = [float(number) for number in SMALL.findall(texts["training"])]
    assert len(there_and_back) == 2
    assert max(there_and_back) <= 1e-5
    assert "1 attention layer" in texts["training"]

    compared = COMPARED.findall(texts["backends"])
    assert {backend for backend, _, _ in compared} == compared_backends
    accuracy = number_after("right on held-out digits:", texts["training"])
    assert all(float(right) == accuracy for _, right, _ in compared)
    assert all(float(difference) <= 1e-5 for _, _, difference in compared)

    assert number_after("on the padding of 'mask':", texts["padding"]) == 0
    assert number_after("from its padding:", texts["padding"]) == 0
    assert float(SMALL.findall(texts["padding"])[0]) <= 1e-5
    for name, pairs in {"Causal():": 136, "SlidingWindow(4):": 100}.items():
        assert number_after(name, texts["scores"]) == pairs
        assert number_after(name, texts["influence"]) == pairs
    assert "Causal() & SlidingWindow(4): 58 pairs" in texts["influence"]
    off = re.findall(r"at most (\S+) off", texts["scores"])
    assert len(off) == 3 and all(float(distance) <= 1e-5 for distance in off)
    assert "(389, 4, 10, 16)" in texts["cross"]

    drawn = pictures(notebook)
    assert set(drawn) == PICTURES
    assert all(len(png) > 5_000 for pngs in drawn.values() for png in pngs)


def test_notebook_runs_on_this_backend(tmp_path):
    current = keras.backend.backend()
    notebook = run_quickly(PATH, tmp_path)
    texts = printed(notebook)
    assert f"on {current}" in texts["setup"]
    installed = {name for name in BACKENDS if importlib.util.find_spec(name)}
    assert_shows_its_claims(notebook, installed - {current})
    assert number_after("held-out digits:", texts["training"]) > 50
    assert number_after("held-out digits:", texts["cross"]) > 50
    assert [path.name for path in tmp_path.iterdir()] == ["ipython"]


class TestTheKeptNotebook:
    kept = nbformat.read(PATH, as_version=4)

    def test_shows_its_claims_under_all_backends(self):
        assert "on tensorflow" in printed(self.kept)["setup"]
        assert_shows_its_claims(self.kept, {"jax", "torch"})

    def test_learned_the_digits(self):
        texts = printed(self.kept)
        assert number_after("held-out digits:", texts["training"]) > 93
        assert number_after("held-out digits:", texts["cross"]) > 90
        assert number_after("with all patches:", texts["blank"]) > 90

    def test_blanking_patches_counts(self):
        text = printed(self.kept)["blank"]
        whole = number_after("with all patches:", text)
        assert number_after("three at random:", text) < whole

    def test_says_truly_which_patches_it_does_best_without(self):
        text = printed(self.kept)["blank"]
        found = re.findall(r"^without .*: (\S+)%, with (\S+)% of the ink", text, re.M)
        most, *others = [tuple(map(float, numbers)) for numbers in found]
        assert len(others) == 2
        for right, ink in others:
            assert most[0] > right
            assert ink - 4 < most[1] < ink  # "only a little less"
