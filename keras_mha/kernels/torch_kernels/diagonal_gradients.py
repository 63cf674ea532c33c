"""Gradients of attention with a bias that follows from the distance; see `diagonals`.

The bias's own is `d_logits = weights * (d_output . value - d_output . output)`, summed
along diagonals. Only for keys within reach of a slice's rows it is worked out: beyond,
all that come before share a number, and all that come after. What these get needs no
d_logits: those of a row sum to 0, so that the far keys get what the near ones lack, and
where some are before and some after, those before get

    sum_i w_i * (d_output_i . before_i - d_output_i . output_i)

with `before_i` what attention to them alone gives and `w_i` the sum of their weights.
"""

from typing import NamedTuple

import torch
from torch.nn import functional

from keras_mha._keras import Tensor
from keras_mha.kernels.torch_kernels import flash_cpu

_ROWS = 256  # of a slice, where d_logits are written out


class Scores(NamedTuple):
    """What scores are made of, with the keys in reverse order.

    Args:
        query: Shape `(B, N, T, H)`.
        key: Shape `(B, N, S, H)`.
        value: Shape `(B, N, S, H)`.
        along: The bias along the diagonals, shape `(N, T + S - 1)`: that of row `i` and
            column `j` is number `i + j`.
        scale: Factor of the dot products.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    along: Tensor
    scale: float

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        numbers: Tensor,
        is_causal: bool,
        scale: float,
    ) -> "Scores":
        """Returns those of keys and values as they come, `(B, K, S, H)`, and the bias
        of the distances `-M ... M`, `(N, 2 M + 1)`."""
        shared = query.shape[1] // key.shape[1]
        distances = _distances(query, key)
        along = numbers[:, _places(distances, numbers)]
        if is_causal:
            along = torch.where(distances > 0, -torch.inf, along)
        key, value = (x.flip(2).repeat_interleave(shared, 1) for x in (key, value))
        return cls(query, key, value, along, scale)

    def part(self, heads: slice, rows: slice, columns: slice) -> "Scores":
        """Returns those of some heads, rows and columns."""
        start, end = rows.start + columns.start, rows.stop + columns.stop - 1
        return self._replace(
            query=self.query[:, heads, rows],
            key=self.key[:, heads, columns],
            value=self.value[:, heads, columns],
            along=self.along[heads, start:end],
        )

    def bias(self) -> Tensor:
        """Returns a view of the numbers as `(1, N, T, S)`."""
        return self.along.unfold(1, self.key.shape[2], 1)[None]


def _distances(query, key):
    """Returns key position minus query position along the diagonals."""
    rows, columns = query.shape[2], key.shape[2]
    return torch.arange(columns - 1, -rows, -1, device=query.device)


def _places(distances, numbers):
    """Returns which of the numbers these distances have."""
    most = numbers.shape[1] // 2
    return distances.clamp(-most, most) + most


class Attended(NamedTuple):
    """What attention gave.

    Args:
        output: Shape `(B, N, T, H)`.
        lse: The logarithms of the rows' sums of exponentials, shape `(B, N, T)`.
        output_gradient: Shape `(B, N, T, H)`.
    """

    output: Tensor
    lse: Tensor
    output_gradient: Tensor

    def part(self, heads: slice, rows: slice) -> "Attended":
        """Returns that of some heads and rows."""
        return Attended(*(x[:, heads, rows] for x in self))


class Gradients:
    """Gradients that are added up piece by piece.

    Args:
        scores: All scores.
        attended: What attention gave.
    """

    def __init__(self, scores: Scores, attended: Attended):
        self._scores, self._attended = scores, attended
        self._query, self._key, self._value = (
            torch.zeros_like(x, memory_format=torch.contiguous_format)
            for x in scores[:3]
        )
        self._numbers = None

    def of_inputs(self, tensors: list[Tensor]) -> list[Tensor | None]:
        """Returns those of query, key, value and numbers as `Scores.of` takes them."""
        shared = tensors[0].shape[1] // tensors[1].shape[1]
        key, value = (
            x.unflatten(1, (-1, shared)).sum(2).flip(2)
            for x in (self._key, self._value)
        )
        return [self._query, key, value, self._numbers]

    def add(self, heads: slice, rows: slice, columns: slice) -> None:
        """Adds what some heads, rows and columns give, whose bias is not trained."""
        part = self._scores.part(heads, rows, columns)
        self._add_part((heads, rows, columns), part, part.bias())

    def _add_part(self, place, part, bias, constant=None):
        """Adds what torch's kernel gives for a part with a bias, or with a constant for
        each head."""
        heads, rows, columns = place
        output, lse, output_gradient = self._attended.part(heads, rows)
        if constant is not None:
            lse = lse - constant[:, None]
        given = output_gradient, *part[:3], output, lse, bias, part.scale
        query, key, value = flash_cpu.backward(*given)
        self._query[:, heads, rows] += query
        self._key[:, heads, columns] += key
        self._value[:, heads, columns] += value

    def add_all_with_bias(self, is_causal: bool, numbers: Tensor) -> None:
        """Adds what everything gives, with the gradient of the bias.

        Args:
            is_causal: Whether keys after the query are hidden.
            numbers: The bias of the distances `-M ... M`, `(N, 2 M + 1)`.
        """
        query, key, _, along, _ = self._scores
        rows, columns = query.shape[2], key.shape[2]
        reach = max(numbers.shape[1] // 2, 1)
        near = torch.zeros_like(along)
        first, last = numbers[:, 0], numbers[:, -1]
        before, after = torch.zeros_like(first), torch.zeros_like(last)
        has_before = has_after = False
        for row in range(0, rows, _ROWS):
            here = slice(row, min(row + _ROWS, rows))
            # Of the reversed columns the first are the last keys.
            start = columns - here.stop - (0 if is_causal else reach - 1)
            start = min(max(start, 0), columns)
            end = min(max(columns - 1 - row + reach, start), columns)
            self._add_near(here, slice(start, end), near)
            if start > 0 and not is_causal:
                has_after = True
                self._add_far(here, slice(0, start), last)
            if end < columns:
                has_before = True
                part = self._add_far(here, slice(end, columns), first)
                if not is_causal:
                    before += self._sums_of_far(here, part, first)
        if is_causal and has_before:
            before = -near.sum(1)
        if has_after:
            after = -near.sum(1) - before
        places = _places(_distances(query, key), numbers)
        self._numbers = torch.zeros_like(numbers).index_add_(1, places, near)
        self._numbers[:, 0] += before
        self._numbers[:, -1] += after

    def _add_near(self, rows, columns, sums):
        """Adds what a part gives that is written out, and its d_logits to sums along
        the diagonals."""
        part = self._scores.part(slice(None), rows, columns)
        attended = self._attended.part(slice(None), rows)
        bias, first = part.bias()[0], rows.start + columns.start
        for index in range(part.query.shape[0]):  # so that few numbers are held at once
            query, key, value = (x[index] for x in part[:3])
            output, lse, d_output = (x[index] for x in attended)
            logits = (query * part.scale) @ key.mT + bias
            weights = logits.sub_(lse[..., None]).exp_()
            share = (d_output * output).sum(-1, keepdim=True)
            d_logits = (d_output @ value.mT).sub_(share).mul_(weights)
            self._value[index, :, columns] += weights.mT @ d_output
            self._query[index, :, rows] += d_logits @ key * part.scale
            self._key[index, :, columns] += d_logits.mT @ (query * part.scale)
            along = _sums_along_diagonals(d_logits)
            sums[:, first : first + along.shape[1]] += along

    def _add_far(self, rows, columns, constant):
        """Adds what a part gives that has one bias for each head, and returns it."""
        part = self._scores.part(slice(None), rows, columns)
        self._add_part((slice(None), rows, columns), part, None, constant)
        return part

    def _sums_of_far(self, rows, part, constant):
        """Returns the sum of a far part's d_logits for each head."""
        output, lse, d_output = self._attended.part(slice(None), rows)
        far, far_lse = flash_cpu.forward(*part[:3], None, part.scale)
        weights = torch.exp(far_lse + constant[:, None] - lse)
        return (weights * (d_output * (far - output)).sum(-1)).sum((0, 2))


def _sums_along_diagonals(x):
    """Returns for `(N, rows, columns)` the sums of what has the same row + column."""
    rows, columns = x.shape[1:]
    # Each row one further to the right than the one above: as rows of a number more.
    wide = functional.pad(x, (0, rows)).flatten(1)
    width = columns + rows - 1
    return wide[:, : rows * width].unflatten(1, (rows, width)).sum(1)
