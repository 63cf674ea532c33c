"""Writes the READMEs' table of what runs where, as the planner says it.

    python -m tests.what_runs_where

Each column is a backend on a kind of device, asked in a process of that backend. A test
holds the columns of the backend that it runs on to the page.
"""

# ruff: noqa: RUF001 (full-width punctuation is what Chinese has)

from __future__ import annotations

import json
import re
from pathlib import Path

import keras
import numpy as np

import keras_mha
from keras_mha import info, masks

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": False, "README.zh-CN.md": True}
BEGIN = "<!-- what runs where: begin (written by `python -m tests.what_runs_where`) -->"
END = "<!-- what runs where: end -->"
TITLES = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}
DEVICES = {
    "tensorflow": ("cpu", "gpu"),
    "jax": ("cpu", "gpu", "tpu"),
    "torch": ("cpu", "gpu"),
}
BATCH, LENGTH, HEADS, WIDTH = 8, 4096, 8, 64
WHOLE, TILES = "whole scores", "tiles"
CHINESE = {
    "short: 128 tokens": "短序列：128 个词元",
    "full or causal": "全部或因果",
    "float32, causal": "float32，因果",
    "padding": "填充",
    "causal, window of 512": "因果，窗口 512",
    "causal, packed segments": "因果，拼接分段",
    "causal, dropout": "因果，dropout",
    "causal, 2 key heads": "因果，2 个键头",
    "causal, soft cap": "因果，软上限",
    "causal, sink": "因果，汇点",
    "causal, ALiBi": "因果，ALiBi",
    "a bfloat16 bias of T x S": "T x S 的 bfloat16 偏置",
    "a mask of your own": "自定义掩码",
    "scores returned": "返回权重",
    WHOLE: "完整分数",
    TILES: "分块",
}


class EveryOther(masks.Mask):
    """A mask of a user's own."""

    def allowed(self, rows, columns):
        return (rows - columns) % 2 == 0


def calls() -> dict[str, tuple[dict, dict]]:
    """Returns the rows: of what tensors a call is, and its options."""
    causal = masks.Causal()
    valid = np.ones((BATCH, LENGTH), bool)
    segments = np.zeros((BATCH, LENGTH), "int32")
    bias = keras.KerasTensor((1, HEADS, LENGTH, LENGTH), "bfloat16")
    alibi = keras_mha.ALiBi(HEADS).bias()
    return {
        "short: 128 tokens": ({"length": 128}, {}),
        "full or causal": ({}, {"mask": causal}),
        "float32, causal": ({"dtype": "float32"}, {"mask": causal}),
        "padding": ({}, {"mask": masks.Padding(valid)}),
        "causal, window of 512": ({}, {"mask": causal & masks.SlidingWindow(512)}),
        "causal, packed segments": ({}, {"mask": causal & masks.Segments(segments)}),
        "causal, dropout": ({}, {"mask": causal, "dropout": 0.1, "seed": 0}),
        "causal, 2 key heads": ({"groups": 2}, {"mask": causal}),
        "causal, soft cap": ({}, {"mask": causal, "logit_soft_cap": 30.0}),
        "causal, sink": ({}, {"mask": causal, "sink": 0.0}),
        "causal, ALiBi": ({}, {"mask": causal, "position_bias": alibi}),
        "a bfloat16 bias of T x S": ({}, {"bias": bias}),
        "a mask of your own": ({}, {"mask": EveryOther()}),
        "scores returned": ({}, {"return_scores": True}),
    }


def plan(tensors: dict, options: dict, device: str) -> keras_mha.ops.planner.Plan:
    """Asks the planner."""
    shape = {"length": LENGTH, "groups": HEADS, "dtype": "bfloat16"} | tensors
    query, key = (
        keras.KerasTensor((BATCH, shape["length"], heads, WIDTH), shape["dtype"])
        for heads in (HEADS, shape["groups"])
    )
    return keras_mha.plan_attention(query, key, key, device=device, **options)


def columns() -> dict[str, list[str]]:
    """Returns the columns of the backend that Keras runs on, by device."""
    return {
        device: [_cell(plan(*call, device)) for call in calls().values()]
        for device in DEVICES[keras.backend.backend()]
    }


def _cell(plan):
    names = {"blockwise": TILES, "reference": WHOLE}
    return names.get(plan.implementation) or plan.fused_kernel


def table(found: dict[str, dict[str, list[str]]], chinese: bool = False) -> str:
    """Returns the table as Markdown.

    Args:
        found: For each backend what `columns` returned there.
        chinese: Whether in Chinese.
    """

    def told(text):
        return CHINESE.get(text, text) if chinese else text

    heads, cells = [""], [[told(name)] for name in calls()]
    for backend, devices in found.items():
        for device, column in devices.items():
            heads.append(f"{TITLES[backend]}, {device.upper()}")
            for row, cell in zip(cells, column, strict=True):
                row.append(told(cell))
    lines = [heads, ["---"] * len(heads), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def on_page(page: str) -> str:
    """Returns the table as it stands on a page."""
    text = (ROOT / page).read_text("utf-8")
    return text.split(BEGIN)[1].split(END)[0].strip()


def write() -> None:
    """Asks all backends, and writes both pages."""
    found = {
        backend: json.loads(
            info.run_under(backend, __spec__.name, "columns").splitlines()[-1]
        )
        for backend in TITLES
    }
    for page, chinese in PAGES.items():
        path = ROOT / page
        pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
        block = f"{BEGIN}\n{table(found, chinese)}\n{END}"
        text = path.read_text("utf-8")
        assert pattern.search(text), f"{page} has no marks"
        path.write_text(pattern.sub(lambda _: block, text), "utf-8")  # noqa: B023


if __name__ == "__main__":
    import sys

    if sys.argv[1:] == ["columns"]:
        print(json.dumps(columns()))
    else:
        write()
