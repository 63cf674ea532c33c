"""Runs every feature within `jax.shard_map`, on the two devices of its own process.

Prints, for each of them, the error that it ended in, or None.
"""

from __future__ import annotations

import json
import traceback

import jax

jax.config.update("jax_num_cpu_devices", 2)  # before the first array

from tests.transformations.features import FEATURES  # noqa: E402
from tests.transformations.jax import TRANSFORMATIONS  # noqa: E402
from tests.transformations.program import check  # noqa: E402


def error(feature):
    try:
        check(feature, TRANSFORMATIONS["jax.shard_map"])
    except Exception:  # whatever it is, it is the test's to say whether it should be
        return traceback.format_exc()
    return None


print(json.dumps({feature: error(feature) for feature in FEATURES}))
