"""What the attention layers of a model attend to, seen while the model runs."""

import fnmatch
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

from keras_mha import _checks
from keras_mha._keras import (
    Tensor,
    all_layers,
    dtype_name,
    is_symbolic,
    losses_kept,
)
from keras_mha.kernels import backends, reference
from keras_mha.kernels.call import AttentionCall
from keras_mha.layers import recording
from keras_mha.layers.multi_head_attention import MultiHeadAttention
from keras_mha.masks import Tile
from keras_mha.ops import planner
from keras_mha.ops.checked_call import checked_call

# How many scores are worked out at a time: 64 MiB of them in float32.
_AT_ONCE = 2**24

# Rows so near are worked out with those between them: a call more takes longer.
_NEAR = 8


def attention_maps(
    model: keras.layers.Layer,
    inputs: Any,
    layers: str | MultiHeadAttention | Iterable[str | MultiHeadAttention] | None = None,
    *,
    heads: int | Sequence[int] | None = None,
    query_rows: int | Sequence[int] | None = None,
    **call_arguments: Any,
) -> dict[str, np.ndarray]:
    """Returns what each attention layer of a model attends to.

    The model is called once, as at inference, and its layers are watched: it is neither
    rebuilt nor compiled anew, and its weights, states, losses and outputs stay what
    they are. A layer attends as it always does; its weights are worked out beside that,
    some rows at a time. (A model that was never called makes its weights first, in a
    call more.)

    Args:
        model: Any Keras model or layer that holds `keras_mha.MultiHeadAttention`,
            however deep. For Keras's own attention layers see
            `keras_mha.interop.convert_model`.
        inputs: What the model is called with.
        layers: Which attention layers: a layer, its name, its path or a pattern of
            paths such as `"decoder/*"`, or several of these. Defaults to all.
        heads: Which heads to return: a number or several; negative ones count from
            the last. Defaults to all.
        query_rows: Which queries to return, as positions in the sequence: a number or
            several. A long sequence has too many scores to hold them all; the rows left
            out are not worked out. Defaults to all.
        **call_arguments: Passed on to the model's call. `training` is `False` unless
            it is given here.

    Returns:
        A dictionary from each layer's path to its attention weights after softmax,
        before dropout, in the order of the calls: NumPy arrays of shape
        `(B, heads, query rows, S)`, float32 (float64 of layers in float64). A second
        call under the same path, of a layer called twice or of another one, is found
        under `"path#2"`, a third under `"path#3"`. Of a layer
        with `attention_axes`, the axes attended over are one, in row-major order, and
        the others are part of the batch. With a cache there is a column for each of
        its slots.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If there is no such layer, head or query, or if a layer runs where
            its numbers cannot be seen: in a function compiled by `jax.jit`,
            `tf.function` or `torch.compile`, or vectorised as by
            `keras.ops.vectorized_map`. (A function compiled before cannot be
            looked into: there a warning names the layers that were not seen.)

    Example:

    >>> inputs = keras.Input((10, 16))
    >>> attention = keras_mha.MultiHeadAttention(2, 8, name="attention")
    >>> model = keras.Model(inputs, attention(inputs, use_causal_mask=True))
    >>> maps = keras_mha.attention_maps(model, keras.random.normal((1, 10, 16)))
    >>> maps["attention"].shape
    (1, 2, 10, 10)
    >>> x = keras.random.normal((1, 10, 16))
    >>> keras_mha.attention_maps(model, x, query_rows=-1)["attention"].shape
    (1, 2, 1, 10)
    """
    return watched(weights_of, model, inputs, layers, heads, query_rows, call_arguments)


