"""The key and value cache of a decoder: what earlier calls have seen, in fixed shapes.

A cache is a dictionary of tensors. The one of self-attention holds

    "key"     (B, L, K, H)   and   "value"   (B, L, K, V)    L slots for each row
    "length"  (B,) int32                                     how many tokens it has seen

and position p of a row lies in slot `p % L`. Without a sliding window the slots suffice
for all positions; with one, L is the window's size and new tokens take the slots of
those that no query can see any more. The cache of cross-attention holds `"key"` and
`"value"` of the memory, shape `(B, S, K, width)`, and maybe its `"mask"`, `(B, S)`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_mha._keras import Tensor, dtype_name, larger, smaller
from keras_mha.masks import Mask
from keras_mha.ops.tensors import (
    known_numbers,
    plain,
    take_along_axis,
    with_one_replaced,
)

Cache = dict[str, Tensor]


def empty(
    batch_size: int, slots: int, heads: int, widths: tuple[int, int], dtype: str
) -> Cache:
    """Returns a cache that holds nothing yet.

    Args:
        batch_size: Rows of the batch, B.
        slots: Positions that it can hold, L.
        heads: Key and value heads, K.
        widths: Of a key head and of a value head, `(H, V)`.
        dtype: Of keys and values.
    """
    key, value = (
        ops.zeros((batch_size, slots, heads, width), dtype=dtype) for width in widths
    )
    length = ops.zeros((batch_size,), dtype="int32")
    return {"key": key, "value": value, "length": length}


def is_memory(cache: Cache) -> bool:
    """Whether a cache is that of cross-attention."""
    return "length" not in cache


def slots(cache: Cache) -> int:
    """Returns how many positions a cache has room for."""
    return cache["key"].shape[1]


def is_ring(cache: Cache, window: int | None) -> bool:
    """Whether new tokens may take the slots of those that no query sees any more."""
    return not is_memory(cache) and window is not None and slots(cache) >= window


def columns(cache: Cache, count: int | None, window: int | None) -> int | None:
    """Returns how many keys `count` new tokens attend to."""
    if not is_ring(cache, window) or count == 1:
        return slots(cache)
    return None if count is None else slots(cache) + count


class Step(NamedTuple):
    """What a call with a cache attends to, and the cache after it.

    Args:
        key: Shape `(B, S, K, H)`.
        value: Shape `(B, S, K, V)`.
        key_positions: int32, shape `(B, S)`; negative where there is no key.
        mask: Which of the keys each query sees.
        cache: The new cache.
    """

    key: Tensor
    value: Tensor
    key_positions: Tensor
    mask: Mask
    cache: Cache


class NewTokens:
    """The tokens of one call that go into a cache, and where they stand.

    Args:
        cache: The cache before the call.
        count: Number of tokens in each row, T, those that are padding included.
        valid: Booleans of shape `(B, T)`, which of them are real; `None` for all.
        window: The sliding window of the layer; `None` for none.
        share_out: Puts a new cache where the one before is, on several devices.
    """

    def __init__(
        self,
        cache: Cache,
        count: Any,
        valid: Tensor | None,
        window: int | None,
        share_out: Callable[[Cache], Cache],
    ):
        cache = {name: plain(x) for name, x in cache.items()}
        self.cache, self.count = cache, count
        self.valid, self.window, self.share_out = valid, window, share_out
        self.slots = slots(cache)
        self.is_ring = is_ring(cache, window)
        self.before = cache["length"]
        index = ops.arange(count, dtype="int32")[None]
        if valid is None:
            self.number = count + ops.zeros_like(self.before)
            self.positions = self.before[:, None] + index
        else:
            self.valid = ops.cast(valid, "bool")
            valid = ops.cast(valid, "int32")
            self.number = ops.sum(valid, axis=1)
            # Padding stands where the token before it does.
            rank = larger(ops.cumsum(valid, axis=1) - 1, 0)
            self.positions = self.before[:, None] + rank
        # On a GPU this waits for the call before: the price of an error in time.
        self.known_before = known_numbers(self.before)
        self.fits = None if self.is_ring else self._fits()
        self.after = self.before + self.number
        if self.fits is not None:
            self.after = ops.where(self.fits, self.after, self.before)

    def _fits(self) -> Tensor | None:
        """Says for which rows there is room; `None` if it is known to be for all."""
        fits = self.before + self.number <= self.slots
        known = known_numbers(fits)
        if known is None:
            return fits
        if not known.all():
            row = int(known.argmin())
            raise ValueError(
                f"`cache` has room for max_length={self.slots} positions: row {row} "
                f"holds {self.known_before[row]} and cannot take "
                f"{known_numbers(self.number)[row]} more. Make it with a larger "
                "`max_length` in `init_cache`."
            )
        return None

    def refused(self, heads: Tensor) -> Tensor:
        """Makes the heads `(B, T, N, V)` of rows that had no room not-a-number.

        Only in compiled programs, which cannot raise: their caches stay as they were.
        """
        if self.fits is None:
            return heads
        return ops.where(self.fits[:, None, None, None], heads, float("nan"))

    def write(self, key: Tensor, value: Tensor, causal: bool) -> Step:
        """Writes keys `(B, T, K, H)` and values `(B, T, K, V)` into the cache.

        Args:
            key: The new tokens' keys.
            value: The new tokens' values.
            causal: Whether a query does not see the keys after it.
        """
        old = self.cache
        new = {"key": key, "value": value}
        new = {name: ops.cast(x, old[name].dtype) for name, x in new.items()}
        if self.valid is not None:
            new = {name: self._valid_first(x) for name, x in new.items()}
        positions = slot_positions(self.after, self.slots)
        put = self._put_one if self._is_one_token else self._put_many
        cache = {name: put(x, old[name], positions) for name, x in new.items()}
        cache["length"] = self.after
        cache = self.share_out(cache)
        seen, is_counted = cache, self.known_before is not None
        is_counted = is_counted and not self.known_before.any()
        if self.is_ring and not self._is_one_token:
            # The first new tokens still see what the last ones overwrite.
            seen, positions = self._ring_and_new(new)
            is_counted = False
        mask = Seen(self.positions, positions, causal, self.window, is_counted)
        return Step(seen["key"], seen["value"], positions, mask, cache)

    def _put_one(self, x: Tensor, old: Tensor, positions: Tensor) -> Tensor:
        """Puts one token of each row into its slot: in place, where a compiler can."""
        slot = self.before % self.slots
        if self.valid is not None or self.fits is not None:
            held = take_along_axis(old, slot[:, None, None, None], axis=1)
            is_added = self.after > self.before
            x = ops.where(is_added[:, None, None, None], x, held)
        return with_one_replaced(old, slot, x[:, 0])

    def _put_many(self, x: Tensor, old: Tensor, positions: Tensor) -> Tensor:
        """Puts tokens `(B, T, K, width)` into the slots of their positions."""
        if x.shape[1] == 0:
            return old
        source = positions - self.before[:, None]
        is_new = (source >= 0)[:, :, None, None]
        source = ops.clip(source, 0, self.count - 1)[:, :, None, None]
        return ops.where(is_new, take_along_axis(x, source, axis=1), old)

    @property
    def _is_one_token(self) -> bool:
        return isinstance(self.count, int) and self.count == 1

    def _ring_and_new(self, new: Cache) -> tuple[Cache, Tensor]:
        """Returns old and new keys and values side by side, and their positions."""
        old, index = self.cache, ops.arange(self.count, dtype="int32")[None]
        is_real = index < self.number[:, None]
        positions = ops.where(is_real, self.before[:, None] + index, -1)
        held = slot_positions(self.before, self.slots)
        both = {
            name: ops.concatenate([old[name], x], axis=1) for name, x in new.items()
        }
        return both, ops.concatenate([held, positions], axis=1)

    def _valid_first(self, x: Tensor) -> Tensor:
        """Moves the real tokens of each row to its front, in their order."""
        index = ops.arange(self.count, dtype="int32")[None]
        order = ops.sort(ops.where(self.valid, index, self.count), axis=1)
        order = smaller(order, self.count - 1)
        return take_along_axis(x, order[:, :, None, None], axis=1)


def slot_positions(length: Tensor, slots: int) -> Tensor:
    """Returns which position each slot holds.

    Args:
        length: Tokens that each row has seen, int32, shape `(B,)`.
        slots: Number of slots, L.

    Returns:
        int32, shape `(B, L)`: the last position before `length` that belongs to the
        slot, negative where there is none.
    """
    last = length[:, None] - 1
    return last - (last - ops.arange(slots, dtype="int32")[None]) % slots


@dataclass(frozen=True, eq=False)
class Seen(Mask):
    """Query sees the keys of a cache by where both stand.

    Args:
        query_positions: int32, shape `(B, T)`.
        key_positions: int32, shape `(B, S)`; negative where there is no key.
        causal: Whether keys after the query are hidden.
        window: Keys so far away or farther are hidden; `None` for none.
        is_counted: Whether both are known to stand no farther than they are counted.
    """

    query_positions: Tensor
    key_positions: Tensor
    causal: bool
    window: int | None
    is_counted: bool

    def block(self, tile):
        rows = tile.cut_rows(tile.cut_batch(self.query_positions), 1)
        columns = tile.cut_columns(tile.cut_batch(self.key_positions), 1)
        rows, columns = rows[:, None, :, None], columns[:, None, None, :]
        allowed = columns >= 0
        if self.causal:
            allowed = ops.logical_and(allowed, columns <= rows)
        if self.window is not None:
            near = ops.abs(rows - columns) < self.window
            allowed = ops.logical_and(allowed, near)
        return allowed

    def status(self, tile):
        if not (self.is_counted and self.causal and tile.is_static):
            return "mixed"
        return "empty" if tile.column > tile.row + tile.rows - 1 else "mixed"


def like(cache: Cache) -> Cache:
    """Returns placeholders for the tensors of a cache."""
    return {
        name: keras.KerasTensor(tuple(x.shape), dtype=dtype_name(x))
        for name, x in cache.items()
    }


def with_dtypes_of(cache: Cache, other: Cache) -> Cache:
    """Returns the cache in the dtypes of another."""
    return {
        name: x
        if dtype_name(x) == dtype_name(other[name])
        else ops.cast(x, dtype_name(other[name]))
        for name, x in cache.items()
    }
