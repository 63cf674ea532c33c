"""The notebook runs under this backend, and the kept one holds what it showed."""

import importlib.util
import re

import keras
import nbformat

from notebooks.execute import HERE
from tests.notebooks.notebooks import printed, run_quickly

PATH = HERE / "character_model.ipynb"
BACKENDS = ("tensorflow", "jax", "torch")
COMPARED = re.compile(r"^(.+): (\d+) of (\d+) ids compared, all the same", re.MULTILINE)


def comparisons(text):
    """The lines of a cell that compares: (ids compared, ids in all) by what with."""
    return {name: (int(some), int(all_)) for name, some, all_ in COMPARED.findall(text)}


def test_notebook_runs_on_this_backend(tmp_path):
    current = keras.backend.backend()
    texts = printed(run_quickly(PATH, tmp_path))
    assert f"on {current}" in texts["setup"]
    before, after = re.search(r"(\S+) before, (\S+) after", texts["training"]).groups()
    assert float(after) < float(before) - 1

    found = comparisons(texts["whole"] + texts["backends"])
    installed = {name for name in BACKENDS if importlib.util.find_spec(name)}
    assert set(found) == {"without the cache"} | installed - {current}
    assert all(compared > 100 for compared, _ in found.values())
    last = texts["backends"].splitlines()[-1]
    assert last.startswith("equal continuations under ")
    assert all(name in last for name in installed)


class TestTheKeptNotebook:
    kept = nbformat.read(PATH, as_version=4)

    def test_shows_what_every_cell_did(self):
        assert all(printed(self.kept).values())

    def test_learned_more_than_a_table_of_pairs(self):
        text = printed(self.kept)["training"]
        after, bigram = re.search(r"(\S+) after\nbigram counts: (\S+)", text).groups()
        assert float(after) < float(bigram) - 0.3

    def test_compared_all_of_the_text_under_all_backends(self):
        texts = printed(self.kept)
        found = comparisons(texts["whole"] + texts["backends"])
        assert len(found) == 3
        assert all(compared == total for compared, total in found.values())