def watched(
    of_call: Callable[[AttentionCall, list[int], list[int], int], Any],
    model: keras.layers.Layer,
    inputs: Any,
    layers: Any,
    heads: int | Sequence[int] | None,
    query_rows: int | Sequence[int] | None,
    call_arguments: dict[str, Any],
) -> dict[str, Any]:
    """Calls a model once and returns what is worked out of its layers' attention.

    Args:
        of_call: Takes an attention call, the heads and the rows that are wanted, and
            how many columns in front are those of learned keys.
        model: As the other arguments, see `attention_maps`.
    """
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(
            "`model` must be a Keras model or layer. "
            f"Received: model={model!r} (of type {type(model).__name__})"
        )
    if any(is_symbolic(x) for x in keras.tree.flatten(inputs)):
        raise TypeError(
            "`inputs` must be numbers, not placeholders such as keras.Input. "
            f"Received: inputs={inputs!r}"
        )
    wishes = (
        _checked_layers(layers),
        None if heads is None else _checks.integers("heads", heads),
        None if query_rows is None else _checks.integers("query_rows", query_rows),
    )
    call_arguments = {"training": False, **call_arguments}
    was_built, before = _is_built(model), len(model.weights)
    found = _watched_call(model, inputs, call_arguments, _Watcher(of_call, *wishes))
    if not was_built or len(model.weights) != before:
        # Keras ran it with placeholders, to build it, and weights that are only just
        # being made have no lasting numbers in this call.
        found = _watched_call(model, inputs, call_arguments, _Watcher(of_call, *wishes))
    return found.found_or_raise(model)


def weights_of(
    call: AttentionCall, heads: list[int], rows: list[int], learned: int
) -> np.ndarray:
    """Returns a call's attention weights, `(B, heads, rows, S)`, as layers do: without
    the columns of learned keys; see `watched`."""
    batch, _, _, columns = call.scores_shape
    dtype = "float64" if dtype_name(call.query) == "float64" else "float32"
    weights = np.empty((batch, len(heads), len(rows), columns - learned), dtype)
    done = 0
    for run, tile in tiles_of_rows(call, rows, _AT_ONCE):
        part = reference.attention_weights(call, tile)
        part = keras.ops.convert_to_numpy(part)[:, heads, :, learned:]
        of_tile = [row - tile.row for row in run]
        weights[:, :, done : done + len(run)] = part[:, :, of_tile]
        done += len(run)
    return weights


