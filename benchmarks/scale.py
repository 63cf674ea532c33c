"""What a training step of a layer takes on each of 1 to 8 devices, counted, not timed.

The devices are pretended by a CPU: their programs are compiled and read, never run. How
long a real machine takes is not known from this; how the work is shared is.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PATH = Path(__file__).resolve().parent / "results" / "scale.json"
LAYOUTS = ("data", "tensor", "ring", "all_to_all")
DEVICES = (1, 2, 4, 8)
BATCH, HEADS, WIDTH = 8, 8, 64
LENGTH, LENGTHS = 2048, (1024, 2048, 4096, 8192)
# Of the figure to plan by: sequences of so many tokens, one at a time.
LONG, MANY = 2**20, (8, 64)
MARKS = (
    "<!-- scale: begin (written by `python -m benchmarks`) -->",
    "<!-- scale: end -->",
)


class Point(NamedTuple):
    """A training step that is compiled.

    Args:
        layout: One of `LAYOUTS`.
        devices: Number of devices.
        batch: Number of sequences.
        length: Tokens of each.
        counts_work: Whether tiles are of all scores that a device has at once, so that
            no loop turns an unknown number of times; the memory is then not that of
            smaller tiles.
    """

    layout: str
    devices: int
    batch: int
    length: int
    counts_work: bool


def points() -> list[Point]:
    """Returns all that is compiled."""
    found = []
    for layout in LAYOUTS:
        for work in (True, False):
            found += [Point(layout, n, BATCH, LENGTH, work) for n in DEVICES]
        found += [Point(layout, 8, BATCH, n, False) for n in LENGTHS if n != LENGTH]
    for devices in DEVICES[1:]:
        for length in LENGTHS[:3]:
            for work in (True, False):
                found.append(Point("ring", devices, 1, length, work))
    return found


def measure() -> None:
    """Has a process of eight devices compile all points, and keeps what it counted."""
    environment = {
        **os.environ,
        "KERAS_BACKEND": "jax",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scale"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    PATH.write_text(done.stdout)


def load() -> list[dict[str, Any]]:
    """Returns what is kept."""
    return json.loads(PATH.read_text()) if PATH.exists() else []


def count(point: Point) -> dict[str, Any]:
    """Compiles a point and returns what each device does."""
    import jax
    import keras

    import keras_mha
    from benchmarks.compiled import work
    from keras_mha.kernels import backends, tiling

    tiling.TILE = point.length if point.counts_work else 512
    backends.current().LARGEST_TILE = tiling.TILE
    distribution = _distribution(point)
    with distribution.scope():
        layer = keras_mha.MultiHeadAttention(HEADS, WIDTH, flash_attention=True)
        shape = (point.batch, point.length, HEADS * WIDTH)
        layer.build(shape)
        weights = [weight.value for weight in layer.weights]

        def loss(weights, x):
            return (layer.stateless_call(weights, [], x)[0] ** 2).sum()

        layout = distribution.get_data_layout(shape).backend_layout
        x = jax.ShapeDtypeStruct(shape, "float32", sharding=layout)
        shardings = ([weight.sharding for weight in weights], layout)
        gradients = jax.jit(jax.grad(loss, (0, 1)), out_shardings=shardings)
        found = work(gradients.lower(weights, x).compile())
    keras.backend.clear_session()
    return {
        **point._asdict(),
        "operations": found.operations,
        "sent": sum(found.sent.values()),
        "memory": found.memory,
    }


def _distribution(point: Point) -> Any:
    import keras

    import keras_mha

    devices = keras.distribution.list_devices()[: point.devices]
    shape = (point.devices, 1) if point.layout == "data" else (1, point.devices)
    mesh = keras.distribution.DeviceMesh(shape, ["batch", "model"], devices)
    if point.layout in ("data", "tensor"):
        return keras.distribution.ModelParallel(
            layout_map=keras_mha.distribution.layout_map(mesh), batch_dim_name="batch"
        )
    return keras_mha.distribution.SequenceParallel(
        mesh, "model", "batch", method=point.layout
    )


# ------------------------------------------------------------------ laws


def plan(kept: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """Returns by the number of devices what one sequence of `LONG` tokens takes of each
    in a ring, by laws fitted to what was counted; `"error"` is their largest relative
    error where it was."""
    ring = [x for x in kept if x["layout"] == "ring" and x["batch"] == 1]
    laws = {}
    for name in ("operations", "sent", "memory"):
        of = [x for x in ring if x["counts_work"] == (name != "memory")]
        rows = np.array([_terms(name, x["devices"], x["length"]) for x in of])
        numbers = np.array([x[name] for x in of], float)
        # Relative errors count, so that small points say as much as large ones.
        law = np.linalg.lstsq(rows / numbers[:, None], np.ones(len(of)), rcond=None)[0]
        laws[name] = law, float(np.abs(rows @ law / numbers - 1).max())
    return {
        devices: {
            key: value
            for name, (law, error) in laws.items()
            for key, value in (
                (name, float(np.dot(_terms(name, devices, LONG), law))),
                (f"{name} error", error),
            )
        }
        for devices in MANY
    }


def _terms(name: str, devices: int, length: int) -> list[float]:
    """Returns what a law weighs: scores and tokens of a device; tokens that come by."""
    tokens = length / devices
    if name == "operations":
        return [length * tokens, tokens]
    if name == "sent":
        return [tokens * (devices - 1), tokens, 1.0]
    return [tokens, 1.0]


def table(kept: list[dict[str, Any]]) -> str:
    """Returns the page's table, and the figure to plan by."""
    lines = [
        f"A training step of one layer ({HEADS} heads of {WIDTH}, {BATCH} sequences of "
        f"{LENGTH} tokens, float32), counted in the compiled program of each device: "
        "operations of matrix products, bytes received from others, and bytes held "
        "beside inputs and outputs. Of the operations one device alone leaves out a "
        "ninth, by keeping scores that a ring and all-to-all work out again.",
        "",
        "| | devices | operations of one device's | received, MB | held, MB |",
        "| --- | --- | --- | --- | --- |",
    ]
    by_point = {
        (x["layout"], x["devices"], x["counts_work"]): x
        for x in kept
        if x["batch"] == BATCH and x["length"] == LENGTH
    }
    for layout in LAYOUTS:
        whole = by_point[layout, 1, True]["operations"]
        for devices in DEVICES:
            work, held = (by_point[layout, devices, x] for x in (True, False))
            lines.append(
                f"| {layout} | {devices} | {work['operations'] / whole:.3f} | "
                f"{work['sent'] / 1e6:.1f} | {held['memory'] / 1e6:.0f} |"
            )
    lines += [
        "",
        "![What each device does, receives and holds](benchmarks/scale.png)",
        "",
        f"To plan by: one sequence of {LONG:,} tokens in a ring, by laws fitted to "
        "shorter ones on 2, 4 and 8 devices (operations: tokens of a device times all; "
        "received: the tokens of the others; held: the tokens of a device).",
        "",
        "| devices | operations of each | received by each | held by each |",
        "| --- | --- | --- | --- |",
    ]
    planned = plan(kept)
    for devices, x in planned.items():
        lines.append(
            f"| {devices} | {x['operations'] / 1e12:.0f} T | {x['sent'] / 1e9:.1f} GB "
            f"| {x['memory'] / 1e9:.1f} GB |"
        )
    errors = next(iter(planned.values()))
    worst = ", ".join(
        f"{100 * errors[f'{name} error']:.1f} % ({name})"
        for name in ("operations", "sent", "memory")
    )
    lines += ["", f"Where they were fitted the laws are off by at most {worst}."]
    return "\n".join(lines)


if __name__ == "__main__":
    print(json.dumps([count(point) for point in points()], indent=1))
