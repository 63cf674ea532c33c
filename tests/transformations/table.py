"""Writes the READMEs' table of features and transformations, from what is tested.

    python -m tests.transformations.table

A mark stands for cells of which each is tested to give right numbers, a number for a
note on those that end in an error by name, as is tested too.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

from tests.transformations.cells import IMPOSSIBLE, NOT_YET
from tests.transformations.features import COLUMNS, FEATURES

ROOT = Path(__file__).resolve().parents[2]
BEGIN = (
    "<!-- transformations: begin (written by `python -m tests.transformations.table`) "
    "-->"
)
END = "<!-- transformations: end -->"
TITLES = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}
RIGHT = "✓"
CHINESE = {
    "self, cross": "自注意力、交叉注意力",
    "causal, window": "因果、窗口",
    "padding": "填充",
    "masks": "掩码",
    "segments": "分段",
    "bias": "偏置",
    "positions": "位置",
    "heads": "分组头、门控、归一化",
    "sink, cap": "汇点、软上限",
    "dropout": "dropout",
    "scores": "返回权重",
    "cache": "缓存",
    "bfloat16": "bfloat16",
    "together": "全部合用",
}


def transformations():
    """Pairs of a backend and the name of one of its transformations."""
    for backend in TITLES:
        module = import_module(f"tests.transformations.{backend}")
        for name in module.TRANSFORMATIONS:
            yield backend, name


def section(chinese=False):
    """Returns all that stands between the marks."""
    columns = [CHINESE[name] if chinese else name for name in COLUMNS]
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    notes = []
    for backend, name in transformations():
        cells = [_cell(column, name, notes, chinese) for column in COLUMNS]
        lines.append([f"{TITLES[backend]}, `{name}`", *cells])
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    listed = [f"{number}. {note}" for number, note in enumerate(notes, start=1)]
    return "\n\n".join([table, "\n".join(listed)]).rstrip()


def _cell(column, transformation, notes, chinese):
    """Returns a mark, or the numbers of notes, which it adds to `notes`."""
    numbers = []
    features = [name for name in FEATURES if FEATURES[name].column == column]
    problems = IMPOSSIBLE | NOT_YET
    for feature in features:
        problem = problems.get((feature, transformation))
        if problem is None:
            continue
        note = problem.note_in_chinese if chinese else problem.note
        if note not in notes:
            notes.append(note)
        numbers.append(notes.index(note) + 1)
    if not numbers:
        return RIGHT
    marks = ", ".join(map(str, sorted(set(numbers))))
    works_for_some = len(numbers) < len(features)
    return f"{RIGHT} ({marks})" if works_for_some else f"({marks})"


def write(readme, text):
    """Puts the table between the marks; raises if the marks are not there."""
    before = readme.read_text("utf-8")
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    if not pattern.search(before):
        raise SystemExit(f"{readme.name} has no marks {BEGIN} ... {END}")
    block = f"{BEGIN}\n{text}\n{END}"
    readme.write_text(pattern.sub(lambda _: block, before), "utf-8")


if __name__ == "__main__":
    write(ROOT / "README.md", section())
    write(ROOT / "README.zh-CN.md", section(chinese=True))
