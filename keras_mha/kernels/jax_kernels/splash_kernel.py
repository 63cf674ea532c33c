"""jax's splash attention as it is called here, with what it wants to be told.

What jax makes public returns either the rows' sums or a gradient, for which it runs the
forward kernel anew. So the three kernels are called themselves, for a whole batch.
`is_as_known` says whether they are still called like this.
"""

import contextlib
import inspect
from collections.abc import Iterator
from contextvars import ContextVar
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np

from keras_mha._keras import Tensor
from keras_mha.kernels.jax_kernels import splash_blocks, splash_sharding
from keras_mha.kernels.jax_kernels.layout import multiple
from keras_mha.kernels.jax_kernels.splash_masks import PositionFunction

_interpret: ContextVar[bool] = ContextVar("interpret", default=False)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Has the kernels interpreted, which works, slowly, on every device."""
    jax.clear_caches()  # programs do not know of it
    token = _interpret.set(True)
    try:
        yield
    finally:
        _interpret.reset(token)
        jax.clear_caches()


def _jax_kernel():
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
    )

    return splash_attention_kernel


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ALL = _names(
    "q k v segment_ids sinks is_mqa mask_value attn_logits_soft_cap mask_function "
    "interpret"
)
_BACKWARD = _ALL | _names("logsumexp do di mask_info bq bkv q_layout k_layout v_layout")
_PARAMETERS = {
    "_splash_attention_forward": _ALL
    | _names("fwd_mask_info block_sizes residual_checkpoint_name save_residuals"),
    "_splash_attention_bwd_dq": _BACKWARD,
    "_splash_attention_bwd_dkv": _BACKWARD | {"bkv_compute", "use_fused_bwd_kernel"},
}
_INFORMATION = _names("data_next mask_next block_mask partial_mask_blocks q_sequence")


@cache
def is_as_known() -> bool:
    """Whether this version of jax has the kernels that are called here."""
    try:
        kernel = _jax_kernel()
        found = {
            name: frozenset(inspect.signature(getattr(kernel, name)).parameters)
            for name in _PARAMETERS
        }
        information = frozenset(kernel.mask_info_lib.MaskInfo._fields)
    except (ImportError, AttributeError):
        return False
    return found == _PARAMETERS and information >= _INFORMATION


class Plan(NamedTuple):
    """What of a call is no tensor.

    Args:
        function: The mask of positions; `None` where it hides nothing.
        rows: Number of queries.
        columns: Number of keys.
        cut: The blocks of the scores, of which there are whole ones only.
        soft_cap: As in `AttentionCall`.
    """

    function: PositionFunction | None
    rows: int
    columns: int
    cut: splash_blocks.Blocks
    soft_cap: float | None

    @property
    def options(self) -> dict[str, Any]:
        """What every kernel is told."""
        return {
            "is_mqa": False,
            "mask_value": _jax_kernel().DEFAULT_MASK_VALUE,
            "attn_logits_soft_cap": self.soft_cap,
            "mask_function": self.function,
            "interpret": _interpret.get(),
        }

    def information(self, direction: str) -> Any:
        """Returns which blocks are visited, for `"forward"` or `"backward"`."""
        found = dict.fromkeys(_INFORMATION)
        if self.function is not None:
            visits = splash_blocks.visits(
                self.function, self.rows, self.columns, self.cut
            )
            found["block_mask"], found["data_next"] = getattr(visits, direction)
            rows = multiple(self.cut.rows, self.rows)
            found["q_sequence"] = np.arange(rows, dtype=np.int32)
        return _jax_kernel().mask_info_lib.MaskInfo(**found)


class Tensors(NamedTuple):
    """What a call attends with, in lengths of whole blocks.

    Args:
        query: Scaled, shape `(B, N, T, H)`.
        key: Shape `(B, K, S, H)`.
        value: Shape `(B, K, S, V)`.
        ids: Numbers of queries, `(B, T)`, and keys, `(B, S)`, or `None`.
        sink: Shape `(N,)`, or `None`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    ids: tuple[Tensor, Tensor] | None = None
    sink: Tensor | None = None

    @property
    def arguments(self) -> tuple[Any, ...]:
        """In the order of the kernels' parameters."""
        ids = None if self.ids is None else _jax_kernel().SegmentIds(*self.ids)
        return self.query, self.key, self.value, ids, self.sink

    @property
    def leads(self) -> tuple[Any, ...]:
        """What the first axes of the arguments are; see `splash_sharding`."""
        ids = None if self.ids is None else _jax_kernel().SegmentIds("batch", "batch")
        return "both", "both", "both", ids, None if self.sink is None else "heads"


def _of_each_row(function, tensors, *others):
    """Runs `function(*arguments, *others)` of every row of the batch, each device those
    and the heads that it has."""
    arguments = *tensors.arguments, *others
    leads = *tensors.leads, *("both",) * len(others)
    axes = *(0,) * 3, None if tensors.ids is None else 0, None, *(0,) * len(others)
    run = jax.vmap(function, in_axes=axes)
    batch, key_heads = tensors.key.shape[:2]
    shared = splash_sharding.sharing(batch, key_heads)
    return run(*arguments) if shared is None else shared.run(run, arguments, leads)


def forward(plan: Plan, tensors: Tensors) -> tuple[Tensor, Tensor]:
    """Returns the output, `(B, N, T, V)`, and each row's logarithm of its sum of
    exponentials, `(B, N, T)`; neither means anything where a row sees nothing."""
    kernel = _jax_kernel()
    run = partial(
        kernel._splash_attention_forward,
        plan.information("forward"),
        block_sizes=kernel.BlockSizes(plan.cut.rows, plan.cut.columns),
        residual_checkpoint_name=None,
        save_residuals=True,
        **plan.options,
    )

    def of_row(query, key, value, ids, sink):
        output, (lse,) = run(query, key, value, ids, sink)
        return output, lse

    return _of_each_row(of_row, tensors)


def _backward_options(plan, direction):
    layout = _jax_kernel().QKVLayout.HEAD_DIM_MINOR
    return plan.options | {
        "mask_info": plan.information(direction),
        "bq": plan.cut.rows,
        "bkv": plan.cut.columns,
        **dict.fromkeys(("q_layout", "k_layout", "v_layout"), layout),
    }


def backward_query(plan: Plan, tensors: Tensors, *kept: Tensor) -> Tensor:
    """Returns the gradient of the scaled query.

    Args:
        plan: As of `forward`.
        tensors: As of `forward`, without a sink.
        kept: The logarithms, infinite where a row sees nothing, the output's gradient,
            and what of it each row's softmax takes from every logit's, `(B, N, T)`.
    """
    run = partial(
        _jax_kernel()._splash_attention_bwd_dq, **_backward_options(plan, "forward")
    )
    return _of_each_row(run, tensors, *kept)


def backward_key_value(
    plan: Plan, tensors: Tensors, *kept: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of key and value; arguments as of `backward_query`."""
    run = partial(
        _jax_kernel()._splash_attention_bwd_dkv,
        bkv_compute=plan.cut.columns,
        # Fused, it would hold the query's gradient once for every block of keys.
        use_fused_bwd_kernel=False,
        **_backward_options(plan, "backward"),
    )
    _, d_key, d_value = _of_each_row(run, tensors, *kept)
    return d_key, d_value
