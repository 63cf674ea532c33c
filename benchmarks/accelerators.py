"""What was measured on a GPU or TPU, as a table: our layer beside Keras's."""

import json

from benchmarks import results
from benchmarks.results import KERAS, OURS, Results


def rows(found: Results) -> list[tuple[str, str, str]]:
    """Returns a case, and how many times as long Keras's layer takes: forward, and
    in training."""
    return [
        (f"{case.name}, batch of {case.batch}, {case.dtype}", *ratios)
        for case in found.cases()
        for ratios in [[_ratio(found, case, kind) for kind in ("forward", "training")]]
    ]


def _ratio(found, case, kind):
    ratio = found.ratio(case, kind)
    if ratio is not None:
        return f"{ratio:.2f}x"
    milliseconds = 1e3 * found.times(case, kind)[OURS]["median"]
    return f"{milliseconds:.2f} ms (no {KERAS})"


def show(backend: str, device: str) -> None:
    """Prints what is kept of a backend on a kind of device."""
    found = Results(backend, json.loads(results.path(backend, device).read_text()))
    print(f"{backend} on {', '.join(found.machine['devices'])}")
    for case, forward, training in rows(found):
        print(f"  {case:<48} {forward:>20} {training:>20}")
