"""How the pairs of features that rotate are shared among several axes.

References:
    Heo et al., 2024, Rotary position embedding for vision transformer:
        https://arxiv.org/abs/2403.13298
    Wang et al., 2024, Qwen2-VL (M-RoPE): https://arxiv.org/abs/2409.12191
"""

from typing import Any

from keras_mha import _checks
from keras_mha.layers.rotary_scaling import frequencies, slow_down


def checked_axes(axes: Any, sections: Any) -> tuple[int, tuple[int, ...] | None]:
    """Returns how many axes there are and how many pairs each has, or raises."""
    if axes is not None:
        axes = _checks.positive_integer("axes", axes)
    if sections is None:
        return axes or 1, None
    if not isinstance(sections, list | tuple):
        raise TypeError(
            "`sections` must be a tuple, with the number of pairs of features of each "
            f"axis. Received: sections={sections!r} (of type {type(sections).__name__})"
        )
    sections = tuple(_checks.positive_integer("sections", each) for each in sections)
    if not sections or axes not in (None, len(sections)):
        raise ValueError(
            "`sections` must have a number of pairs of features for each of `axes`. "
            f"Received: sections={sections}, axes={axes}"
        )
    return len(sections), sections


def sections_of(
    width: int, axes: int, sections: tuple[int, ...] | None
) -> tuple[int, ...]:
    """Returns how many pairs each axis has of `width` features that rotate.

    Raises:
        ValueError: If the pairs cannot be shared so.
    """
    pairs = width // 2
    if sections is None and pairs % axes:
        raise ValueError(
            "The features that rotate must be a multiple of 2 * `axes`, to share their "
            "pairs evenly: give `sections`, or a `rotary_dim` that is one. Received: "
            f"axes={axes} and {width} features, {pairs} pairs"
        )
    if sections is not None and sum(sections) != pairs:
        raise ValueError(
            "`sections` must add up to half of the features that rotate (`rotary_dim`, "
            f"or the width of a head, key_dim), {pairs}. "
            f"Received: sections={sections}, {width} features"
        )
    return sections or (pairs // axes,) * axes


def axial_frequencies(
    sections: tuple[int, ...],
    shared: bool,
    wavelength: float,
    scaling: dict[str, Any] | None,
) -> tuple[list[float], float]:
    """Returns how far each pair rotates a position along its axis, and a factor.

    Args:
        sections: How many pairs each axis has.
        shared: Whether the axes share one sequence of frequencies among them.
        wavelength: As `frequencies` has it.
        scaling: As `frequencies` has it.
    """
    found = [
        frequencies(2 * pairs, wavelength, scaling)
        for pairs in _sequences(sections, shared)
    ]
    return [radians for each, _ in found for radians in each], found[0][1]


def axial_slow_down(sections: tuple[int, ...], shared: bool) -> list[float]:
    """Returns the exponents by which "dynamic" slows down the pairs of all axes."""
    return [
        exponent
        for pairs in _sequences(sections, shared)
        for exponent in slow_down(2 * pairs)
    ]


def _sequences(sections: tuple[int, ...], shared: bool) -> tuple[int, ...]:
    """Returns how many pairs there are in each sequence of frequencies."""
    return (sum(sections),) if shared else sections
