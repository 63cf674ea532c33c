"""The tables of figures in Chinese, for README.zh-CN.md."""

# ruff: noqa: RUF001 (full-width punctuation is what Chinese has)

import re

# Of the grid: whole sentences, then what stands in its tables.
GRID = {
    "The grid: 10 shapes, batch x length, of a plain call, a causal one, padding, "
    "dropout=0.1, 4 query heads to a key head (beside Keras's `GroupQueryAttention`), "
    "and cross-attention of 128 to 512 tokens; how many times faster than Keras's "
    "layer, the lowest of 4 heads of 32, 8 of 64 and 12 of 64. What is under ": (
        "网格：10 种形状（批大小 x 长度），包括普通调用、因果、填充、dropout=0.1、"
        "每个键头对应 4 个查询头（与 Keras 的 `GroupQueryAttention` 相比），"
        "以及 128 对 512 个词元的交叉注意力；图中为比 Keras 自带层快多少倍，"
        "取 4 个宽度为 32、8 个宽度为 64 和 12 个宽度为 64 的头三者中的最低值。低于 "
    ),
    " is framed.": " 的格子加框。",
    "Measured so far: ": "目前已测量：",
    " calls.": " 个调用。",
    "The grid: how many times faster than Keras's layer": (
        "网格：比 Keras 自带层快多少倍"
    ),
    "| calls, forward and training |": "| 调用数，前向与训练 |",
    " by the third quartile too |": "（按第三四分位数也是） |",
    "| under ": "| 低于 ",
    "| the grid |": "| 网格 |",
    "| lowest of the grid |": "| 网格中最低的 |",
    "| lowest |": "| 最低 |",
    "| median |": "| 中位数 |",
    "| times faster |": "| 加速比 |",
    "ours, ms": "本层，毫秒",
    "Keras's, ms": "Keras，毫秒",
    "| forward |": "| 前向 |",
    ", eager |": "，即时执行 |",
    ", compiled |": "，编译 |",
    ", xla |": "，XLA |",
    "float32; medians (and quartiles) of the ratios of interleaved rounds. Where this "
    "layer came out slower it was timed again, three of each layer in turns.": (
        "float32；表中为交错轮次比值的中位数（及四分位数）。本层测得较慢之处又重新计时，"
        "两种层各建三个，轮流运行。"
    ),
}
# Longest first, so that no phrase is taken apart by a part of it.
PHRASES = {
    "times faster than Keras's layer": "相对 Keras 自带层的加速比",
    "How many times faster than Keras's layer": "比 Keras 自带层快多少倍",
    "memory that a training step adds: ours / Keras's": (
        "一个训练步增加的内存：本层 / Keras 自带层"
    ),
    "Memory that a training step adds over the length": (
        "一个训练步增加的内存随长度的变化"
    ),
    "Time over the length": "时间随长度的变化",
    "decoding, ms: ours / KerasHub": "解码，毫秒：本层 / KerasHub",
    "whole process, causal,": "整个进程，因果，",
    "last quarter padding,": "末四分之一为填充，",
    "the same with XLA": "同上，使用 XLA",
    ", attention alone": "，仅注意力",
    "plain formula": "朴素公式",
    "causal,": "因果，",
    ", same cache": "，同一缓存",
    ", a cache each": "，各用自己的缓存",
    ", no cache": "，不用缓存",
    "tokens again": "个词元全部重算",
    "forward, ms": "前向，毫秒",
    "training, ms": "训练，毫秒",
    ", forward": "，前向",
    ", layer": "，层",
    "| training": "| 训练",
    "key heads,": "个键值头，",
    " tokens": " 个词元",
    " cores,": " 核，",
    "GiB; Keras": "GiB；Keras",
    "`jax.jit`, `tf.function`, ": "`jax.jit`、`tf.function`、",
    "batch of 1, float32;": "批大小为 1，float32；",
    "PyTorch eager; training is the forward pass and all gradients.": (
        "PyTorch 即时执行；“训练”指前向加上全部梯度。"
    ),
    "Medians (and quartiles) of interleaved rounds in one process; the machine is "
    "shared, so ratios count and single times do not.": (
        "表中为同一进程内交错轮次的中位数（及四分位数）；"
        "机器是共享的，因此应看比值，而非单个时间。"
    ),
}
PATTERNS = {
    r"\bplain (\d)": r"普通 \1",
    r"\bcausal (\d)": r"因果 \1",
    r"\bpadding (\d)": r"填充 \1",
    r"\bgrouped (\d)": r"分组 \1",
    r"\bcross (\d)": r"交叉 \1",
    r"token (\d+), cache of (\d+)": r"第 \1 个词元，缓存 \2",
    r"token (\d+)": r"第 \1 个词元",
    r", (\d+) 个词元": r"，\1 个词元",
    r"\. (\d+) heads of (\d+),": r"。\1 个宽度为 \2 的头，",
    r"([，；。]) ": r"\1",
}


def translated(section: str) -> str:
    """Returns what `readme.section` or `grid.pages.section` wrote, in Chinese."""
    phrases = PHRASES | GRID
    for phrase in sorted(phrases, key=len, reverse=True):
        section = section.replace(phrase, phrases[phrase])
    for pattern, chinese in PATTERNS.items():
        section = re.sub(pattern, chinese, section)
    return section
