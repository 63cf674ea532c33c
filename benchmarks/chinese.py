"""The tables of figures in Chinese, for README.zh-CN.md."""

# ruff: noqa: RUF001 (full-width punctuation is what Chinese has)

import re

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
    r"token (\d+), cache of (\d+)": r"第 \1 个词元，缓存 \2",
    r"token (\d+)": r"第 \1 个词元",
    r", (\d+) 个词元": r"，\1 个词元",
    r"\. (\d+) heads of (\d+),": r"。\1 个宽度为 \2 的头，",
    r"([，；。]) ": r"\1",
}


def translated(section: str) -> str:
    """Returns what `readme.section` wrote, in Chinese."""
    for phrase in sorted(PHRASES, key=len, reverse=True):
        section = section.replace(phrase, PHRASES[phrase])
    for pattern, chinese in PATTERNS.items():
        section = re.sub(pattern, chinese, section)
    return section
