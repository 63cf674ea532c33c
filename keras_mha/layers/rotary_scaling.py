"""How fast each pair of features rotates, and how that is scaled for longer texts.

A scaling is a dictionary with the keys that Hugging Face's configurations use
(`rope_scaling`), so that one can be taken over as it stands.

References:
    Su et al., 2021, RoFormer: https://arxiv.org/abs/2104.09864
    Chen et al., 2023, Position interpolation ("linear"):
        https://arxiv.org/abs/2306.15595
    bloc97, 2023, NTK-aware scaled RoPE ("dynamic"), as in Peng et al., appendix A
    Peng et al., 2023, YaRN ("yarn"): https://arxiv.org/abs/2309.00071
    Llama Team, 2024, The Llama 3 herd of models ("llama3"):
        https://arxiv.org/abs/2407.21783
"""

import math
from typing import Any

from keras_mha import _checks

_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
_OPTIONAL = {
    "yarn": (
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    )
}

KINDS = tuple(_REQUIRED)


def keys_of(kind: str) -> tuple[str, ...]:
    """Returns the keys that a scaling of this kind may have beside `"rope_type"`."""
    return _REQUIRED[kind] + _OPTIONAL.get(kind, ())


def checked_scaling(scaling: Any) -> dict[str, Any] | None:
    """Returns a scaling as a dictionary of Python's own numbers, or raises."""
    if scaling is None:
        return None
    if not isinstance(scaling, dict):
        raise TypeError(
            "`scaling` must be a dictionary such as "
            "{'rope_type': 'linear', 'factor': 4.0}. "
            f"Received: scaling={scaling!r} (of type {type(scaling).__name__})"
        )
    given = dict(scaling)
    kind = given.pop("rope_type", given.pop("type", None))
    given.pop("type", None)  # some configurations have both names
    _checks.choice("scaling['rope_type']", kind, KINDS)
    _check_keys(kind, given)
    checked = {"rope_type": kind}
    for name, value in given.items():
        if value is None:
            continue
        if name == "truncate":
            checked[name] = _checks.boolean(f"scaling[{name!r}]", value)
        elif value or name not in ("mscale", "mscale_all_dim"):  # 0 stands for none
            checked[name] = _checks.positive_number(f"scaling[{name!r}]", value)
    if kind == "llama3" and checked["low_freq_factor"] >= checked["high_freq_factor"]:
        raise ValueError(
            "`scaling['low_freq_factor']` must be below `scaling['high_freq_factor']`. "
            f"Received: scaling={scaling}"
        )
    return checked


def _check_keys(kind: str, given: dict[str, Any]) -> None:
    required, optional = _REQUIRED[kind], _OPTIONAL.get(kind, ())
    missing = [name for name in required if given.get(name) is None]
    unknown = [name for name in given if name not in required + optional]
    if missing or unknown:
        raise ValueError(
            f"`scaling` with rope_type={kind!r} must have the keys {list(required)}"
            f"{f' and may have {list(optional)}' if optional else ''}. "
            f"Missing: {missing}. Unknown: {unknown}"
        )


# Python's own floats from here on: NumPy's would be traced, and rounded to float32, by
# torch.compile.


def frequencies(
    width: int, wavelength: float, scaling: dict[str, Any] | None
) -> tuple[list[float], float]:
    """Returns how far each pair of features rotates a position, and a factor.

    Args:
        width: Number of features that rotate.
        wavelength: The base: pair i rotates by `wavelength^(-2i / width)` unscaled.
        scaling: What `checked_scaling` returned.

    Returns:
        Radians a position, one number for each of the `width / 2` pairs, and the factor
        of cosine and sine. For `"dynamic"` those of short texts.
    """
    plain = [wavelength ** (-2 * i / width) for i in range(width // 2)]
    kind = scaling["rope_type"] if scaling else "default"
    if kind == "linear":
        return [radians / scaling["factor"] for radians in plain], 1.0
    if kind == "yarn":
        return _yarn(plain, width, wavelength, scaling), _yarn_factor(scaling)
    if kind == "llama3":
        return _llama3(plain, scaling), 1.0
    return plain, 1.0


def slow_down(width: int) -> list[float]:
    """Returns the exponents by which "dynamic" slows the pairs down.

    With a base of `wavelength * s^(width / (width - 2))` pair i rotates
    `s^(-2i / (width - 2))` times as far.
    """
    return [2 * i / max(width - 2, 1) for i in range(width // 2)]


def _yarn(plain, width, wavelength, scaling):
    """Fast pairs stay, slow ones are slowed down, and between it goes linearly."""
    length = scaling["original_max_position_embeddings"]

    def pair_of(rotations):
        """The pair, a real number, that rotates so often within the length."""
        ratio = math.log(length / (rotations * 2 * math.pi)) / math.log(wavelength)
        return width * ratio / 2

    first = pair_of(scaling.get("beta_fast", 32.0))
    last = pair_of(scaling.get("beta_slow", 1.0))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    if first == last:
        last += 0.001
    kept = [1 - _between(i, first, last) for i in range(len(plain))]
    return _slowed(plain, kept, scaling["factor"])


def _yarn_factor(scaling):
    if "attention_factor" in scaling:
        return scaling["attention_factor"]

    def factor(multiplier):
        if scaling["factor"] <= 1:
            return 1.0
        return 0.1 * multiplier * math.log(scaling["factor"]) + 1.0

    if "mscale" in scaling and "mscale_all_dim" in scaling:
        return factor(scaling["mscale"]) / factor(scaling["mscale_all_dim"])
    return factor(1.0)


def _llama3(plain, scaling):
    """As YaRN, with the bounds told by how often a pair rotates within the length."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    length = scaling["original_max_position_embeddings"]
    rotations = [length * radians / (2 * math.pi) for radians in plain]
    kept = [_between(number, low, high) for number in rotations]
    return _slowed(plain, kept, scaling["factor"])


def _between(x, low, high):
    """0 up to `low`, 1 from `high` on, and linear between the two."""
    return min(max((x - low) / (high - low), 0.0), 1.0)


def _slowed(plain, kept, factor):
    """Divides by the factor what is not kept of each frequency."""
    return [
        radians * share + radians / factor * (1 - share)
        for radians, share in zip(plain, kept, strict=True)
    ]
