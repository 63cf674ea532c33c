"""Test on this machine's GPU or TPU, under each backend that is installed.

    python scripts/test_accelerator.py            # all of them
    python scripts/test_accelerator.py torch      # one
    python scripts/test_accelerator.py jax --pytest="-k window -x"

Nothing is installed: the backends are those of the Python that runs this. One that sees
no device has its tests skipped, and where nothing was tested that is no success.
"""

import argparse
import importlib.util
import os
import shlex
import sys

from run_tests import BACKENDS, OUTCOMES, run_pytest

TESTS = "tests/accelerator"


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("backends", nargs="*", choices=[[], *BACKENDS])
    parser.add_argument("--pytest", default="", help="further arguments for pytest")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    installed = [name for name in BACKENDS if importlib.util.find_spec(name)]
    results = [
        run_pytest(
            backend,
            [TESTS],
            shlex.split(arguments.pytest),
            {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "2"},
        )
        for backend in arguments.backends or installed
    ]
    print("\n==== summary ====")
    for result in results:
        counts = ", ".join(f"{getattr(result, kind)} {kind}" for kind in OUTCOMES)
        print(f"{result.name:<10} {counts}", flush=True)
    failed = any(result.failed for result in results)
    return 1 if failed or not any(result.passed for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
