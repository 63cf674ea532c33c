"""What this package needs of Keras and Keras does not export, in one place."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

try:
    import keras
except ModuleNotFoundError as error:
    if error.name == "keras":
        raise
    raise ImportError(
        f"Keras is set to a backend that is not installed: there is no module named "
        f"{error.name!r}. Install it (the extras of keras-mha are named after the "
        "backends), or set the environment variable KERAS_BACKEND to one that is "
        "installed."
    ) from error

# Keras keeps the mask of a tensor that takes no attributes (a JAX array) in a table of
# its own, which only these two reach.
from keras.src.backend import get_keras_mask, set_keras_mask

# Where Keras notes which objects several layers share, while it writes a model, and
# which layer's call runs.
from keras.src.backend.common.global_state import get_global_attribute

# Whether Keras runs a layer on placeholders, to find out what shapes come of it.
from keras.src.backend.common.symbolic_scope import in_symbolic_scope

# Under which a `keras.Variable` gives its numbers in the compute dtype of a layer.
from keras.src.backend.common.variables import AutocastScope, get_autocast_scope

# What Keras's own random functions make of a seed: an int, a generator or None.
from keras.src.random.seed_generator import draw_seed

_NOTED = "shared_objects/id_to_config_map"

Tensor: TypeAlias = Any
"""A tensor of the current backend, a NumPy array or a `keras.KerasTensor`."""

Shape: TypeAlias = tuple[int | None, ...]
"""A tensor's shape; `None` where a length is not known yet."""


def is_symbolic(x: object) -> bool:
    """Whether `x` is a placeholder of a Functional model under construction."""
    return isinstance(x, keras.KerasTensor)


_dtype_names: dict[Any, str] = {}  # that Keras has told: it looks at each dtype anew


def dtype_name(x: Tensor) -> str:
    """Returns the dtype of `x` as Keras spells it, such as `"float32"`."""
    dtype = x.dtype
    name = _dtype_names.get(dtype)
    if name is None:
        name = _dtype_names[dtype] = keras.backend.standardize_dtype(dtype)
    return name


def is_float(x: Tensor) -> bool:
    """Whether `x` holds floating-point numbers."""
    return "float" in dtype_name(x)


def to_tensor(value: Any) -> Tensor:
    """Returns `value` as a tensor, whose numbers are whole, or booleans, if they were.

    With `set_floatx("bfloat16")` Keras makes floats of all of them on JAX:
    https://github.com/keras-team/keras/issues/23679
    """
    tensor = keras.ops.convert_to_tensor(value)
    if not is_float(tensor):
        return tensor
    if hasattr(value, "dtype"):
        kinds = {dtype_name(value)}
    else:
        kinds = {type(number).__name__ for number in keras.tree.flatten(value)}
    if kinds == {"bool"}:
        return keras.ops.convert_to_tensor(value, dtype="bool")
    if kinds and all("int" in kind for kind in kinds):
        return keras.ops.convert_to_tensor(value, dtype="int32")
    return tensor


def larger(x: Tensor, y: Tensor | float) -> Tensor:
    """Returns the larger of two numbers, in the dtype of `x`.

    `ops.maximum` makes float32 of float64 on torch, and of whole numbers on JAX with
    `set_floatx("bfloat16")`.
    """
    return keras.ops.where(x > y, x, y)


def smaller(x: Tensor, y: Tensor | float) -> Tensor:
    """Returns the smaller of two numbers; see `larger`."""
    return keras.ops.where(x < y, x, y)


def as_tensor(value: Any) -> Tensor | None:
    """Returns `value` as a tensor, or `None` if it is no tensor of numbers."""
    if value is None:
        return None
    try:
        tensor = to_tensor(value)
    except Exception:  # each backend raises errors of its own kind
        return None
    is_number = is_float(tensor) or is_integer(tensor) or dtype_name(tensor) == "bool"
    return tensor if is_number else None


def at_least_float32(x: Tensor) -> Tensor:
    """Casts float16 and bfloat16 to float32 and leaves float32 and float64 alone."""
    half = dtype_name(x) in ("float16", "bfloat16")
    return keras.ops.cast(x, "float32") if half else x


def is_integer(x: Tensor) -> bool:
    """Whether `x` holds whole numbers (booleans do not count)."""
    return "int" in dtype_name(x)


def without_autocast() -> contextlib.AbstractContextManager:
    """Lets variables keep their precision inside a layer under a mixed policy."""
    if get_autocast_scope() is None:
        return contextlib.nullcontext()
    return AutocastScope(None)


def convert_no_inputs(layer: keras.layers.Layer) -> None:
    """Has Keras leave alone what a layer is called with."""
    layer._convert_input_args = False


