"""The notebook runs under this backend, and the kept one translates and is seen to."""

import re

import keras
import nbformat
import pytest

from notebooks.execute import HERE
from tests.notebooks.notebooks import number_after, pictures, printed, run_quickly

PATH = HERE / "3_translation_you_can_see.ipynb"
SAME = re.compile(r"caches: ([\d,]+) of ([\d,]+) dates are the same")


def whole(number):
    return int(number.replace(",", ""))


def rounding(text):
    return float(re.search(r"within (\S+)", text).group(1))


def shares(text):
    """The table of shares in percent: numbers by column, by row."""
    head, *rows = text.splitlines()
    columns = head.replace("the rest", "rest").split()
    found = {}
    for row in rows:
        name = re.match(r"[a-z]+", row).group()
        numbers = map(float, re.findall(r"([\d.]+)%", row))
        found[name] = dict(zip(columns, numbers, strict=True))
    return found


class Claims:
    """What every run must show, however short its training."""

    def test_every_cell_showed_something(self, notebook):
        shown = {name for name, text in printed(notebook).items() if text}
        shown |= set(pictures(notebook))
        assert shown == set(printed(notebook))

    def test_all_forms_of_the_date_are_written_right(self, notebook):
        text = printed(notebook)["dates"]
        assert len(text.splitlines()) == 15
        for form in ("Fri, Nov 20 26", "Friday 20th of November, 2026", "11/20/2026"):
            assert form in text

    def test_the_caches_change_nothing(self, notebook):
        text = printed(notebook)["same"]
        same, total = map(whole, SAME.search(text).groups())
        assert total == 1000
        # Rounding decides where two logits are equal, which is rare.
        assert same >= total - 2
        assert rounding(text) < 1e-3

    def test_the_maps_show_no_padding_and_nothing_that_comes_later(self, notebook):
        text = printed(notebook)["maps"]
        assert "(1000, 4, 33, 33)" in text
        assert "(1000, 4, 10, 10)" in text
        assert re.search(r"cross_attention +\(1000, 4, 10, 33\)", text)
        assert number_after("largest weight on padding:", text) == 0
        assert number_after("largest weight on a later character:", text) == 0
        assert rounding(text) < 1e-5

    def test_shares_add_up(self, notebook):
        table = shares(printed(notebook)["shares"])
        assert list(table) == ["century", "year", "month", "day", "chance"]
        for row in table.values():
            assert sum(row.values()) == pytest.approx(100, abs=0.3)

    def test_pictures_are_drawn(self, notebook):
        found = pictures(notebook)
        assert {name: len(pngs) for name, pngs in found.items()} == {
            "heads": 1,
            "forms": 3,
        }


class TestAQuickRun(Claims):
    @pytest.fixture(scope="class")
    def notebook(self, tmp_path_factory):
        return run_quickly(PATH, tmp_path_factory.mktemp("quick"))

    def test_ran_on_this_backend_and_learned_something(self, notebook):
        texts = printed(notebook)
        assert f"on {keras.backend.backend()}" in texts["setup"]
        before, after = re.search(
            r"(\S+) before, (\S+) after", texts["training"]
        ).groups()
        assert float(after) < float(before) - 1


class TestTheKeptNotebook(Claims):
    @pytest.fixture(scope="class")
    def notebook(self):
        return nbformat.read(PATH, as_version=4)

    def test_translates_dates_that_it_has_not_seen(self, notebook):
        texts = printed(notebook)
        exact = number_after("exact match on held-out dates:", texts["decoding"])
        assert exact >= 98
        wrong = number_after("", texts["wrong"])
        assert wrong / 1000 == pytest.approx(1 - exact / 100)

    def test_digits_are_read_off_what_says_them(self, notebook):
        table = shares(printed(notebook)["shares"])
        for name in ("year", "month", "day"):
            own = table[name][name]
            assert own == max(table[name].values())
            assert own > 2 * table["chance"][name]
        assert table["century"]["year"] > 1.9 * table["chance"]["year"]
        weekday = [table[name]["weekday"] for name in table if name != "chance"]
        assert max(weekday) < table["chance"]["weekday"]

    def test_one_sees_what_the_digits_were_read_off(self, notebook):
        source, *lines = printed(notebook)["most"].splitlines()
        said = {"day": "20", "month": "November", "year": "2026"}
        for line in lines:
            name = line.split("'")[0].split()[-1]
            start = source.index(said[name])
            places = range(start, start + len(said[name]))
            carets = [place for place, mark in enumerate(line) if mark == "^"]
            assert carets
            assert set(carets) <= set(places)
        assert len(lines) == len(said)
