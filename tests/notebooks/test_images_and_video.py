"""What the axes of attention cost and see, and what small models make of them."""

import re

import keras
import nbformat

from notebooks.execute import HERE
from tests.notebooks.notebooks import number_after, pictures, printed, run_quickly

PATH = HERE / "4_images_and_video.ipynb"
PICTURES = {"axes", "rows", "clips", "heads", "query", "frames"}
SCORES_AND_REACH = re.compile(
    r"^(.+): ([\d,]+) scores, .+ from (\d+) of \d+$", re.MULTILINE
)


def costs(text):
    """Each choice's scores, and from how many places one is seen."""
    return {
        name: (int(scores.replace(",", "")), int(reach))
        for name, scores, reach in SCORES_AND_REACH.findall(text)
    }


def right(model, text):
    """A model's accuracy in reading digits and directions, in percent."""
    found = re.search(rf"^{model}: (\S+)% .* digits, (\S+)% .* directions", text, re.M)
    return tuple(map(float, found.groups()))


def assert_shows_its_claims(notebook, sides):
    """What must be so however short the training was."""
    texts = printed(notebook)
    assert costs(texts["axes"]) == {
        "both axes, (1, 2)": (64 * 64, 64),
        "within a row, 2": (8 * 8 * 8, 8),
        "within a column, 1": (8 * 8 * 8, 8),
        "axial, 2 and then 1": (2 * 8 * 8 * 8, 64),
    }
    assert costs(texts["video-axes"]) == {
        "space and time at once, (1, 2, 3)": (80 * 80, 80),
        "space, (2, 3)": (5 * 16 * 16, 16),
        "time, 1": (16 * 5 * 5, 5),
        "space and then time": (5 * 16 * 16 + 16 * 5 * 5, 80),
    }
    for side in sides:
        assert f"{side**4:,} over" in texts["growth"]
        assert f"{2 * side**3:,} axial" in texts["growth"]
    assert "within_rows (8, 4, 8, 8)" in texts["rows"]
    assert "within_columns (8, 4, 8, 8)" in texts["rows"]
    assert "(1, 4, 80, 80)" in texts["heads"]

    drawn = pictures(notebook)
    assert set(drawn) == PICTURES
    assert all(len(png) > 4_000 for pngs in drawn.values() for png in pngs)


def test_notebook_runs_on_this_backend(tmp_path):
    notebook = run_quickly(PATH, tmp_path)
    texts = printed(notebook)
    assert f"on {keras.backend.backend()}" in texts["setup"]
    assert_shows_its_claims(notebook, sides=(8, 16))
    assert number_after("axial:", texts["digits"]) > 20  # by chance 10
    assert right("joint", texts["video"])[1] > 50  # by chance 25
    assert [path.name for path in tmp_path.iterdir()] == ["ipython"]


class TestTheKeptNotebook:
    kept = nbformat.read(PATH, as_version=4)
    texts = printed(kept)

    def test_shows_its_claims(self):
        assert_shows_its_claims(self.kept, sides=(8, 16, 32))

    def test_learned_the_digits_and_the_directions(self):
        digits, directions = right("joint", self.texts["video"])
        assert digits > 60
        assert directions > 97
        assert number_after("axial:", self.texts["digits"]) > 92

    def test_says_truly_what_the_attention_is_needed_for(self):
        digits, directions = right("without attention", self.texts["video"])
        assert 30 < digits < 40  # "about a third"
        assert directions > 97
        text = self.texts["digits"]
        assert number_after("without attention:", text) < number_after("axial:", text)

    def test_the_order_of_the_frames_counts(self):
        assert number_after("played backwards:", self.texts["backwards"]) > 95

    def test_looks_at_ink_more_than_chance_and_training_made_it_so(self):
        alike, before, after = (
            number_after(f"{name}:", self.texts["saying"])
            for name in ("looked at alike", "before training", "after training")
        )
        assert abs(before - alike) < 3
        assert after > alike + 5
