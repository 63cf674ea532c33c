"""The captions' notebook runs under this backend; the kept one reads its pictures."""

import re

import keras
import nbformat
import pytest

from notebooks.execute import HERE
from tests.notebooks.notebooks import number_after, pictures, printed, run_quickly

PATH = HERE / "5_captions.ipynb"
SHARES = re.compile(
    r"^(name|article) of the (\w+) +" + r"([\d.]+)% *" * 4, re.MULTILINE
)


def within(text):
    return float(re.search(r"within (\S+)", text).group(1))


def shares(text):
    """Percent of the attention on the thing, the others, the ground, and by chance."""
    return {
        (kind, thing): tuple(map(float, numbers))
        for kind, thing, *numbers in SHARES.findall(text)
    }


class Claims:
    """What every run must show, however short its training."""

    def test_the_caches_change_nothing(self, notebook):
        assert within(printed(notebook)["same"]) < 1e-3

    def test_only_distances_count(self, notebook):
        text = printed(notebook)["place"]
        # Rounding decides where two logits are equal, which is rare.
        assert number_after("counted from elsewhere:", text) >= 99.5
        assert within(text) < 1e-3

    def test_the_maps_are_of_words_over_tokens(self, notebook):
        text = printed(notebook)["maps"]
        assert re.search(r"cross_attention +\(\d+, 4, 11, 25\)", text)
        assert re.search(r"encoder/\S+ +\(\d+, 4, 25, 25\)", text)
        assert within(text) < 1e-5

    def test_shares_add_up(self, notebook):
        table = shares(printed(notebook)["shares"])
        assert len(table) == 6
        for *parts, _ in table.values():
            assert sum(parts) == pytest.approx(100, abs=0.2)

    def test_pictures_are_drawn(self, notebook):
        found = pictures(notebook)
        assert set(found) == {"scenes", "maps", "heads"}
        assert all(len(png) > 4_000 for pngs in found.values() for png in pngs)


class TestAQuickRun(Claims):
    @pytest.fixture(scope="class")
    def notebook(self, tmp_path_factory):
        return run_quickly(PATH, tmp_path_factory.mktemp("quick"))

    def test_ran_on_this_backend_and_learned_something(self, notebook):
        texts = printed(notebook)
        assert f"on {keras.backend.backend()}" in texts["setup"]
        found = re.search(r"(\S+) before, (\S+) after", texts["training"])
        before, after = map(float, found.groups())
        assert after < before - 1


class TestTheKeptNotebook(Claims):
    @pytest.fixture(scope="class")
    def notebook(self):
        return nbformat.read(PATH, as_version=4)

    def test_captions_pictures_that_it_has_not_seen(self, notebook):
        texts = printed(notebook)
        exact = number_after("exactly right:", texts["decoding"])
        assert exact >= 95
        assert number_after("who stands where:", texts["decoding"]) >= 99
        wrong = number_after("", texts["wrong"])
        assert wrong / 1000 == pytest.approx(1 - exact / 100)

    def test_who_stands_where_comes_from_the_positions(self, notebook):
        assert number_after("all at one place:", printed(notebook)["place"]) < 60

    def test_names_are_read_off_what_they_name(self, notebook):
        for (kind, _), row in shares(printed(notebook)["shares"]).items():
            on_it, others, _, chance = row
            if kind == "name":
                assert on_it > others
                assert on_it > 1.5 * chance
