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


class FoldersOfWorker:
    """Makes folders as pytest's `tmp_path_factory` does in one of several workers."""

    def __init__(self, folder):
        self._base = folder / "worker"
        self._base.mkdir()
        self._made = 0

    def getbasetemp(self):
        return self._base

    def mktemp(self, name):
        self._made += 1
        folder = self._base / f"{name}{self._made}"
        folder.mkdir()
        return folder


@pytest.mark.parametrize(
    ("run", "count"), [("a run", 1), (None, 2)], ids=["workers", "no workers"]
)
def test_workers_of_a_run_share_a_pair(run, count, tmp_path, monkeypatch):
    pair, name = [], "PYTEST_XDIST_TESTRUNUID"
    worker = FoldersOfWorker(tmp_path)
    monkeypatch.delenv(name, raising=False)
    if run is not None:
        monkeypatch.setenv(name, run)

    def run_pair(module, new_folder):
        pair.append(new_folder())
        return pair[-1]

    monkeypatch.setattr(pairs, "run_pair", run_pair)
    found = [pairs.run_pair_once("a_pair", worker) for _ in range(2)]
    assert found == (pair if run is None else 2 * pair)
    assert len(pair) == count


def test_a_pair_that_failed_is_not_shared(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_XDIST_TESTRUNUID", "a run")
    worker = FoldersOfWorker(tmp_path)
    answers = iter([AssertionError("no peer"), "a folder"])

    def run_pair(module, new_folder):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(pairs, "run_pair", run_pair)
    with pytest.raises(AssertionError, match="no peer"):
        pairs.run_pair_once("a_failing_pair", worker)
    found = pairs.run_pair_once("a_failing_pair", worker)
    assert str(found) == "a folder"
