"""Who of a ring has which rows and keys, and which of them meet.

Sequences are cut into chunks, one or two a device: device `d` of `n` has chunk `d`, or
(zigzag) the chunks `d` and `2 n - 1 - d`, so that all devices have early and late rows
and as much to do under a causal mask. Keys hop from each device to the next.
"""

from typing import Any, NamedTuple

import numpy as np

from keras_mha.masks import Mask, Tile

EMPTY, FULL, MIXED = range(3)
_KINDS = {"empty": EMPTY, "full": FULL, "mixed": MIXED}


class Order(NamedTuple):
    """Who has what, and when they meet.

    Args:
        size: Number of devices.
        chunks: How many each has, 1 or 2 (zigzag).
        kinds: What a mask says of each chunk of rows and each chunk of keys.
        first: How many hops away the first keys are that a device sees.
        steps: Keys of how many devices, from there on, it looks at.
    """

    size: int
    chunks: int
    kinds: np.ndarray
    first: int
    steps: int

    def chunk(self, device: Any, slot: Any) -> Any:
        """Returns the number of a device's first (0) or second (1) chunk."""
        return device + slot * (2 * self.size - 1 - 2 * device)


def order_of(mask: Mask | None, rows: int, columns: int, size: int) -> Order:
    """Returns the order in which devices have least to wait for each other."""
    kinds = _kinds(mask, rows, columns, size)
    plain = _order(size, 1, kinds)
    if rows % (2 * size) or columns % (2 * size):
        return plain
    halves = _kinds(mask, rows, columns, 2 * size)
    in_zigzag = _order(size, 2, halves)
    neighbours = [(2 * device, 2 * device + 1) for device in range(size)]
    if _longest(halves, _owned(in_zigzag)) < _longest(halves, neighbours):
        return in_zigzag
    return plain


def _kinds(mask, rows, columns, count):
    """Asks the mask about every chunk of rows and every chunk of keys."""
    height, width = rows // count, columns // count
    statuses = [
        [
            "full"
            if mask is None
            else mask.status(Tile(i * height, height, j * width, width))
            for j in range(count)
        ]
        for i in range(count)
    ]
    return np.vectorize(_KINDS.get)(statuses)


def _order(size, chunks, kinds):
    order = Order(size, chunks, kinds, 0, size)
    work = _work(kinds, _owned(order))
    hops = sorted({(i - j) % size for i, j in np.argwhere(work).tolist()}) or [0]
    # All but the longest run of hops after which nobody sees anything.
    after = [*hops[1:], hops[0] + size]
    gaps = [later - hop - 1 for hop, later in zip(hops, after, strict=True)]
    last = max(range(len(gaps)), key=lambda n: (gaps[n], n))
    first = hops[(last + 1) % len(hops)]
    return order._replace(first=first, steps=size - gaps[last])


def _owned(order):
    slots = range(order.chunks)
    return [[order.chunk(device, s) for s in slots] for device in range(order.size)]


def _work(kinds, owned):
    """Returns how many pairs of chunks two devices have to compute."""
    live = kinds != EMPTY
    return np.array([[live[np.ix_(a, b)].sum() for b in owned] for a in owned])


def _longest(kinds, owned):
    """Returns what it takes in all if at each hop all wait for the slowest."""
    work, devices = _work(kinds, owned), np.arange(len(owned))
    return sum(work[devices, (devices - hop) % len(owned)].max() for hop in devices)
