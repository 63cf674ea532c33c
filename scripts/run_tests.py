"""Run the test suite under each backend, then the cross-backend matrix.

    python scripts/run_tests.py                      # three backends and the matrix
    python scripts/run_tests.py jax torch            # these backends, no matrix
    python scripts/run_tests.py jax --pytest="-k mask -x"
    python scripts/run_tests.py torch --core         # what a change breaks first

A backend is chosen once per process, so each one gets a pytest of its own, spread over
the cores. What asks nothing of a backend (marked `once`) is part of one of these runs
only. The matrix starts a process per backend itself and so runs once, after them.
The last line is `N passed, N failed, N skipped`, summed over all the runs.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ("tensorflow", "jax", "torch")
MATRIX = "tests/matrix"
# What the layer computes and refuses, without what is slow: programs compiled, files,
# peers, processes and notebooks.
CORE = (
    "tests/test_masks.py",
    "tests/test_wrong_use.py",
    "tests/test_wrong_positions.py",
    "tests/ops",
    "tests/kernels/test_blockwise.py",
    "tests/kernels/test_dropout.py",
    "tests/kernels/test_parts.py",
    "tests/kernels/test_tiling.py",
    "tests/layers/test_cache.py",
    "tests/layers/test_multi_head_attention_axes.py",
    "tests/layers/test_multi_head_attention_empty.py",
    "tests/layers/test_multi_head_attention_masks.py",
    "tests/layers/test_multi_head_attention_numbers.py",
    "tests/layers/test_multi_head_attention_padding.py",
    "tests/layers/test_multi_head_attention_positions.py",
    "tests/layers/test_multi_head_attention_symbolic.py",
    "tests/layers/test_relative_position_bias.py",
)
NOT_CORE = "compile or known or exported or traces"  # words of slow tests' names
OUTCOMES = ("passed", "failed", "skipped")
FAILURES = {"failure", "error"}  # as the report calls them
WIDTH = 300  # of a reason, characters
# Most of the time under JAX goes into compiling tiny functions once each: compile them
# quickly, and not again in the other worker or the next run.
QUICK_COMPILATION = {
    "XLA_FLAGS": "--xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true "
    # What is fused is the same; its code is made in one step and not by way of MLIR.
    "--xla_cpu_use_fusion_emitters=false",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
NO_TESTS_COLLECTED = 5  # pytest's exit status


class Result(NamedTuple):
    name: str
    passed: int
    failed: int
    skipped: int
    seconds: float
    # Of each reason for which tests failed, the first and how many more there are.
    reasons: list[str]


def backend_environment(backend, threads):
    """The environment of a suite whose workers may use `threads` threads each."""
    return {
        **os.environ,
        **QUICK_COMPILATION,
        "KERAS_BACKEND": backend,
        "TF_CPP_MIN_LOG_LEVEL": "2",
        # Without these every worker starts a thread per core for every library.
        "OMP_NUM_THREADS": str(threads),  # torch, NumPy
        "TF_NUM_INTRAOP_THREADS": str(threads),
        "NPROC": str(threads),  # XLA's pool on the CPU
    }


def matrix_environment():
    environment = {
        **os.environ,
        **QUICK_COMPILATION,
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("KERAS_BACKEND", None)  # the matrix sets it for each process
    return environment


def run_pytest(name, arguments, extra, environment):
    print(f"\n==== {name} ====", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        pytest = [sys.executable, "-m", "pytest", f"--junit-xml={report}"]
        start = time.perf_counter()
        status = subprocess.run(
            [*pytest, *arguments, *extra], cwd=ROOT, env=environment
        ).returncode
        seconds = time.perf_counter() - start
        tests = read_tests(report)
    outcomes = Counter(outcome({child.tag for child in test}) for test in tests)
    # A run that breaks off or collects nothing is no success, but a `-k` that is meant
    # for one run may well select nothing in another.
    if status != 0 and not (status == NO_TESTS_COLLECTED and extra):
        outcomes["failed"] = max(outcomes["failed"], 1)
    counts = (outcomes[key] for key in OUTCOMES)
    return Result(name, *counts, seconds, reasons_of_failures(tests))


def read_tests(report):
    try:
        return list(ElementTree.parse(report).iter("testcase"))
    except (FileNotFoundError, ElementTree.ParseError):
        return []


def reasons_of_failures(tests):
    """Returns a line for each reason: a fixture that fails fails all its tests."""
    failed = {}
    for test in tests:
        for child in test:
            if child.tag in FAILURES:
                reason = " ".join(child.get("message", "").split())[:WIDTH]
                name = f"{test.get('classname')}::{test.get('name')}"
                failed.setdefault(reason, []).append(name)
    return [
        f"{names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)}: {reason}"
        for reason, names in failed.items()
    ]


def outcome(tags):
    if tags & FAILURES:
        return "failed"
    return "skipped" if "skipped" in tags else "passed"


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "backends", nargs="*", metavar="BACKEND", help=f"of {', '.join(BACKENDS)}"
    )
    parser.add_argument(
        "--workers",
        type=int,
        # More than a few only add start-up time: each one imports the backend.
        default=min(os.cpu_count() or 1, 4),
        help="pytest processes per backend (default: %(default)s)",
    )
    parser.add_argument(
        "--core", action="store_true", help="the quick core of the suite, no matrix"
    )
    parser.add_argument("--pytest", default="", help="further arguments for pytest")
    arguments = parser.parse_args()
    unknown = set(arguments.backends) - set(BACKENDS)
    if unknown:
        parser.error(
            f"unknown backend {', '.join(sorted(unknown))}: "
            f"choose from {', '.join(BACKENDS)}"
        )
    return arguments


def main():
    arguments = parse_arguments()
    extra = shlex.split(arguments.pytest)
    threads = max((os.cpu_count() or 1) // arguments.workers, 1)
    workers = [f"--numprocesses={arguments.workers}", "--dist=worksteal"]
    backends = arguments.backends or BACKENDS
    # Where it takes the least time.
    has_once = "torch" if "torch" in backends else backends[0]
    tests = ["tests", f"--ignore={MATRIX}"]
    if arguments.core:
        tests = [*CORE, "-k", f"not ({NOT_CORE})"]
    results = [
        run_pytest(
            backend,
            [*tests, *workers, *([] if backend == has_once else ["-m", "not once"])],
            extra,
            backend_environment(backend, threads),
        )
        for backend in backends
    ]
    if arguments.backends or arguments.core:
        print("\nThe cross-backend matrix is left out: it needs a run of all backends.")
    else:
        results.append(run_pytest("matrix", [MATRIX], extra, matrix_environment()))

    print("\n==== summary ====")
    for result in results:
        print(
            f"{result.name:<10} {result.passed:>5} passed {result.failed:>5} failed "
            f"{result.skipped:>5} skipped {result.seconds:>7.1f} s"
        )
    for result in results:
        for line in result.reasons:
            print(f"{result.name}: {line}")
    passed, failed, skipped = (
        sum(getattr(result, key) for result in results) for key in OUTCOMES
    )
    print(f"{passed} passed, {failed} failed, {skipped} skipped", flush=True)
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
