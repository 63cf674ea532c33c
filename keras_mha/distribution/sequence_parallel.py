"""Devices that share the time axis of sequences, for `keras.distribution`, on JAX."""

from typing import Any, Literal

import keras

from keras_mha import _checks
from keras_mha._keras import Shape

Method = Literal["auto", "ring", "all_to_all"]

METHODS = ("auto", "ring", "all_to_all")


class SequenceParallel(keras.distribution.ModelParallel):
    """Has devices share sequences: each has a part of the time axis.

    It is a distribution of Keras's, and a context: while it is set, the data of
    `model.fit` and its like is shared along time (and along the batch, if there is an
    axis for it), and every `keras_mha.MultiHeadAttention` and
    `keras_mha.dot_product_attention` attends over whole sequences with what devices
    send each other. Numbers and gradients are those of one device; what a device holds
    and computes falls with the number of devices. Nothing of it is in a model or its
    file: models run under it and without it.

    - `"ring"`: keys and values go from device to device. For masks such as the causal
      one each device takes an early and a late part of the rows (zigzag), so that all
      have as much to do, and keys go only to who sees any of them.
    - `"all_to_all"`: for attention a device gets whole sequences of some heads, and
      gives them back. It takes heads, of keys too, that divide by the devices.
    - `"auto"`: `"all_to_all"` where heads divide, unless a mask or a bias of T x S
      numbers that all heads share is given, of which a ring needs the device's rows
      only; else `"ring"`.

    Calls that ask for the scores, for rows' sums in a ring, or have talking heads or
    one query token take the way that they take without it, which is right and left to
    JAX's compiler to share; `keras_mha.plan_attention` says so.

    Args:
        device_mesh: The devices.
        axis: Name of the mesh's axis along which sequences are shared.
        batch_axis: Name of the axis along which the batch is shared; `None` for none.
        layout_map: Layouts of weights, on the same mesh. With those of
            `keras_mha.distribution.layout_map` heads are shared too. By default all
            weights are whole on each device.
        method: `"auto"`, `"ring"` or `"all_to_all"`.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If the mesh has no axis of these names, or Keras does not run on
            JAX; in a call, if the sequences cannot be shared evenly, nor, by
            `"all_to_all"`, the heads.

    Example:

    >>> mesh = keras.distribution.DeviceMesh((2, 4), ["batch", "seq"])
    >>> with keras_mha.distribution.SequenceParallel(mesh, "seq", "batch"):
    ...     model = make_model()
    ...     model.compile("adam", "mse")
    ...     model.fit(x, y)

    References:
        Liu et al., 2023, Ring attention: https://arxiv.org/abs/2310.01889
        Brandon et al., 2023, Striped attention (balance under a causal mask):
            https://arxiv.org/abs/2311.09431
        Jacobs et al., 2023, DeepSpeed-Ulysses (all-to-all over heads):
            https://arxiv.org/abs/2309.14509
    """

    def __init__(
        self,
        device_mesh: keras.distribution.DeviceMesh,
        axis: str = "seq",
        batch_axis: str | None = None,
        layout_map: keras.distribution.LayoutMap | None = None,
        method: Method = "auto",
    ):
        _check_backend()
        _check_mesh(device_mesh, axis, batch_axis)
        _check_layout_map(layout_map, device_mesh)
        self._axis, self._method = axis, _checks.choice("method", method, METHODS)
        self._batch_axis = batch_axis
        if layout_map is None:
            layout_map = keras.distribution.LayoutMap(device_mesh)
        # Devices that share heads, where these layouts say so.
        self._heads_axis = getattr(layout_map, "heads_axis", None)
        if self._heads_axis in (axis, batch_axis) and self._heads_axis is not None:
            raise ValueError(
                "`axis`, `batch_axis` and the axis along which `layout_map` shares "
                f"heads must be different axes of the mesh. Received: axis={axis!r}, "
                f"batch_axis={batch_axis!r}, layout_map with {self._heads_axis!r}"
            )
        super().__init__(layout_map=layout_map, batch_dim_name=batch_axis or axis)
        self._batch_dim_name = batch_axis
        self._scopes: list = []

    @property
    def axis(self) -> str:
        """Name of the mesh's axis along which sequences are shared."""
        return self._axis

    @property
    def batch_axis(self) -> str | None:
        """Name of the axis along which the batch is shared."""
        return self._batch_axis

    @property
    def heads_axis(self) -> str | None:
        """Name of the axis along which the layouts share heads."""
        return self._heads_axis

    @property
    def method(self) -> str:
        """What was asked for: `"auto"`, `"ring"` or `"all_to_all"`."""
        return self._method

    @property
    def num_model_replicas(self) -> int:
        """How many parts the batch has."""
        return self.size(self._batch_axis)

    def size(self, axis: str | None) -> int:
        """Returns the number of devices along an axis of the mesh; 1 for `None`."""
        if axis is None:
            return 1
        return self.device_mesh.shape[self.device_mesh.axis_names.index(axis)]

    def get_data_layout(self, data_shape: Shape) -> keras.distribution.TensorLayout:
        """Returns how data is shared: the first axis as the batch, the second as time,
        where their lengths divide by the devices."""
        # A process brings its part of the batch, and has it whole along time.
        time = None if self._is_multi_process else self._axis
        names = (self._batch_axis, time)[: len(data_shape)]
        axes = [
            name if length % self.size(name) == 0 else None
            for name, length in zip(names, data_shape, strict=False)
        ]
        axes += [None] * (len(data_shape) - len(axes))
        return keras.distribution.TensorLayout(axes, self.device_mesh)

    def __enter__(self) -> "SequenceParallel":
        """Sets it as the distribution of Keras."""
        self._scopes.append(self.scope())
        self._scopes[-1].__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Sets the distribution again that was set before."""
        self._scopes.pop().__exit__(*error)


def current() -> SequenceParallel | None:
    """Returns the one that is set, if any is."""
    distribution = keras.distribution.distribution()
    return distribution if isinstance(distribution, SequenceParallel) else None


def _check_backend() -> None:
    backend = keras.backend.backend()
    if backend != "jax":
        raise ValueError(
            "SequenceParallel runs on the JAX backend: set the environment variable "
            "KERAS_BACKEND to 'jax' before Keras is imported (on PyTorch, "
            "torch.distributed's context_parallel shares sequences). "
            f"Received: the backend {backend!r}"
        )


def _check_mesh(device_mesh: Any, axis: Any, batch_axis: Any) -> None:
    if not isinstance(device_mesh, keras.distribution.DeviceMesh):
        raise TypeError(
            "`device_mesh` must be a keras.distribution.DeviceMesh. Received: "
            f"device_mesh={device_mesh!r} (of type {type(device_mesh).__name__})"
        )
    names = list(device_mesh.axis_names)
    for name, value in (("axis", axis), ("batch_axis", batch_axis)):
        if value not in names and not (name == "batch_axis" and value is None):
            raise ValueError(
                f"`{name}` must be one of the mesh's axes, {names}: name one of them, "
                "or make a mesh that has one of this name. "
                f"Received: {name}={value!r}"
            )
    if axis == batch_axis:
        raise ValueError(
            "`axis` and `batch_axis` must be two axes of the mesh. "
            f"Received: axis={axis!r}, batch_axis={batch_axis!r}"
        )


def _check_layout_map(layout_map: Any, device_mesh: Any) -> None:
    if layout_map is None:
        return
    if not isinstance(layout_map, keras.distribution.LayoutMap):
        raise TypeError(
            "`layout_map` must be a keras.distribution.LayoutMap. Received: "
            f"layout_map={layout_map!r} (of type {type(layout_map).__name__})"
        )
    if layout_map.device_mesh is not device_mesh:
        raise ValueError(
            "`layout_map` must be made for the same mesh as `device_mesh`. Received: "
            f"{layout_map.device_mesh} and {device_mesh}"
        )
