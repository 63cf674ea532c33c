"""What is done with a pair of processes of which one fails."""

import pytest

from tests.distribution import pairs

pytestmark = pytest.mark.once
# Says who it is; the second one fails while there is no file "again" beside the folder.
MODULE = """
import os, pathlib, sys
folder = pathlib.Path(sys.argv[1])
(folder / os.environ["RANK"]).touch()
again = folder.parent / "again"
if os.environ["RANK"] == "1" and not again.exists():
    {before}
    sys.exit("no peer found")
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    def run(before):
        (tmp_path / "a_pair.py").write_text(MODULE.format(before=before))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        names = iter("abc")

        def new_folder():
            folder = tmp_path / next(names)
            folder.mkdir()
            return folder

        return pairs.run_pair("a_pair", new_folder)

    return run


def test_another_pair_follows_one_that_failed(run):
    with pytest.warns(UserWarning, match=r"(?s)process 1 ended with 1:.*no peer found"):
        folder = run("again.touch()")
    assert folder.name == "b"
    assert {file.name for file in folder.iterdir()} == {"0", "1"}


@pytest.mark.filterwarnings("ignore:A pair")
def test_what_fails_each_time_is_told(run):
    with pytest.raises(AssertionError, match=r"(?s)2 pairs of a_pair.*no peer found"):
        run("pass")


@pytest.mark.filterwarnings("ignore:A pair")
def test_processes_that_hang_are_killed(run, monkeypatch):
    monkeypatch.setattr(pairs, "SECONDS", 3)
    with pytest.raises(AssertionError, match="process 1 ended with -9"):
        run("import time; time.sleep(60)")
