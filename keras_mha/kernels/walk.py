"""The way through the tiles of a call: its loops, and what a tile needs of each tensor.

Features come before positions here, and the `G` query heads that share a key head stand
side by side: queries are `(B, K, width, G, T)`, keys and values `(B, K, width, S)`. A
tile's matrices then all have their long axis last, the fast order on CPUs.

A tile belongs to some heads (the *chunk*), a piece of the rows and one of the columns.
Its queries are `(*lead, width, G, rows)` and its scores `(*lead, G, rows, columns)`,
where `lead` is `(batch rows, key heads)`. None of these axes are folded into one:
compilers share work among devices along whole axes. Where a backend's products want the
features of rows elsewhere (`FEATURES_OF_ROWS`), they are brought there once a row.
"""

import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

from keras import ops

from keras_mha._keras import Tensor, at_least_float32, dtype_name, larger
from keras_mha._lengths import shorter, unless_one
from keras_mha.biases import Bias
from keras_mha.kernels import backends
from keras_mha.kernels.masking import mask_block
from keras_mha.kernels.tiling import cut_in_pieces, schedule
from keras_mha.masks import Mask, Tile, is_certain


class Place(NamedTuple):
    """Where a tile lies.

    Args:
        chunk: Number of the chunk of heads.
        batch: Its first batch row.
        group: Its first key head.
        i: Number of the piece of the rows.
        row: Its first row.
        j: Number of the piece of the columns.
        column: Its first column.
    """

    chunk: Any
    batch: Any
    group: Any
    i: Any
    row: Any
    j: Any = None
    column: Any = None


