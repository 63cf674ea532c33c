"""Which device has which heads, for `keras.distribution`."""

from typing import Any

import keras

from keras_mha.distribution.heads import KEY_HEADS, QUERY_HEADS, axes_of
from keras_mha.layers import building


def layout_map(
    device_mesh: keras.distribution.DeviceMesh,
    model_axis: str = "model",
    batch_axis: str = "batch",
) -> keras.distribution.LayoutMap:
    """Returns layouts by which devices share the heads of attention layers.

    Every `keras_mha.MultiHeadAttention` that is built under it has its query heads
    (their projection, gate, output projection, sinks and position biases) shared along
    `model_axis`, and its key and value heads too if there are enough of them: where
    they do not divide by the axis, each device has them all. Wherever the layer stands
    and whatever it is called: not by patterns of names, but as it makes its weights.

    It says nothing of other layers, whose weights stay whole: add layouts of your own.

    Args:
        device_mesh: The devices.
        model_axis: Name of the mesh's axis along which heads are shared.
        batch_axis: Name of the axis along which the batch is, for
            `keras.distribution.ModelParallel(batch_dim_name=)`.

    Returns:
        A `keras.distribution.LayoutMap`, to which more can be added. Yours come first.

    Raises:
        TypeError: If `device_mesh` is none.
        ValueError: If the mesh has no axis of these names; when a layer is built, if
            its heads cannot be shared evenly.

    Example:

    >>> devices = keras.distribution.list_devices()
    >>> mesh = keras.distribution.DeviceMesh((2, 4), ["batch", "model"], devices)
    >>> layouts = keras_mha.distribution.layout_map(mesh)
    >>> layouts[".*dense/kernel"] = (None, "model")
    >>> keras.distribution.set_distribution(
    ...     keras.distribution.ModelParallel(
    ...         layout_map=layouts, batch_dim_name="batch"
    ...     )
    ... )

    References:
        Shoeybi et al., 2019, Megatron-LM: https://arxiv.org/abs/1909.08053
    """
    if not isinstance(device_mesh, keras.distribution.DeviceMesh):
        raise TypeError(
            "`device_mesh` must be a keras.distribution.DeviceMesh. Received: "
            f"device_mesh={device_mesh!r} (of type {type(device_mesh).__name__})"
        )
    for name, axis in (("model_axis", model_axis), ("batch_axis", batch_axis)):
        if axis not in device_mesh.axis_names:
            raise ValueError(
                f"`{name}` must be one of the mesh's axes, "
                f"{list(device_mesh.axis_names)}. Received: {name}={axis!r}"
            )
    if model_axis == batch_axis:
        raise ValueError(
            "`model_axis` and `batch_axis` must be two axes of the mesh. "
            f"Received: model_axis={model_axis!r}, batch_axis={batch_axis!r}"
        )
    return _HeadsLayoutMap(device_mesh, model_axis)


class _HeadsLayoutMap(keras.distribution.LayoutMap):
    """Layouts of what is added to it, and of attention layers as they are built."""

    def __init__(self, device_mesh: Any, axis: str):
        super().__init__(device_mesh)
        self._axis = self.heads_axis = axis
        sizes = dict(zip(device_mesh.axis_names, device_mesh.shape, strict=True))
        self._size = sizes[axis]
        # Which heads are shared, by the layer's path: LoRA's and int8's weights come
        # when it is built already.
        self._shared: dict[str, tuple[str, ...]] = {}

    def __getitem__(self, path: str) -> Any:
        if (layer := building.current()) is not None:
            self._note(layer)
        found = super().__getitem__(path)
        return self._of_heads(path) if found is None else found

    def _note(self, layer: Any) -> None:
        key_heads = getattr(layer, "num_key_value_heads", None)
        if key_heads is not None and layer.num_heads % self._size:
            raise ValueError(
                f"`num_heads` must be a multiple of the {self._size} devices along the "
                f"mesh's axis {self._axis!r}, which share the heads: choose another "
                "number of heads, or a mesh with fewer devices along this axis. "
                f"Received: the layer {layer.path!r} with num_heads={layer.num_heads}"
            )
        # A position has one kind of heads: those of queries, or of keys.
        heads = {
            QUERY_HEADS: layer.num_heads,
            KEY_HEADS: key_heads or layer.num_heads,
        }
        self._shared[layer.path] = tuple(
            kind for kind, count in heads.items() if count % self._size == 0
        )

    def _of_heads(self, path: str) -> Any:
        parts = path.split("/")
        for end in range(len(parts) - 1, 0, -1):
            shared = self._shared.get("/".join(parts[:end]))
            if shared is not None:
                kinds = axes_of("/".join(parts[end:])) or ()
                axes = [self._axis if kind in shared else None for kind in kinds]
                if not any(axes):
                    return None
                return keras.distribution.TensorLayout(axes, self.device_mesh)
        return None
