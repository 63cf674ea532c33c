"""Draws what was measured: time over length, memory over length, ratios to Keras's."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks import scale as counted
from benchmarks.cases import KINDS, Case
from benchmarks.results import KERAS, OURS, Results
from benchmarks.tables import TITLES

COLOURS = {OURS: "tab:blue", KERAS: "tab:orange"}
PEER = "tab:gray"


def all_pictures(
    results: list[Results], scaled: list[dict[str, Any]], folder: Path
) -> None:
    """Draws every picture into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {name: (draw, results) for name, draw in OF_RESULTS.items()}
    if scaled:
        pictures["scale"] = scale, scaled
    for name, (draw, drawn) in pictures.items():
        figure = draw(drawn)
        figure.savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight")
        plt.close(figure)


def time(results: list[Results]) -> plt.Figure:
    """Draws the time of a causal layer over its length, quartiles as bands."""
    figure, axes = plt.subplots(
        2, len(results), figsize=(4 * len(results), 6.4), sharex=True, squeeze=False
    )
    for column, found in enumerate(results):
        for row, kind in enumerate(("forward", "training")):
            axis = axes[row, column]
            for name in found.contestants():
                _line_with_band(axis, name, list(found.over_length(kind, name)))
            axis.set(xscale="log", yscale="log")
            axis.grid(alpha=0.3)
            axis.set_title(f"{TITLES[found.backend]}, {kind}")
            axis.legend(fontsize="small")
        axes[1, column].set_xlabel("tokens")
    for row in range(2):
        axes[row, 0].set_ylabel("milliseconds")
    _tokens(axes[0, 0])
    return figure


def _line_with_band(axis, name, points):
    lengths = [length for length, _ in points]
    low, median, high = (
        [1e3 * times[key] for _, times in points] for key in ("low", "median", "high")
    )
    colour = COLOURS.get(name, PEER)
    axis.plot(lengths, median, marker="o", markersize=3, color=colour, label=name)
    axis.fill_between(lengths, low, high, color=colour, alpha=0.25)


def memory(results: list[Results]) -> plt.Figure:
    """Draws what a training step adds to a process's memory over the length."""
    figure, axes = plt.subplots(
        1, len(results), figsize=(4 * len(results), 3.4), sharey=True, squeeze=False
    )
    for axis, found in zip(axes[0], results, strict=True):
        for name in (OURS, KERAS):
            points = found.memory_over_length(name)
            axis.plot(
                [length for length, _ in points],
                [added / 2**30 for _, added in points],
                marker="o",
                markersize=3,
                color=COLOURS[name],
                label=name,
            )
        axis.set(xscale="log", yscale="log", xlabel="tokens")
        axis.set_title(TITLES[found.backend])
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
        _tokens(axis, 4096, step=2)
    axes[0, 0].set_ylabel("GiB added by a training step")
    return figure


def ratios(results: list[Results]) -> plt.Figure:
    """Draws how many times faster than Keras's layer each case is."""
    cases = [Case("causal", 4096), Case("dropout", 4096), Case("window", 8192)]
    cases += [Case(kind, 2048) for kind in ("padded", "grouped")]
    figure, axes = plt.subplots(
        1, len(results), figsize=(4 * len(results), 3.8), sharey=True, squeeze=False
    )
    for axis, found in zip(axes[0], results, strict=True):
        for offset, kind, shade in ((-0.2, "forward", 1.0), (0.2, "training", 0.5)):
            values = [found.ratio(case, kind) or 0 for case in cases]
            places = [place + offset for place in range(len(cases))]
            bars = axis.barh(
                places, values, 0.38, color="tab:blue", alpha=shade, label=kind
            )
            axis.bar_label(bars, fmt="%.1f", padding=2, fontsize="small")
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(TITLES[found.backend])
        axis.set_xlabel("times faster than Keras's layer")
        axis.margins(x=0.15)
    axes[0, 0].set_yticks(
        range(len(cases)),
        [f"{KINDS[case.kind]}\n{case.length} tokens" for case in cases],
        fontsize="small",
    )
    axes[0, 0].invert_yaxis()
    axes[0, -1].legend(fontsize="small", loc="lower right")
    return figure


def _tokens(axis, first=16, step=4):
    ticks = [first * step**n for n in range(7) if first * step**n <= 32768]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()


def scale(kept: list[dict[str, Any]]) -> plt.Figure:
    """Draws what each device does, receives and holds, over devices and over length."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4))
    for layout in counted.LAYOUTS:
        points = [x for x in kept if x["layout"] == layout and x["batch"] > 1]
        for axis, name, unit in ((axes[0], "operations", 1e9), (axes[1], "sent", 1e6)):
            over = sorted(
                (x["devices"], x[name] / unit) for x in points if x["counts_work"]
            )
            axis.plot(*zip(*over, strict=True), marker="o", markersize=3, label=layout)
        over = sorted(
            (x["length"], x["memory"] / 1e6)
            for x in points
            if x["devices"] == 8 and not x["counts_work"]
        )
        axes[2].plot(*zip(*over, strict=True), marker="o", markersize=3, label=layout)
    for axis, title in zip(
        axes,
        (
            "operations of each device, 1e9",
            "received by each device, MB",
            "held by each of 8 devices, MB",
        ),
        strict=True,
    ):
        axis.set_title(title, fontsize="medium")
        axis.grid(alpha=0.3)
    axes[0].set(xlabel="devices", xscale="log", yscale="log")
    axes[1].set(xlabel="devices", xscale="log")
    axes[2].set(xlabel="tokens", xscale="log", yscale="log")
    for axis in axes[:2]:
        axis.set_xticks(counted.DEVICES, counted.DEVICES)
    axes[2].set_xticks(counted.LENGTHS, counted.LENGTHS)
    for axis in axes:
        axis.minorticks_off()
    axes[0].legend(fontsize="small")
    return figure


OF_RESULTS = {"time": time, "memory": memory, "ratios": ratios}
