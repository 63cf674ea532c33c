"""Writes the README's figures from what was measured, between two marks."""

import re
from collections.abc import Callable
from pathlib import Path

from benchmarks.cases import (
    EARLY,
    HEADS,
    LATE,
    PLACES,
    RATE,
    WIDTH,
    WINDOW,
    Case,
    Step,
    programs,
)
from benchmarks.results import KERAS, KERAS_HUB, OURS, Results
from benchmarks.tables import NONE, TITLES, table, times_faster

BEGIN = "<!-- benchmarks: begin (written by `python -m benchmarks`) -->"
END = "<!-- benchmarks: end -->"


def write(
    results: list[Results], readme: Path, translate: Callable[[str], str] = str
) -> None:
    """Puts the tables between the marks; raises if the marks are not there."""
    replace(readme, (BEGIN, END), translate(section(results)))


def replace(page: Path, marks: tuple[str, str], block: str) -> None:
    """Puts a block between two marks; raises if the marks are not there."""
    begin, end = marks
    text = page.read_text("utf-8")
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"{page.name} has no marks {begin} ... {end}")
    page.write_text(pattern.sub(lambda _: f"{begin}\n{block}\n{end}", text), "utf-8")


def section(results: list[Results]) -> str:
    """Returns all that stands between the marks."""
    parts = (
        _ratios(results),
        "![How many times faster than Keras's layer](docs/benchmarks/ratios.png)",
        _memory(results),
        "![Memory that a training step adds over the length]"
        "(docs/benchmarks/memory.png)",
        _peers(results),
        "![Time over the length](docs/benchmarks/time.png)",
        _decoding(results),
        _machine(results),
    )
    return "\n\n".join(filter(None, parts))


def _ratios(results: list[Results]) -> str:
    cases = [
        ("causal, 16 tokens", Case("causal", 16)),
        ("causal, 1024 tokens", Case("causal", 1024)),
        ("causal, 4096 tokens", Case("causal", 4096)),
        ("the same with XLA", Case("causal", 4096, "xla")),
        (f"dropout={RATE}, 4096 tokens", Case("dropout", 4096)),
        (f"sliding_window={WINDOW}, 8192 tokens", Case("window", 8192)),
        ("last quarter padding, 2048 tokens", Case("padded", 2048)),
        ("2 key heads, 2048 tokens", Case("grouped", 2048)),
    ]
    head = ["times faster than Keras's layer"]
    for found in results:
        head += [f"{TITLES[found.backend]}, forward", "training"]
    rows = []
    for name, case in cases:
        cells = [
            times_faster(found.ratio(case, kind))
            for found in results
            for kind in ("forward", "training")
        ]
        if set(cells) != {NONE}:
            rows.append([name, *cells])
    return table(head, rows)


def _memory(results: list[Results]) -> str:
    head = ["memory that a training step adds: ours / Keras's"]
    head += [TITLES[found.backend] for found in results]
    cases = [
        (f"causal, {length} tokens", Case("causal", length))
        for length in (4096, 8192, 16384, 32768)
    ]
    cases.append((f"dropout={RATE}, 4096 tokens", Case("dropout", 4096)))
    rows = [
        [
            name,
            *(
                " / ".join(
                    _bytes(found.added_bytes(case, who)) for who in (OURS, KERAS)
                )
                for found in results
            ),
        ]
        for name, case in cases
    ]
    whole = ["whole process, causal, 32768 tokens"]
    for found in results:
        whole.append(_bytes(found.process_bytes(Case("causal", 32768), OURS)))
    return table(head, [*rows, whole])


def _bytes(number: int | None) -> str:
    if number is None:
        return NONE
    return (
        f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"
    )


def _peers(results: list[Results]) -> str:
    rows = []
    for found in results:
        for what, case in (
            ("layer", Case("causal", 4096)),
            ("attention alone", Case("function", 4096)),
        ):
            forward, training = (found.times(case, k) for k in ("forward", "training"))
            rows += [
                [
                    f"{TITLES[found.backend]}, {what}",
                    f"`{name}`",
                    _spread(forward[name]),
                    _spread(training[name]),
                ]
                for name in forward
            ]
    return table(["causal, 4096 tokens", "", "forward, ms", "training, ms"], rows)


def _spread(times: dict[str, float]) -> str:
    low, median, high = (1e3 * times[key] for key in ("low", "median", "high"))
    return f"{median:.0f} ({low:.0f}–{high:.0f})"


def _decoding(results: list[Results]) -> str:
    """Returns the table of decoding, `""` as long as it was measured nowhere."""
    columns = [
        (found, program)
        for found in results
        if found.decoding["steps"]
        for program in programs(found.backend)
    ]
    if not columns:
        return ""
    head = [f"decoding, ms: ours / KerasHub {columns[0][0].decoding['keras_hub']}"]
    rows = [[f"token {token}, cache of {slots}"] for token, slots in PLACES]
    rows += [
        [f"{LATE} tokens again, no cache"],
        [f"token {LATE} : token {EARLY}, same cache"],
        [f"token {LATE} : token {EARLY}, a cache each"],
        [f"{LATE} tokens again : token {LATE}"],
    ]
    for found, program in columns:
        head.append(TITLES[found.backend] + (", `lax.scan`" if program else ""))
        for row, cell in zip(rows, _decoding_cells(found, program), strict=True):
            row.append(cell)
    return table(head, rows)


def _decoding_cells(found: Results, program: str) -> list[str]:
    """Returns a column of the table of decoding."""
    early, late, early_alone = (
        [found.seconds(Step(who, *place, program)) for who in (OURS, KERAS_HUB)]
        for place in PLACES
    )
    again = found.prefix_seconds()
    return [
        *(" / ".join(map(_milliseconds, both)) for both in (early, late, early_alone)),
        # It is no program of steps: it stands once, in the backend's first column.
        NONE if program else _milliseconds(again),
        " / ".join(map(times_faster, map(_quotient, late, early))),
        " / ".join(map(times_faster, map(_quotient, late, early_alone))),
        times_faster(_quotient(again, late[0])),
    ]


def _quotient(seconds: float | None, other: float | None) -> float | None:
    return None if seconds is None or other is None else seconds / other


def _milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    return f"{1e3 * seconds:.0f}" if seconds >= 0.01 else f"{1e3 * seconds:.2f}"


def _machine(results: list[Results]) -> str:
    machine = results[0].machine
    versions = ", ".join(
        f"{TITLES[found.backend]} {found.machine[found.backend]}" for found in results
    )
    return (
        f"{machine['processor']}, {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB; Keras {machine['keras']}, {versions}. {HEADS} "
        f"heads of {WIDTH}, batch of 1, float32; `jax.jit`, `tf.function`, PyTorch "
        "eager; training is the forward pass and all gradients. Medians (and "
        "quartiles) of interleaved rounds in one process; the machine is shared, so "
        "ratios count and single times do not."
    )