class Walk:
    """The loops over the tiles of one call.

    Args:
        query: Shape `(B, K, H, G, T)`.
        key: Shape `(B, K, H, S)`.
        mask: Who may attend to whom; `None` for everybody.
        groups_at_once: Number of key heads, of one batch row, that share a tile;
            `None` for all key heads of all batch rows.
        tile: Rows and columns of a tile, fewer rows where query heads share it; `None`
            for a tile of all scores.
        keeps_halves: Whether what is cut of a half type stays of it.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        mask: Mask | None,
        groups_at_once: int | None,
        tile: int | None,
        keeps_halves: bool = False,
    ):
        self.operand = (lambda x: x) if keeps_halves else at_least_float32
        self.backend = backends.current()
        self.features = self.backend.FEATURES_OF_ROWS
        self.like = query
        self.dtype = dtype_name(at_least_float32(query[:0]))
        self.mask = mask
        self.batch, self.groups, _, self.shared, rows = ops.shape(query)
        self.static_batch = query.shape[0]
        self.one_batch_row = groups_at_once is not None
        self.chunk_batch = 1 if self.one_batch_row else self.batch
        self.chunk_groups = groups_at_once or self.groups
        self.group_chunks = self.groups // self.chunk_groups
        self.batch_chunks = self.batch if self.one_batch_row else 1
        self.chunks = self.batch_chunks * self.group_chunks
        self.lead = (self.chunk_batch, self.chunk_groups)
        # Heads that share a key stand side by side in a tile, with fewer rows each.
        self.rows = cut_in_pieces(
            rows, None if tile is None else max(tile // self.shared, tile // 4)
        )
        self.columns = cut_in_pieces(ops.shape(key)[3], tile)
        sizes = (self.rows.size, self.columns.size)
        self.scores_shape = (*self.lead, self.shared, *sizes)
        self.schedule = schedule(mask, self.rows, self.columns)

    # ------------------------------------------------------------------ loops

    def for_each_row(self, body: Callable, carry: tuple) -> tuple:
        """Runs `carry = body(place, carry)` for every piece of the rows of every chunk
        of heads."""

        def visit_chunk(p, carry):
            batch = (p // self.group_chunks) * self.chunk_batch
            group = (p % self.group_chunks) * self.chunk_groups

            def visit_row(i, carry):
                return body(Place(p, batch, group, i, self.rows.start(i)), carry)

            return self.backend.loop(self.rows.count, visit_row, carry)

        return self.backend.loop(self.chunks, visit_chunk, carry)

    def for_each_tile(
        self,
        row: Place,
        body: Callable,
        carry: tuple,
        goes_on: Callable[[Place, tuple], Tensor] | None = None,
    ) -> tuple:
        """Runs `carry = body(place, allowed, carry)` for the live tiles of these rows,
        where `allowed` are booleans, shaped as scores, or `None` for all pairs.

        With `goes_on(place, carry)` those that are masked and those that are not are
        visited from the nearest on, each up to the first for which it says no, if
        lengths are known.
        """

        def place_of(j):
            return row._replace(j=j, column=self.columns.start(j))

        def visit(j, masked, carry):
            place = place_of(j)
            if not masked:
                return body(place, None, carry)
            allowed = self.allowed(place)
            if not may_be_empty:
                return body(place, allowed, carry)
            return self.backend.either(
                ops.any(allowed), lambda: body(place, allowed, carry), lambda: carry
            )

        plan, overlap = self.schedule, self.rows.may_overlap or self.columns.may_overlap
        # What a mask says is of a whole tile, and not of what is new in it.
        is_sure = is_certain(self.mask) and not (overlap and self.mask is not None)
        may_be_empty = plan is None or not is_sure
        if plan is None:  # lengths are not known yet: look at every tile
            masked = self.mask is not None or overlap
            return self.backend.loop(
                self.columns.count, lambda j, carry: visit(j, masked, carry), carry
            )
        columns, full, live = (self.backend.table(table)[row.i] for table in plan)

        def visit_some(first, count, masked, carry):
            def says_so(n, carry):
                # Asked of the one after the last, too.
                n = shorter(first + n, plan.columns.shape[1] - 1)
                return goes_on(place_of(columns[n]), carry)

            return self.backend.loop(
                count,
                lambda n, carry: visit(columns[first + n], masked, carry),
                carry,
                goes_on and says_so,
            )

        # The masked first: under a causal mask they are the near ones.
        if (plan.live > plan.full).any():
            carry = visit_some(full, live - full, True, carry)
        if plan.full.any():
            carry = visit_some(0, full, False, carry)
        return carry

    # ------------------------------------------------------------------ a tile's parts

    def cut_rows(self, x: Tensor, place: Place) -> Tensor:
        """`(B, K, width, G, T)`, of these rows, as the backend's products take rows."""
        return self.as_rows(self._cut_rows(x, place))

    def as_rows(self, x: Tensor) -> Tensor:
        """`(*lead, width, G, rows)` as the backend's products take and give rows."""
        return x if self.features == 2 else ops.moveaxis(x, 2, self.features)

    def from_rows(self, x: Tensor) -> Tensor:
        """The inverse of `as_rows`."""
        return x if self.features == 2 else ops.moveaxis(x, self.features, 2)

    def cut_numbers(self, x: Tensor, place: Place) -> Tensor:
        """`(B, K, 1, G, T)`, a number a row, `-> (*lead, G, rows)`."""
        return self._cut_rows(x, place)[:, :, 0]

    def _cut_rows(self, x, place):
        starts = (place.batch, place.group, 0, 0, place.row)
        x = ops.slice(x, starts, (*self.lead, *x.shape[2:4], self.rows.size))
        return self.operand(x)

    def new_rows(self, width: int) -> Tensor:
        """Returns zeros as products give rows of a width."""
        shape = [*self.lead, self.shared, self.rows.size]
        shape.insert(self.features, width)
        return ops.zeros(shape, dtype=self.dtype)

    def beside_rows(self, numbers: Tensor) -> Tensor:
        """`(*lead, G, rows)`, a number a row, as rows of width 1."""
        return ops.expand_dims(numbers, self.features)

    def cut_columns(self, x: Tensor, place: Place) -> Tensor:
        """`(B, K, width, S) -> (*lead, width, columns)`, as an operand."""
        starts = (place.batch, place.group, 0, place.column)
        x = ops.slice(x, starts, (*self.lead, x.shape[2], self.columns.size))
        return self.operand(x)

    def cut_key_heads(self, x: Tensor, place: Place) -> Tensor:
        """`(B, K, n)`, numbers of each key head, `-> (*lead, n)`."""
        return ops.slice(x, (place.batch, place.group, 0), (*self.lead, x.shape[2]))

    def cut_heads(self, x: Tensor, place: Place) -> Tensor:
        """`(K, G)`, a number a head, `-> (1, key heads, G, 1)`."""
        x = ops.slice(x, (place.group, 0), (self.chunk_groups, self.shared))
        return ops.cast(x, self.dtype)[None, :, :, None]

    def cut_scores(self, x: Tensor, place: Place) -> Tensor:
        """`(B, K, G, T, S) -> (*lead, G, rows, columns)`; an axis of length 1 stays, to
        broadcast."""
        starts = (place.batch, place.group, 0, place.row, place.column)
        sizes, shape = self.scores_shape, ops.shape(x)
        starts = [
            unless_one(n, start, 0) for n, start in zip(shape, starts, strict=True)
        ]
        sizes = [unless_one(n, size) for n, size in zip(shape, sizes, strict=True)]
        return ops.slice(x, starts, sizes)

    def tile(self, place: Place) -> Tile:
        """Returns the tile as masks know it."""
        batch = place.batch if self.one_batch_row else None
        sizes = self.rows.size, self.columns.size
        return Tile(place.row, sizes[0], place.column, sizes[1], batch=batch)

    def tile_of_heads(self, place: Place) -> Tile:
        """Returns the tile as biases know it, which may differ from head to head."""
        heads = self.chunk_groups * self.shared
        return self.tile(place)._replace(head=place.group * self.shared, heads=heads)

    def allowed(self, place: Place) -> Tensor:
        """Who of a masked tile may attend, in no earlier tile already, as scores."""
        tile = self.tile(place)
        allowed = None
        if self.mask is not None:
            heads = self.groups * self.shared
            block = mask_block(self.mask, tile, self.static_batch, heads)
            allowed = self.block_by_head(block, tile, place)
        for pieces, indices, index in (
            (self.rows, tile.row_indices, place.i),
            (self.columns, tile.column_indices, place.j),
        ):
            if pieces.may_overlap:
                new = indices >= pieces.first_new(index)
                allowed = new if allowed is None else ops.logical_and(allowed, new)
        return allowed

    def repeated_rows(self, row: Place) -> Tensor | None:
        """Which of some rows are of an earlier piece too, `(rows,)`; `None` if none
        can be."""
        if not self.rows.may_overlap:
            return None
        rows = Tile(row.row, self.rows.size, 0, 1).row_indices[:, 0]
        return rows < self.rows.first_new(row.i)

    def bias_block(self, bias: Bias, place: Place) -> Tensor:
        """Returns the numbers of a bias object for a tile, shaped as scores."""
        tile = self.tile_of_heads(place)
        return self.block_by_head(bias.block(tile), tile, place)

    def block_by_head(self, block: Tensor, tile: Tile, place: Place) -> Tensor:
        """Returns what a mask or bias object gave for a tile, shaped as scores."""
        new_axes = (1,) * (4 - len(block.shape))
        block = ops.reshape(block, (*new_axes, *ops.shape(block)))
        if tile.batch is not None and block.shape[0] != 1:
            block = tile.cut_batch(block)  # a mask of the user's own may not know of it
        if block.shape[1] == 1:
            return block[:, None]
        batch, heads, rows, columns = ops.shape(block)
        groups = unless_one(heads, heads // self.shared)
        shared = unless_one(heads, self.shared)
        block = ops.reshape(block, (batch, groups, shared, rows, columns))
        if isinstance(groups, int) and groups == self.chunk_groups:
            return block  # it cut them out, or they are all
        starts = (0, unless_one(heads, place.group, 0), 0, 0, 0)
        chunk = unless_one(heads, self.chunk_groups)
        return ops.slice(block, starts, (batch, chunk, shared, rows, columns))

    def head_index(self, place: Place) -> Tensor:
        """Returns batch row times heads plus head, int32, shaped as scores."""
        batch, group, shared = (
            ops.reshape(ops.arange(size, dtype="int32") + start, shape)
            for size, start, shape in (
                (self.chunk_batch, place.batch, (-1, 1, 1, 1, 1)),
                (self.chunk_groups, place.group, (1, -1, 1, 1, 1)),
                (self.shared, 0, (1, 1, -1, 1, 1)),
            )
        )
        index = (batch * self.groups + group) * self.shared + shared
        return ops.cast(index, "int32")

    # ------------------------------------------------------------------ results

    def row_tiles(self, width: int, dtype: str) -> Any:
        """Returns zeros to put results `(*lead, width, G, rows)` into."""
        shape = (*self.lead, width, self.shared, self.rows.size)
        return self.backend.new_tiles(
            self.chunks * self.rows.count, shape, dtype, self.like
        )

    def column_tiles(self, width: int, dtype: str) -> Any:
        """Returns zeros to add results `(*lead, width, columns)` to."""
        shape = (*self.lead, width, self.columns.size)
        return self.backend.new_tiles(
            self.chunks * self.columns.count, shape, dtype, self.like
        )

    def put_rows(self, tiles: Any, place: Place, x: Tensor) -> Any:
        """Returns the tiles with the result for these rows put in."""
        index = place.chunk * self.rows.count + place.i
        return self.backend.put_tile(tiles, index, self.from_rows(x))

    def add_columns(self, tiles: Any, place: Place, x: Tensor) -> Any:
        """Returns the tiles with something added to these columns."""
        index = place.chunk * self.columns.count + place.j
        return self.backend.add_tile(tiles, index, x)

    def joined_rows(self, tiles: Any) -> Tensor:
        """Returns what was put in as `(B, K, width, G, T)`."""
        tiles = self.backend.stacked(tiles, self.chunks * self.rows.count)
        x = self._chunks_apart(tiles, self.rows.count)
        x = ops.transpose(x, (0, 3, 1, 4, 5, 6, 2, 7))
        return self.rows.joined(self._chunks_together(x))

    def joined_columns(self, tiles: Any) -> Tensor:
        """Returns the sums as `(B, K, width, S)`."""
        tiles = self.backend.stacked(tiles, self.chunks * self.columns.count)
        x = self._chunks_apart(tiles, self.columns.count)
        x = ops.transpose(x, (0, 3, 1, 4, 5, 2, 6))
        return self.columns.joined(self._chunks_together(x))

    def _chunks_apart(self, tiles, pieces):
        """`(chunks * pieces, ...)` with the first axis taken apart."""
        chunks = (self.batch_chunks, self.group_chunks, pieces)
        return ops.reshape(tiles, (*chunks, *ops.shape(tiles)[1:]))

    def _chunks_together(self, x):
        return ops.reshape(x, (self.batch, self.groups, *ops.shape(x)[4:]))

    # Gradients of a bias: a tile of its own for every piece along the axes that it has,
    # one for all along those that it broadcasts. An axis of which a graph learns only
    # when it runs whether it broadcasts is one that it has, until all is joined.

    def score_tiles(self, bias: Tensor, dtype: str) -> Any:
        """Returns zeros to add gradients of a bias `(B, K, G, T, S)` to."""
        count = math.prod(self._score_pieces(bias))
        return self.backend.new_tiles(count, self._score_sizes(bias), dtype, self.like)

    def _score_pieces(self, bias):
        pieces = (
            self.batch_chunks,
            self.group_chunks,
            1,
            self.rows.count,
            self.columns.count,
        )
        return _where_it_varies(bias, pieces)

    def _score_sizes(self, bias):
        return _where_it_varies(bias, self.scores_shape)

    def summed_scores(self, scores: Tensor, bias: Tensor) -> Tensor:
        """Sums a tile of scores over the bias's axes of length 1."""
        axes = tuple(axis for axis in range(5) if bias.shape[axis] == 1)
        return ops.sum(scores, axis=axes, keepdims=True) if axes else scores

    def summed_like(self, scores: Tensor, x: Tensor) -> Tensor:
        """Sums a tile of scores over what `x`, shaped as scores, broadcasts along, and
        may be known to only when a graph runs."""
        return _summed_to(ops.shape(x), self.summed_scores(scores, x))

    def add_scores(self, tiles: Any, place: Place, x: Tensor, bias: Tensor) -> Any:
        """Returns the tiles with what `summed_scores` returned added to one of them."""
        batch, group = place.chunk // self.group_chunks, place.chunk % self.group_chunks
        index = 0
        for axis, (count, number) in enumerate(
            zip(
                self._score_pieces(bias),
                (batch, group, 0, place.i, place.j),
                strict=True,
            )
        ):
            if bias.shape[axis] != 1:
                index = index * count + number
        return self.backend.add_tile(tiles, index, x)

    def joined_scores(self, tiles: Any, bias: Tensor) -> Tensor:
        """Returns the sums in the shape of the bias."""
        pieces, sizes = self._score_pieces(bias), self._score_sizes(bias)
        tiles = self.backend.stacked(tiles, math.prod(pieces))
        x = ops.reshape(tiles, (*pieces, *sizes))
        x = ops.transpose(x, (0, 5, 1, 6, 2, 7, 4, 9, 3, 8))  # rows last
        lead = tuple(map(operator.mul, pieces[:3], sizes[:3]))
        x = ops.reshape(x, (*lead, pieces[4], sizes[4], pieces[3], sizes[3]))
        if bias.shape[3] != 1:
            x = self.rows.joined(x)
        else:
            x = ops.reshape(x, (*lead, pieces[4], sizes[4], 1))
        x = ops.transpose(x, (0, 1, 2, 5, 3, 4))
        if bias.shape[4] != 1:
            x = self.columns.joined(x)
        return ops.reshape(_summed_to(ops.shape(bias), x), ops.shape(bias))


def _summed_to(shape: tuple, x: Tensor) -> Tensor:
    """Sums along the axes that turn out to be of length 1 in `shape`."""
    for axis, length in enumerate(shape):
        if isinstance(length, int):
            continue
        before, (count, *after) = ops.shape(x)[:axis], ops.shape(x)[axis:]
        kept = unless_one(length, count)
        parts = (kept, count // larger(kept, 1))
        x = ops.sum(ops.reshape(x, (*before, *parts, *after)), axis=axis + 1)
    return x


def _where_it_varies(bias: Tensor, lengths: tuple) -> tuple:
    """Returns the lengths, but 1 along the axes that the bias broadcasts."""
    return tuple(
        1 if bias.shape[axis] == 1 else length for axis, length in enumerate(lengths)
    )
