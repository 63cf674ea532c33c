"""Settings for every test."""

from __future__ import annotations

import gc
import os

from hypothesis import HealthCheck, settings

# JAX compiles every example, which takes a hundred times as long as running it; what
# the backends have in common is looked at under the other two.
EXAMPLES = 8 if os.environ.get("KERAS_BACKEND") == "jax" else 25

# Every run draws the same examples, so that a red run can be run again. To look
# further: HYPOTHESIS_PROFILE=explore, which draws anew each time and more.
settings.register_profile(
    "repeatable",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=EXAMPLES,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "explore",
    settings.get_profile("repeatable"),
    derandomize=False,
    max_examples=500,
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def pytest_collection_finish():
    """Spares the garbage collector what stays: the backend's modules and the tests are
    a million objects, which it would look through again at every few programs made."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
