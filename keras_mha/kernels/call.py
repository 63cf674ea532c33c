"""One call of attention, as the planner and every kernel see it."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from keras.random import SeedGenerator

from keras_mha._keras import Shape, Tensor
from keras_mha.biases import Bias
from keras_mha.kernels import backends
from keras_mha.masks import Mask

Device = Literal["cpu", "gpu", "tpu", "other"]  # "gpu" is one that runs CUDA


class Attended(NamedTuple):
    """What a kernel returns.

    Args:
        output: Shape `(B, T, N, V)`.
        scores: The attention weights before dropout, shape `(B, N, T, S)`; `None`
            where they are not asked for.
        lse: The logarithm of each row's sum of exponentials, shape `(B, N, T)`, minus
            infinity where a row sees nothing; `None` where it is not asked for.
    """

    output: Tensor
    scores: Tensor | None = None
    lse: Tensor | None = None


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """What `dot_product_attention` was asked for, checked and with defaults filled in.

    Args:
        query: Shape `(B, T, N, H)`.
        key: Shape `(B, S, K, H)`, where `N` is a multiple of `K`; query head `n`
            reads key and value head `n // (N / K)`.
        value: Shape `(B, S, K, V)`.
        mask: Who may attend to whom; `None` for everybody.
        bias: Added to the scaled scores; four axes that broadcast to `(B, N, T, S)`.
        position_bias: Added too, but made tile by tile.
        scale: Factor of the dot products.
        logit_soft_cap: Scores become `cap * tanh(scores / cap)`; `None` for no cap.
        sink: A logit for each head, shape `(N,)`, that joins the softmax and has
            neither key nor value; `None` for none.
        talking_heads: What heads' scores are mixed by before softmax, and their weights
            after it: two matrices `(N, N)`, each `None` where nothing is mixed. What
            head `m` gets of head `n` is element `(n, m)`.
        dropout: Share of the attention weights to drop.
        seed: Where dropout's random numbers come from.
        return_scores: Whether the caller wants the attention weights.
        return_lse: Whether the caller wants the logarithms of the rows' sums.
        device: The kind of device to plan and compute for; `None` for that on which the
            tensors are, or for which their program turns out to be compiled.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Mask | None = None
    bias: Tensor | None = None
    position_bias: Bias | None = None
    scale: float = 1.0
    logit_soft_cap: float | None = None
    sink: Tensor | None = None
    talking_heads: tuple[Tensor | None, Tensor | None] = (None, None)
    dropout: float = 0.0
    seed: int | SeedGenerator | None = None
    return_scores: bool = False
    return_lse: bool = False
    device: Device | None = None

    @property
    def device_kind(self) -> Device:
        """The kind of device that the call runs on, as far as it is known now."""
        return self.device or backends.current().device_kind(self.query)

    @property
    def has_bias(self) -> bool:
        """Whether anything is added to the scaled scores."""
        return self.bias is not None or self.position_bias is not None

    @property
    def mixes_heads(self) -> bool:
        """Whether a head's scores or weights become part of another's."""
        return any(mixing is not None for mixing in self.talking_heads)

    @property
    def scores_shape(self) -> Shape:
        """`(B, N, T, S)`."""
        batch, rows, heads, _ = self.query.shape
        return batch, heads, rows, self.key.shape[1]
