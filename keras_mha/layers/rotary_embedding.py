"""Rotary position embedding as a Keras layer."""

import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_mha import _checks
from keras_mha._keras import (
    Shape,
    Tensor,
    at_least_float32,
    dtype_name,
    is_float,
    larger,
    told_as_it_is,
)
from keras_mha.layers.coordinates import checked_coordinates
from keras_mha.layers.position_ids import check_countable, checked_ids
from keras_mha.layers.rotary_axes import (
    axial_frequencies,
    axial_slow_down,
    checked_axes,
    sections_of,
)
from keras_mha.layers.rotary_scaling import checked_scaling
from keras_mha.layers.sharing import Shareable
from keras_mha.ops.tensors import known_numbers


@keras.saving.register_keras_serializable(package="keras_mha")
class RotaryEmbedding(Shareable):
    """Rotates pairs of features of queries and keys by where they stand.

        angle_i = position * max_wavelength^(-2i / rotary_dim)
        (x, y)  = (x cos(angle_i) - y sin(angle_i), y cos(angle_i) + x sin(angle_i))

    for pair i, so that the dot product of a query and a key depends on how far they
    stand apart, not on where. Given to a `MultiHeadAttention` as `position=`, it is
    applied to the heads of query and key; it can also be called alone. Angles are
    worked out in float32, correct to 1e-6 at any position, in half types too. (There is
    one exception: with `"dynamic"` scaling in a compiled program that is not told the
    length, angles beyond the trained length are as exact as the product of position and
    frequency is in float32, to 3e-2 at position 1,000,000.)

    With several `axes` (2 for images, 3 for video) a token has a position along each,
    and each pair of features turns by one of them (axial rotary embedding): the first
    pairs by that along the first axis. Attention over as many axes (`attention_axes`)
    counts along them; tokens in one row, such as flattened patches, take
    `position_ids`. (For pairs that turn by several positions at once, see
    `MixedRotaryEmbedding`.)

    Args:
        rotary_dim: How many features rotate, an even number, counted from the first;
            the others pass through. Defaults to all.
        interleaved: `False` pairs feature i with feature `i + rotary_dim / 2`
            (GPT-NeoX, Llama), `True` pairs 2i with 2i + 1 (RoFormer, GPT-J).
        max_wavelength: The base of the frequencies.
        scaling: For texts longer than those of the training, a dictionary as Hugging
            Face's configurations have it (`rope_scaling`): with the key `"rope_type"`,
            one of `"linear"`, `"dynamic"` (NTK), `"yarn"` and `"llama3"`, and the keys
            that belong to it. Defaults to `None`. `"dynamic"` takes for the length
            the furthest position along any axis.
        axes: Number of axes that positions have. Defaults to 1.
        sections: How many pairs of features turn by the position along each axis; they
            add up to `rotary_dim / 2`. Defaults to an equal share for each axis.
        shared_frequencies: `False` gives each axis a sequence of frequencies of its
            own, with its share of the pairs for `rotary_dim` in the formula (the axial
            form of vision transformers). `True` numbers the pairs through all axes, so
            that they divide one sequence among them, as Qwen2-VL's M-RoPE does, with
            its `mrope_section` for `sections`.
        **kwargs: `name` and `dtype`, as for any Keras layer.

    Call arguments:
        inputs: Heads of queries or keys, floating point, shape `(B, T, N, H)`.
        position_ids: Whole numbers of shape `(T,)` or `(B, T)`. Defaults to
            `0 ... T - 1`. With several axes `(T, axes)` or `(B, T, axes)`, and
            without default.

    Returns:
        A tensor of the shape of `inputs`, in the layer's compute dtype.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If `rotary_dim` is odd or more than there are features, `scaling`
            lacks a key, or the pairs of features cannot be shared among the axes so.

    Example:

    >>> rotary = keras_mha.RotaryEmbedding()
    >>> layer = keras_mha.MultiHeadAttention(8, key_dim=64, position=rotary)
    >>> rotary(keras.random.normal((2, 10, 8, 64))).shape
    (2, 10, 8, 64)

    Attention over the rows and columns of images, in patches:

    >>> rotary = keras_mha.RotaryEmbedding(axes=2)
    >>> layer = keras_mha.MultiHeadAttention(8, key_dim=64, position=rotary)
    >>> layer(keras.random.normal((2, 14, 14, 512))).shape
    (2, 14, 14, 512)

    References:
        Su et al., 2021, RoFormer: https://arxiv.org/abs/2104.09864
        Chen et al., 2023, "linear": https://arxiv.org/abs/2306.15595
        Peng et al., 2023, "dynamic" (its section 3.3) and "yarn":
            https://arxiv.org/abs/2309.00071
        Llama Team, 2024, "llama3": https://arxiv.org/abs/2407.21783
        Heo et al., 2024, Rotary position embedding for vision transformer (axial):
            https://arxiv.org/abs/2403.13298
        Wang et al., 2024, Qwen2-VL (`sections`, `shared_frequencies`):
            https://arxiv.org/abs/2409.12191
    """

    def __init__(
        self,
        rotary_dim: int | None = None,
        interleaved: bool = False,
        max_wavelength: float = 10_000.0,
        scaling: dict[str, Any] | None = None,
        axes: int | None = None,
        sections: tuple[int, ...] | None = None,
        shared_frequencies: bool = False,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.rotary_dim = None
        if rotary_dim is not None:
            self.rotary_dim = _checks.positive_integer("rotary_dim", rotary_dim)
            _require_even("rotary_dim", self.rotary_dim)
        self.interleaved = _checks.boolean("interleaved", interleaved)
        self.max_wavelength = _checks.number("max_wavelength", max_wavelength)
        if self.max_wavelength <= 1:
            raise ValueError(
                "`max_wavelength` must be above 1. "
                f"Received: max_wavelength={max_wavelength}"
            )
        self._scaling = checked_scaling(scaling)
        self.axes, self.sections = checked_axes(axes, sections)
        self.shared_frequencies = _checks.boolean(
            "shared_frequencies", shared_frequencies
        )
        if self.rotary_dim is not None:
            self._sections(self.rotary_dim)
        self._known_frequencies = (None,)
        self.built = True  # it has no weights

    @property
    def scaling(self) -> dict[str, Any] | None:
        """The scaling, with its kind under `"rope_type"`."""
        return None if self._scaling is None else dict(self._scaling)

    @property
    def depends_on_length(self) -> bool:
        """Whether a longer text changes how far earlier positions are rotated."""
        return self._scaling is not None and self._scaling["rope_type"] == "dynamic"

    def check_width(self, width: int) -> None:
        """Raises a `ValueError` unless heads of this width can be rotated."""
        if self.rotary_dim is None:
            _require_even("the width of a head (key_dim), all of which rotates,", width)
        elif self.rotary_dim > width:
            raise ValueError(
                "`rotary_dim` must be at most the width of a head (key_dim). "
                f"Received: rotary_dim={self.rotary_dim}, width {width}"
            )
        self._sections(self.rotary_dim or width)

    _turns_heads_alike = True  # a subclass may not

    def set_heads(self, num_heads: int) -> None:
        """Takes note of the number of key heads, where it matters."""

    def _sections(self, width: int) -> tuple[int, ...]:
        return sections_of(width, self.axes, self.sections)

    @told_as_it_is
    def call(self, inputs: Tensor, position_ids: Tensor | None = None) -> Tensor:
        self._check_inputs(inputs)
        return self.rotate(inputs, self._checked_ids(inputs, position_ids))

    @told_as_it_is
    def compute_output_spec(
        self, inputs: Tensor, position_ids: Tensor | None = None
    ) -> keras.KerasTensor:
        self._check_inputs(inputs)
        if self.axes > 1:
            self._checked_ids(inputs, position_ids)
        return keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)

    def _check_inputs(self, inputs: Tensor) -> None:
        shape = inputs.shape
        if not is_float(inputs):
            raise TypeError(
                "`inputs` must hold floating-point numbers. "
                f"Received: inputs of dtype {dtype_name(inputs)}"
            )
        if len(shape) != 4:
            raise ValueError(
                "`inputs` must have the shape (B, T, N, H): batch, positions, heads, "
                f"width. Received: inputs of shape {tuple(shape)}"
            )
        self.check_width(shape[-1])

    def _checked_ids(self, inputs, position_ids):
        """Position ids with a batch axis, or `None` for those that are counted."""
        if position_ids is None and self.axes == 1:
            return None
        shape, name = tuple(inputs.shape[:2]), "position_ids"
        if self.axes == 1:
            ids = checked_ids(name, position_ids, shape)
            return ids[None] if len(ids.shape) == 1 else ids
        if position_ids is None:
            raise ValueError(
                f"`position_ids` must be given, with the shape {(shape[1], self.axes)} "
                f"or {(*shape, self.axes)}, since there are {self.axes} axes and no "
                "telling where along them the inputs stand. Received: position_ids=None"
            )
        ids = checked_coordinates(name, position_ids, shape, (1,), self.axes)
        return ids[None] if len(ids.shape) == 2 else ids

    def rotate(self, heads: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Rotates heads `(B, T, N, H)`, which keep their dtype.

        Args:
            heads: Of queries or keys.
            position_ids: Shape `(B, T)` or `(1, T)`; `None` for `0 ... T - 1`. With
                several axes `(B, T, axes)` or `(1, T, axes)`, never `None`.
        """
        length = self._length((heads, position_ids))
        return self._rotated(heads, *self._cos_and_sin(heads, position_ids, length))

    def rotate_both(
        self,
        query: Tensor,
        key: Tensor,
        query_ids: Tensor | None = None,
        key_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Rotates the heads of queries and keys, by the same frequencies.

        Args:
            query: Shape `(B, T, N, H)`.
            key: Shape `(B, S, K, H)`.
            query_ids: Shape `(B, T)` or `(1, T)`; `None` for `0 ... T - 1`.
            key_ids: Shape `(B, S)` or `(1, S)`; `None` for `0 ... S - 1`. With several
                axes both have a last axis of that many, and are never `None`.
        """
        lengths = query.shape[1], key.shape[1]
        alike = query_ids is key_ids and lengths[0] == lengths[1] is not None
        alike = alike and (self._turns_heads_alike or query.shape[2] == key.shape[2])
        length = self._length((query, query_ids), (key, key_ids))
        turn = self._cos_and_sin(query, query_ids, length)
        query = self._rotated(query, *turn)
        if not alike:
            turn = self._cos_and_sin(key, key_ids, length)
        return query, self._rotated(key, *turn)

    def _length(self, *sides: tuple[Tensor, Tensor | None]) -> Any:
        """Returns how long the texts are, if anything depends on that.

        Args:
            *sides: Heads and their position ids.

        Returns:
            A list of integers, one or one for each row, where they are known now; else
            a tensor `(B or 1,)`; `None` if nothing depends on it.
        """
        if not self.depends_on_length:
            return None
        counts = [heads.shape[1] for heads, ids in sides if ids is None]
        if len(counts) == len(sides) and all(isinstance(n, int) for n in counts):
            return [max(counts)]
        length = None
        for heads, ids in sides:
            ids = _counted(heads) if ids is None else ids
            if any(isinstance(n, int) and n == 0 for n in ids.shape):
                continue  # there is no last one
            last = ops.max(ids, axis=tuple(range(1, len(ids.shape)))) + 1
            length = last if length is None else larger(length, last)
        if length is None:
            return None
        known = known_numbers(length)
        return length if known is None else known.tolist()

    def _rotated(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        dtype, width = heads.dtype, self.rotary_dim or heads.shape[-1]
        x = at_least_float32(heads[..., :width])
        cos, sin = ops.cast(cos, x.dtype), ops.cast(sin, x.dtype)
        if self.interleaved:
            first, second = x[..., ::2], x[..., 1::2]
        else:
            first, second = x[..., : width // 2], x[..., width // 2 :]
        rotated = (first * cos - second * sin, second * cos + first * sin)
        if self.interleaved:
            x = ops.reshape(ops.stack(rotated, axis=-1), ops.shape(x))
        else:
            x = ops.concatenate(rotated, axis=-1)
        x = ops.cast(x, dtype)
        if width == heads.shape[-1]:
            return x
        return ops.concatenate([x, heads[..., width:]], axis=-1)

    def _cos_and_sin(self, heads, position_ids, length):
        """Cosine and sine of the angles, float32, shape `(B or 1, T, 1, width / 2)`."""
        width = self.rotary_dim or int(heads.shape[-1])  # a tensor in TorchScript
        ids = _counted(heads) if position_ids is None else position_ids
        ids = self._of_pairs(ids, width)
        radians, factor = self._frequencies(width)
        if length is None:
            angles = _angles(ids, radians)
        elif isinstance(length, list):
            found = {each: self._slowed(radians, width, each) for each in set(length)}
            angles = _angles(ids, [[found[each]] for each in length])
        else:
            angles = self._angles_of_lengths(ids, radians, width, length)
        angles = angles[:, :, None, :]
        return ops.cos(angles) * factor, ops.sin(angles) * factor

    def _of_pairs(self, position_ids, width):
        """Where a token stands for each pair, `(B or 1, T, 1 or pairs)`."""
        if self.axes == 1:
            return position_ids[..., None]
        lead = ops.shape(position_ids)[:-1]
        return ops.concatenate(
            [
                ops.broadcast_to(position_ids[..., axis : axis + 1], (*lead, pairs))
                for axis, pairs in enumerate(self._sections(width))
            ],
            axis=-1,
        )

    def _frequencies(self, width):
        if self._known_frequencies[0] != width:
            radians, factor = axial_frequencies(
                self._sections(width),
                self.shared_frequencies,
                self.max_wavelength,
                self._scaling,
            )
            self._known_frequencies = width, tuple(radians), factor
        return self._known_frequencies[1:]

    def _slowed(self, radians, width, length):
        """Returns the frequencies for a text of this length, a number."""
        stretch = self._stretch(max(length, self._trained_length))
        exponents = self._exponents(width)
        return [x * stretch**-y for x, y in zip(radians, exponents, strict=True)]

    def _angles_of_lengths(self, position_ids, radians, width, length):
        """Returns the angles in texts whose lengths `(B or 1,)` are known later."""
        length = ops.cast(length, "float32")
        exponents = ops.convert_to_tensor(self._exponents(width), dtype="float32")
        stretch = self._stretch(ops.maximum(length, self._trained_length))
        slower = ops.exp(-exponents * ops.log(stretch)[:, None])[:, None]
        slower = slower * ops.convert_to_tensor(radians, dtype="float32")
        return ops.where(
            (length <= self._trained_length)[:, None, None],
            _angles(position_ids, radians),
            ops.cast(position_ids, "float32") * slower,
        )

    def _exponents(self, width):
        return axial_slow_down(self._sections(width), self.shared_frequencies)

    def _stretch(self, length):
        factor = self._scaling["factor"]
        return factor * length / self._trained_length - (factor - 1.0)

    @property
    def _trained_length(self) -> float:
        return self._scaling["original_max_position_embeddings"]

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """Returns the shape of the inputs."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, for `from_config`."""
        config = {
            **super().get_config(),
            "rotary_dim": self.rotary_dim,
            "interleaved": self.interleaved,
            "max_wavelength": self.max_wavelength,
            "scaling": self.scaling,
        }
        if self.axes == 1:
            return config  # as it was before there were axes
        return {
            **config,
            "axes": self.axes,
            "sections": self.sections,
            "shared_frequencies": self.shared_frequencies,
        }


def _counted(heads: Tensor) -> Tensor:
    check_countable()
    # With a start, which jax2onnx does not do without.
    return ops.arange(0, ops.shape(heads)[1], dtype="int32")[None]


def _angles(position_ids: Tensor, radians: Sequence) -> Tensor:
    """Position times frequency, without whole turns, float32, `(B or 1, T, pairs)`.

    Far from 0 the product is too large for float32. In units of 2^-32 of a turn whole
    turns are what 32-bit integers drop by themselves, so that the product with the
    frequency's whole units is exact, and what is left of the frequency is small.

    Args:
        position_ids: Whole numbers of shape `(B or 1, T, 1 or pairs)`.
        radians: Frequencies as lists of floats, shape `(pairs,)` or `(rows, 1, pairs)`.
    """
    whole, rest = _whole_and_rest(radians)
    whole = ops.convert_to_tensor(whole, dtype="int32")
    rest = ops.convert_to_tensor(rest, dtype="float32")
    position_ids = ops.cast(position_ids, "int32")
    units = ops.cast(position_ids * whole, "float32")
    units = units + ops.cast(position_ids, "float32") * rest
    return units * (2 * math.pi / 2**32)


def _whole_and_rest(radians: Any) -> tuple[Any, Any]:
    """Splits frequencies into whole units, as int32 has them, and what is left."""
    if isinstance(radians, list | tuple):
        parts = [_whole_and_rest(each) for each in radians]
        return [whole for whole, _ in parts], [rest for _, rest in parts]
    units = radians / (2 * math.pi) * 2.0**32
    whole = round(units)
    return (whole + 2**31) % 2**32 - 2**31, units - whole


def _require_even(name: str, width: int) -> None:
    if width % 2:
        raise ValueError(
            f"`rotary_dim` must be even, since features rotate in pairs. Received: "
            f"{name} = {width}"
        )
