"""The READMEs say of every device what the planner says."""

import keras
import pytest

from tests import what_runs_where
from tests.what_runs_where import DEVICES, PAGES, TITLES

BACKEND = keras.backend.backend()


def columns_on(page):
    """Returns the page's columns of this backend, and the rows' names."""
    rows = [
        [cell.strip() for cell in line.strip("| ").split(" | ")]
        for line in what_runs_where.on_page(page).splitlines()
    ]
    heads, _, *rows = [["", *row] if len(row) < len(rows[1]) else row for row in rows]
    names = [f"{TITLES[BACKEND]}, {device.upper()}" for device in DEVICES[BACKEND]]
    return [[row[heads.index(name)] for row in rows] for name in names], rows


@pytest.mark.parametrize("page", PAGES)
def test_the_table_is_the_planners(page):
    on_page, rows = columns_on(page)
    told = what_runs_where.CHINESE if PAGES[page] else {}
    expected = what_runs_where.columns().values()
    assert on_page == [[told.get(cell, cell) for cell in column] for column in expected]
    assert [row[0] for row in rows] == [
        told.get(name, name) for name in what_runs_where.calls()
    ]
