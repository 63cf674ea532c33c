"""The recommendations' notebook runs here; the kept one knows when things are due."""

import re

import keras
import nbformat
import pytest

from notebooks.execute import HERE
from tests.notebooks.notebooks import number_after, pictures, printed, run_quickly

PATH = HERE / "6_recommendations.ipynb"
WAYS = ["popularity", "last item", "one's own", "model, by order", "model, by days"]
WAYS += ["the rules"]


def withins(text):
    return [float(number) for number in re.findall(r"within (\d\S*?),?\s", text + "\n")]


def hit_rates(text):
    """Hit rates at 10 and at 1 in percent, by the way they were found."""
    rows = re.findall(r"^(\D+?) +([\d.]+)% +([\d.]+)%$", text, re.MULTILINE)
    return {name: (float(ten), float(one)) for name, ten, one in rows}


def looks(text):
    """Percent of the attention on what an answer follows, and on the latest."""
    rows = re.findall(r"^(by .+?|if .+?) +([\d.]+)% +([\d.]+)%$", text, re.MULTILINE)
    return {name: (float(cause), float(latest)) for name, cause, latest in rows}


class Claims:
    """What every run must show, however short its training."""

    def test_losses_fall(self, notebook):
        text = printed(notebook)["model"]
        losses = re.findall(r"loss (\S+) in the first epoch, (\S+) in the last", text)
        assert len(losses) == 2
        for first, last in losses:
            assert float(last) < float(first) - 0.5

    def test_padding_on_either_side_gives_the_same_answers(self, notebook):
        text = printed(notebook)["sides"]
        sides, later = withins(text)
        assert sides < 1e-3
        assert later < 1e-3
        same, total = re.search(r"same for ([\d,]+) of ([\d,]+)", text).groups()
        same, total = (int(number.replace(",", "")) for number in (same, total))
        # Rounding decides where two logits are equal, which is rare.
        assert same >= 0.99 * total

    def test_the_rules_are_the_best_that_can_be_done(self, notebook):
        rates = hit_rates(printed(notebook)["baselines"])
        assert list(rates) == WAYS
        assert rates["the rules"] == tuple(map(max, zip(*rates.values(), strict=True)))

    def test_rows_of_the_maps_sum_to_one(self, notebook):
        assert withins(printed(notebook)["looks"])[0] < 1e-5

    def test_pictures_are_drawn(self, notebook):
        found = pictures(notebook)
        assert set(found) == {"gaps", "due", "picture"}
        assert all(len(png) > 4_000 for pngs in found.values() for png in pngs)


class TestAQuickRun(Claims):
    @pytest.fixture(scope="class")
    def notebook(self, tmp_path_factory):
        return run_quickly(PATH, tmp_path_factory.mktemp("quick"))

    def test_ran_on_this_backend_and_beats_popularity(self, notebook):
        texts = printed(notebook)
        assert f"on {keras.backend.backend()}" in texts["setup"]
        rates = hit_rates(texts["baselines"])
        assert rates["model, by days"][0] > rates["popularity"][0] + 5


class TestTheKeptNotebook(Claims):
    @pytest.fixture(scope="class")
    def notebook(self):
        return nbformat.read(PATH, as_version=4)

    def test_days_count(self, notebook):
        rates = hit_rates(printed(notebook)["baselines"])
        by_days, by_order = rates["model, by days"], rates["model, by order"]
        assert by_days[0] > rates["popularity"][0] + 30
        assert by_days[0] > rates["one's own"][0]
        assert by_days[1] > by_order[1] + 5

    def test_the_first_block_looks_at_what_is_due(self, notebook):
        text = printed(notebook)["due"]
        assert number_after("due:", text) > 2
        assert number_after("ago:", text) < 1

    def test_looks_at_what_the_answer_follows(self, notebook):
        found = looks(printed(notebook)["looks"])
        even = found["if all were alike"][0]
        most = max(found[f"by days, block {number}"][0] for number in range(2))
        assert most > 2 * even

    def test_things_are_most_likely_when_they_are_due(self, notebook):
        text = printed(notebook)["gaps"]
        pairs = re.findall(r"due after (\d+) days, most likely after (\d+)", text)
        assert len(pairs) == 6
        close = [abs(int(most) - int(due)) <= 0.25 * int(due) for due, most in pairs]
        assert sum(close) >= 5