def told_as_it_is(method: Callable) -> Callable:
    """Keeps Keras from wrapping the errors that this package raises in a method.

    Keras would put them into the middle of a list of all arguments. The errors of
    others (the layers and operations that the method calls) it wraps as ever.

    Args:
        method: `call`, `compute_output_spec` or `build` of a layer.
    """

    @functools.wraps(method)
    def with_plain_errors(self, *args, **kwargs):
        try:
            return method(self, *args, **kwargs)
        except Exception as error:
            is_told = hasattr(error, "_keras_call_info_injected")
            if not is_told and _is_our_own(error):
                error._keras_call_info_injected = True
                error.add_note(f"In {self.name!r} ({type(self).__name__}).")
            raise

    return with_plain_errors


def _is_our_own(error: Exception) -> bool:
    """Whether it was raised by this package's code rather than in what that calls."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "")
    return module.split(".")[0] == __name__.split(".")[0]


def parts_not_rematerialized(
    layer: keras.layers.Layer,
) -> contextlib.AbstractContextManager:
    """Keeps Keras from computing again, one by one, layers made in this context for
    one that is computed again as a whole (`keras.RematScope`)."""
    mode = getattr(layer, "_remat_mode", None)
    if mode is None or mode.mode != "full":
        return contextlib.nullcontext()
    return keras.RematScope(mode=None)


def is_in_sharing_scope() -> bool:
    """Whether Keras is writing or reading a model, and finds out what is shared."""
    return get_global_attribute(_NOTED) is not None


def note_shared(layer: keras.layers.Layer) -> None:
    """Tells Keras, while it writes a model, that several others share a layer.

    Keras finds out when it meets the layer again. Then it is too late where it met it
    first in a nested model, whose config is a copy by now.
    """
    get_global_attribute(_NOTED).setdefault(id(layer), {})


def is_called_otherwise(layer: keras.layers.Layer) -> bool:
    """Whether a call of a layer does more than its class's `call`: computes again for
    its gradient (`keras.RematScope`), shares its output out over devices, or runs what
    has been put in the place of `call`."""
    is_rematerialized = getattr(layer, "_remat_mode", None) is not None
    is_shared_out = keras.distribution.distribution() is not None
    return is_rematerialized or is_shared_out or "call" in vars(layer)


def is_called_by_itself(layer: keras.layers.Layer) -> bool:
    """Whether a layer is part of a Functional model's graph, itself."""
    return bool(layer._inbound_nodes)


def kernel_variable(dense: keras.layers.EinsumDense) -> keras.Variable:
    """Returns what `dense.kernel` is made of where LoRA or quantization change it."""
    return dense._kernel


@contextlib.contextmanager
def standing_in(tensors: Iterable[tuple[keras.Variable, Tensor]]) -> Iterator[None]:
    """Has variables give other tensors meanwhile, which may be of other shapes."""
    names, kept = ("_value", "_shape"), []
    try:
        for variable, tensor in tensors:
            held = vars(variable)
            kept.append((held, {name: held[name] for name in names if name in held}))
            held.update(_value=tensor, _shape=tuple(tensor.shape))
        yield
    finally:
        for held, before in kept:
            for name in names:
                held.pop(name)
            held.update(before)


def held_value(variable: keras.Variable) -> Tensor:
    """Returns the tensor that a variable holds, not cast to any compute dtype."""
    return variable._value


def hold_value(variable: keras.Variable, value: Tensor) -> None:
    """Has a variable hold another tensor than it was made with."""
    variable._value = value


def track_variables(layer: keras.layers.Layer) -> None:
    """Has torch take what a layer's variables hold for the layer's parameters."""
    layer._track_variables()


def entry_layer() -> keras.layers.Layer | None:
    """Returns the outermost layer whose call runs now."""
    return getattr(get_global_attribute("current_call_ctx"), "entry_layer", None)


def all_layers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Returns a layer and all layers in it that Keras knows of."""
    return layer._flatten_layers()


@contextlib.contextmanager
def losses_kept(layer: keras.layers.Layer) -> Iterator[None]:
    """Gives a layer, when this ends, the losses again that calls clear and add."""
    kept = [(x, [*x._losses], {*x._loss_ids}) for x in all_layers(layer)]
    try:
        yield
    finally:
        for x, losses, ids in kept:
            x._losses[:] = losses
            x._loss_ids.clear()
            x._loss_ids.update(ids)


__all__ = [
    "Shape",
    "Tensor",
    "all_layers",
    "as_tensor",
    "at_least_float32",
    "convert_no_inputs",
    "draw_seed",
    "dtype_name",
    "entry_layer",
    "get_keras_mask",
    "held_value",
    "hold_value",
    "in_symbolic_scope",
    "is_called_by_itself",
    "is_called_otherwise",
    "is_float",
    "is_in_sharing_scope",
    "is_integer",
    "is_symbolic",
    "kernel_variable",
    "larger",
    "losses_kept",
    "note_shared",
    "parts_not_rematerialized",
    "set_keras_mask",
    "smaller",
    "standing_in",
    "to_tensor",
    "told_as_it_is",
    "track_variables",
    "without_autocast",
]
