"""Measures under one backend, in a process of its own; prints a JSON line a result.

python -m benchmarks.worker device
python -m benchmarks.worker time
python -m benchmarks.worker memory '<case as JSON>' keras_mha
python -m benchmarks.worker decoding
"""

import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import keras

from benchmarks.cases import LATE, Case, Step, cases, steps
from benchmarks.contestants import contestants, decoding
from benchmarks.results import OURS
from keras_mha import info
from keras_mha.bench import machine, timing

SECONDS = 1.5
DECODING_SECONDS = 60  # all steps in one round, and so many rounds that it is steady
ONCE = ("training", 8192)  # minutes with whole scores: timed in one round


def time_all(names: list[str]) -> None:
    """Times cases of the backend, one after the other: those named, or all."""
    backend = keras.backend.backend()
    described = machine.description(backend) | {"devices": info.devices()}
    print(json.dumps({"machine": described}), flush=True)
    for case in cases(backend, info.device_kind()):
        if names and case.name not in names:
            continue
        print(json.dumps({"started": case.name}), flush=True)
        print(json.dumps(time_case(case)), flush=True)


def time_case(case: Case) -> dict:
    """Times all contestants of a case in interleaved rounds."""
    found = contestants(case)
    result = {"case": case.config, "times": {}}
    for index, kind in enumerate(("forward", "training")):
        times = timing.in_turns(
            {name: pair[index] for name, pair in found.items()},
            SECONDS,
            least=1 if (kind, case.length) == ONCE else 3,
            most=1 if (kind, case.length) == ONCE else 200,
        )
        result["times"][kind] = {name: t._asdict() for name, t in times.items()}
    return result


def time_decoding(
    wanted: list[Step], prefix: int, seconds: float = DECODING_SECONDS
) -> dict:
    """Times steps of decoding, and what they save: the prefix run again.

    Args:
        wanted: The steps.
        prefix: Number of tokens that our layer runs over again without a cache.
        seconds: About how long the interleaved rounds go on.
    """
    ((again, _),) = contestants(Case("causal", prefix), only=OURS).values()
    functions = decoding.contestants(wanted) | {"prefix": again}
    times = timing.in_turns(functions, seconds, least=5, most=100)
    return {
        "keras_hub": info.backend_version("keras_hub"),
        "prefix": times["prefix"]._asdict(),
        "steps": [
            {"step": step.config, "times": _per_token(times[step.name], step.count)}
            for step in wanted
        ],
    }


def _per_token(times: timing.Times, count: int) -> dict:
    found = times._asdict()
    return found | {key: found[key] / count for key in ("median", "low", "high")}


def measure_memory(case: Case, contestant: str) -> None:
    """Prints what one training step adds to the process's memory at its peak.

    It is the first step of its length, compilation included: some backends keep what
    they once had, so that a second step would seem to need nothing.
    """
    ((_, warm_up),) = contestants(replace(case, length=16), only=contestant).values()
    warm_up()
    ((forward, training),) = contestants(case, only=contestant).values()
    gc.collect()
    before = _status("VmRSS")
    times = {"training": _once(training)}
    whole = _status("VmHWM")
    times["forward"] = _once(forward)
    result = {"case": case.config, "contestant": contestant, "times": times}
    result |= {"added_bytes": whole - before, "process_bytes": whole}
    print(json.dumps(result), flush=True)


def _once(function: Callable[[], object]) -> dict:
    start = time.perf_counter()
    function()
    return timing.summary([time.perf_counter() - start])._asdict()


def _status(name: str) -> int:
    """Bytes, as Linux says of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {name} in /proc/self/status")


if __name__ == "__main__":
    if sys.argv[1] == "time":
        time_all(sys.argv[2:])
    elif sys.argv[1] == "device":
        print(json.dumps({"device": info.device_kind()}), flush=True)
    elif sys.argv[1] == "decoding":
        found = time_decoding(steps(keras.backend.backend()), LATE)
        print(json.dumps({"decoding": found}), flush=True)
    else:
        measure_memory(Case(**json.loads(sys.argv[2])), sys.argv[3])