def tiles_of_rows(
    call: AttentionCall, rows: list[int], at_once: int
) -> Iterator[tuple[list[int], Tile]]:
    """Yields some of the rows at a time and a tile with these and all columns, of about
    so many scores at most."""
    batch, heads, _, columns = call.scores_shape
    most = max(at_once // max(batch * heads * columns, 1), 1)
    for run in _runs(rows, most):
        yield run, Tile(run[0], run[-1] - run[0] + 1, 0, columns)


def _is_built(model: keras.layers.Layer) -> bool:
    return all(layer.built for layer in all_layers(model))


def _watched_call(model, inputs, arguments, watcher) -> "_Watcher":
    with (
        backends.current().without_gradients(),
        losses_kept(model),
        keras.StatelessScope(),  # no variable changes in it
        recording.watching(watcher),
    ):
        model(inputs, **arguments)
    return watcher


class _Watcher:
    """Works out what is wanted of the layers it is told of.

    Nothing is raised in the middle of the model's call, where it could be caught or
    leave something half done.
    """

    def __init__(self, of_call, layers, heads, query_rows):
        self._of_call = of_call
        self._layers, self._heads, self._query_rows = layers, heads, query_rows
        self._paths: list[str] = []
        self._unmatched = list(layers or ())
        self._unseen: list[str] = []
        self._error: Exception | None = None
        self._found: dict[str, Any] = {}

    def __call__(self, layer, query, key, value, **arguments):
        self._paths.append(layer.path)
        calls = self._paths.count(layer.path)
        name = layer.path if calls == 1 else f"{layer.path}#{calls}"
        if self._error is not None or not self._is_wanted(layer, name):
            return
        if not _has_numbers(query):
            self._unseen.append(name)
            return
        try:
            call = checked_call(query, key, value, **arguments)
            planner.plan(call, "reference")  # raises where it would see a part only
            _, heads, rows, _ = call.scores_shape
            chosen = (
                _indices("heads", self._heads, heads, f"layer {name!r}"),
                _indices("query_rows", self._query_rows, rows, f"layer {name!r}"),
            )
            learned = layer._num_memory_key_values or 0
            self._found[name] = self._of_call(call, *chosen, learned)
        except Exception as error:
            self._error = error

    def _is_wanted(self, layer: MultiHeadAttention, name: str) -> bool:
        if self._layers is None:
            return True
        matching = [wish for wish in self._layers if _matches(wish, layer, name)]
        self._unmatched = [x for x in self._unmatched if x not in matching]
        return bool(matching)

    def found_or_raise(self, model: keras.layers.Layer) -> dict[str, Any]:
        """Returns what was worked out, or raises what kept it from being seen."""
        if self._error is not None:
            raise self._error
        if self._unseen:
            raise ValueError(
                "Attention layers of `model` run where their numbers cannot be seen: "
                "in a function compiled by jax.jit, tf.function or torch.compile, or "
                "vectorised as by keras.ops.vectorized_map. "
                f"Received: a model with such layers, {_listed(self._unseen)}"
            )
        if not self._paths:
            raise ValueError(
                "`model` must call a keras_mha.MultiHeadAttention, outside of compiled "
                "functions (for Keras's own layers see "
                "keras_mha.interop.convert_model). "
                f"Received: the {type(model).__name__} {model.name!r}, which calls none"
            )
        if self._unmatched:
            raise ValueError(
                "`layers` must name attention layers that the model calls: "
                f"{_listed(self._paths)}. Received: {_listed(self._unmatched)}"
            )
        self._warn_of_layers_not_called(model)
        return self._found

    def _warn_of_layers_not_called(self, model: keras.layers.Layer) -> None:
        missed = [
            layer.path
            for layer in all_layers(model)
            if isinstance(layer, MultiHeadAttention)
            and layer.path not in self._paths
            and self._is_wanted(layer, layer.path)
        ]
        if missed:
            warnings.warn(
                f"`model` holds attention layers that were not seen: {_listed(missed)}."
                " It did not call them, or only in a compiled function.",
                stacklevel=5,
            )


def _has_numbers(tensor: Tensor) -> bool:
    """Whether a tensor is no placeholder of a compiled or vectorised function."""
    try:
        keras.ops.convert_to_numpy(keras.ops.cast(tensor, "float32"))
    except Exception:  # each backend raises errors of its own kind
        return False
    return True


def _checked_layers(layers: Any) -> list[str | MultiHeadAttention] | None:
    if layers is None:
        return None
    if isinstance(layers, str | keras.layers.Layer) or not isinstance(layers, Iterable):
        layers = [layers]
    layers = list(layers)
    for layer in layers:
        if not isinstance(layer, str | MultiHeadAttention):
            raise TypeError(
                "`layers` must be keras_mha.MultiHeadAttention layers or their names "
                "or paths. "
                f"Received: {layer!r} (of type {type(layer).__name__})"
            )
    return layers


def _matches(wish: Any, layer: MultiHeadAttention, name: str) -> bool:
    if not isinstance(wish, str):
        return wish is layer
    same = wish in (layer.name, layer.path, name)
    return same or fnmatch.fnmatchcase(layer.path, wish)


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(repr(name) for name in names))


def _indices(name: str, wanted: list[int] | None, length: int, where: str) -> list[int]:
    if wanted is None:
        return list(range(length))
    for number in wanted:
        if not -length <= number < length:
            raise ValueError(
                f"`{name}` must be from {-length} to {length - 1} for {where}. "
                f"Received: {name} with {number}"
            )
    return [number % length for number in wanted]


def _runs(rows: list[int], most: int) -> Iterator[list[int]]:
    """Yields rows that follow closely on each other, to be worked out together."""
    start = 0
    for end in range(1, len(rows) + 1):
        follows = end < len(rows) and rows[end - 1] < rows[end] <= rows[end - 1] + _NEAR
        if not follows or rows[end] - rows[start] >= most:
            yield rows[start:end]
            start = end
