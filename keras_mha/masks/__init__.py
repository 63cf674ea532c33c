"""Masks as objects: who may attend to whom, answered a tile at a time.

Row `i` of the score matrix is a query, column `j` a key, and `True` means that the
query may attend to the key. A mask never builds the whole matrix by itself: a kernel
asks it about a `Tile`, first what the tile is (`status`: empty, full or mixed), which
costs nothing, and only for a mixed tile its booleans (`block`).

Masks compose with `&`, `|` and `~`:

>>> window = masks.Causal() & masks.SlidingWindow(512)
>>> prefix = masks.Causal() | masks.Prefix(16)
"""

from keras_mha.masks.fields import as_booleans as as_booleans
from keras_mha.masks.fields import check_dense_shape as check_dense_shape
from keras_mha.masks.kinds import (
    Causal,
    Padding,
    Prefix,
    Segments,
    SlidingWindow,
    Where,
)
from keras_mha.masks.kinds import hidden_rows_apart as hidden_rows_apart
from keras_mha.masks.kinds import is_alike_for_all_rows as is_alike_for_all_rows
from keras_mha.masks.kinds import is_certain as is_certain
from keras_mha.masks.kinds import is_plain_causal as is_plain_causal
from keras_mha.masks.mask import And, Dense, Mask, Not, Or
from keras_mha.masks.mask import as_mask as as_mask
from keras_mha.masks.mask import intersect as intersect
from keras_mha.masks.tile import Status as Status
from keras_mha.masks.tile import Tile
from keras_mha.masks.tile import whole_tile as whole_tile

# What has a page in the reference; the functions are for the rest of the house.
__all__ = [
    "And",
    "Causal",
    "Dense",
    "Mask",
    "Not",
    "Or",
    "Padding",
    "Prefix",
    "Segments",
    "SlidingWindow",
    "Tile",
    "Where",
]
