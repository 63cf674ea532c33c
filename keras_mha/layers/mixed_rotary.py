"""Rotary position embedding by learned frequencies, mixed of several axes."""

from typing import Any

import keras
from keras import ops

from keras_mha import _checks
from keras_mha._keras import Shape, told_as_it_is
from keras_mha.layers.building import building
from keras_mha.layers.rotary_axes import axial_frequencies, sections_of
from keras_mha.layers.rotary_embedding import RotaryEmbedding
from keras_mha.ops.tensors import constant


@keras.saving.register_keras_serializable(package="keras_mha")
class MixedRotaryEmbedding(RotaryEmbedding):
    """Rotates pairs of features by positions along all axes at once (RoPE-Mixed).

        angle_ni = sum over axes a of position_a * frequency_ani

    for head n and pair i, with learned frequencies: a pair can turn along diagonals,
    where each pair of a `RotaryEmbedding` turns along one axis. They begin as those of
    `RotaryEmbedding(axes=axes)` in directions that are turned at random, other ones for
    each head. Angles are as exact as a product in float32 is, which is enough for the
    positions of images and not for far ones.

    Args:
        num_heads: Number of key heads, K, each with frequencies of its own. Query heads
            that share a key head turn by its frequencies. Defaults to that of the
            `MultiHeadAttention` that it is given to as `position=`.
        axes: Number of axes that positions have, at least 2.
        rotary_dim: How many features rotate, an even number, counted from the first;
            the others pass through. Defaults to all.
        interleaved: As in `RotaryEmbedding`.
        max_wavelength: The base of the initial frequencies.
        **kwargs: `name`, `dtype` and `trainable`, as for any Keras layer.

    Call arguments:
        inputs: Heads of queries or keys, floating point, shape `(B, T, N, H)`.
        position_ids: Whole numbers of shape `(T, axes)` or `(B, T, axes)`.

    Returns:
        A tensor of the shape of `inputs`, in the layer's compute dtype.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If the pairs of features cannot be shared evenly among the axes to
            begin with, or heads are not those that the frequencies were made for.

    Example:

    >>> position = keras_mha.MixedRotaryEmbedding()
    >>> layer = keras_mha.MultiHeadAttention(8, key_dim=64, position=position)
    >>> layer(keras.random.normal((2, 14, 14, 512))).shape
    (2, 14, 14, 512)
    >>> position.frequencies.shape
    (2, 8, 32)

    References:
        Heo et al., 2024, Rotary position embedding for vision transformer:
            https://arxiv.org/abs/2403.13298
    """

    _turns_heads_alike = False

    def __init__(
        self,
        num_heads: int | None = None,
        axes: int = 2,
        rotary_dim: int | None = None,
        interleaved: bool = False,
        max_wavelength: float = 10.0,
        **kwargs: Any,
    ):
        axes = _checks.integer("axes", axes, minimum=2)
        super().__init__(rotary_dim, interleaved, max_wavelength, axes=axes, **kwargs)
        if num_heads is not None:
            num_heads = _checks.positive_integer("num_heads", num_heads)
        self.num_heads, self._width = num_heads, None
        self.built = False

    def set_heads(self, num_heads: int) -> None:
        if self.num_heads not in (None, num_heads):
            raise ValueError(
                "`num_heads` of MixedRotaryEmbedding must be the number of key heads "
                "of the layer that it is given to. "
                f"Received: num_heads={self.num_heads} and {num_heads}"
            )
        self.num_heads = num_heads

    def check_width(self, width: int) -> None:
        super().check_width(width)
        width = self.rotary_dim or int(width)
        if self._width not in (None, width):
            raise ValueError(
                "A MixedRotaryEmbedding has frequencies for heads of one width "
                f"(key_dim). Received: heads of width {width}, after {self._width}"
            )
        self._width = width

    @told_as_it_is
    def build(
        self,
        inputs_shape: Shape | None = None,
        position_ids_shape: Shape | None = None,
    ) -> None:
        """Makes the frequencies, of the heads' number and width."""
        if inputs_shape is not None:
            self.num_heads = self.num_heads or inputs_shape[2]
            self.check_width(inputs_shape[-1])
        with building(self):
            self.frequencies = self.add_weight(
                name="frequencies",
                shape=(self.axes, self.num_heads, self._width // 2),
                initializer=self._initial_frequencies,
                autocast=False,  # it keeps its precision under a mixed policy
            )
        self.built = True

    def get_build_config(self) -> dict[str, Any] | None:
        """Returns the heads' shape, by which `build_from_config` builds the layer."""
        if not self.built:
            return None
        return {"input_shape": (None, None, self.num_heads, self._width)}

    def _initial_frequencies(self, shape, dtype=None):
        """Axial ones, in the directions of axes that are turned at random."""
        axes, heads, _ = shape
        sections = sections_of(self._width, axes, None)
        radians, _ = axial_frequencies(sections, False, self.max_wavelength, None)
        turned, _ = ops.qr(keras.random.normal((heads, axes, axes), dtype="float32"))
        # One axis of the turned ones for each of the pairs.
        directions = ops.repeat(turned, sections[0], axis=-1)
        radians = constant(tuple(radians), "float32")
        return ops.cast(ops.transpose(directions, (1, 0, 2)) * radians, dtype)

    def _check_inputs(self, inputs):
        super()._check_inputs(inputs)
        heads = inputs.shape[2]
        if self.num_heads is not None and heads % self.num_heads:
            raise ValueError(
                f"`inputs` must have {self.num_heads} heads, as there are frequencies, "
                "or a multiple of that. "
                f"Received: inputs of shape {tuple(inputs.shape)}"
            )

    def _cos_and_sin(self, heads, position_ids, length):
        """Cosine and sine of the angles, float32, `(B or 1, T, N, width / 2)`."""
        frequencies = ops.convert_to_tensor(self.frequencies)
        shared_by = heads.shape[2] // self.num_heads
        if shared_by > 1:
            frequencies = ops.repeat(frequencies, shared_by, axis=1)
        ids = ops.cast(position_ids, "float32")[..., None, None]
        # No matrix product, which accelerators may round more than positions bear.
        angles = sum(ids[:, :, axis] * frequencies[axis] for axis in range(self.axes))
        return ops.cos(angles), ops.sin(angles)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, for `from_config`."""
        config = super().get_config()
        for name in ("scaling", "sections", "shared_frequencies"):
            del config[name]
        return {**config, "num_heads": self.num_heads}
