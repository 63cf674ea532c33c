"""What the grid measures."""

from dataclasses import asdict, dataclass
from typing import Any

SHAPES = (  # batch and length
    (1, 16),
    (1, 128),
    (32, 16),
    (32, 128),
    (8, 512),
    (16, 512),
    (1, 1024),
    (4, 1024),
    (1, 2048),
    (1, 4096),
)
WIDTHS = ((4, 32), (8, 64), (12, 64))  # heads and the width of each
MIDDLE = (8, 64)
KINDS = ("plain", "causal", "padding", "dropout", "grouped")
CROSS, CROSS_SHAPE, KEYS = "cross", (8, 128), 512
RATE, HEADS_OF_A_GROUP = 0.1, 4
PASSES = ("forward", "training")
# "compiled" is `jax.jit`, `tf.function` or `torch.compile`.
PROGRAMS = ("eager", "compiled", "xla")
# What the grid leaves out, since each would take longer than all the rest.
MANY_SCORES, MANY_SCORES_OF_XLA = 1_000_000, 4_000_000  # of a head
SHAPES_OF_TORCH_COMPILE = ((1, 128), (8, 512), (1, 1024))  # a minute a program
LEFT_OUT = (
    "From 8 x 512 on, eager TensorFlow and JAX are measured with 8 heads of 64 only. "
    "TensorFlow with XLA is measured with 8 heads of 64, and not at 16 x 512, "
    "4 x 1024, 1 x 2048 and 1 x 4096 (where a training step of Keras's layer with "
    "dropout takes long); `torch.compile`, which takes a minute for a program, for the "
    "causal call with 8 heads of 64 at 1 x 128, 8 x 512 and 1 x 1024."
)


@dataclass(frozen=True)
class Cell:
    """A call of a layer that is measured, forward and in training.

    Args:
        kind: String, one of `KINDS` or `CROSS`.
        batch: Integer, the number of sequences.
        length: Integer, the tokens of each.
        heads: Integer.
        width: Integer, of each head.
        program: String, one of `PROGRAMS`.
    """

    kind: str
    batch: int
    length: int
    heads: int
    width: int
    program: str

    @property
    def name(self) -> str:
        """Names the cell in a file and on the command line."""
        return f"{self.kind} {self.shape} {self.heads}x{self.width} {self.program}"

    @property
    def shape(self) -> str:
        """Batch and length, such as `"32x128"`."""
        return f"{self.batch}x{self.length}"

    @property
    def keys(self) -> int:
        """How many tokens are attended to."""
        return KEYS if self.kind == CROSS else self.length

    @property
    def features(self) -> int:
        """The width of the layer's inputs."""
        return self.heads * self.width

    @property
    def scores(self) -> int:
        """How many scores a head has, of all sequences."""
        return self.batch * self.length * self.keys

    @property
    def cost(self) -> float:
        """About how many seconds the cell takes, to tell the time that is left."""
        return 3.0 + 2e-7 * self.scores * self.heads

    @property
    def config(self) -> dict[str, Any]:
        """The cell as JSON holds it."""
        return asdict(self)


def cells(backend: str) -> list[Cell]:
    """Returns all that is measured under a backend."""
    calls = [(kind, *shape) for shape in SHAPES for kind in KINDS]
    calls.append((CROSS, *CROSS_SHAPE))
    found = [
        Cell(*call, *width, program)
        for width in WIDTHS
        for program in PROGRAMS
        for call in calls
    ]
    return [cell for cell in found if _is_measured(backend, cell)]


def _is_measured(backend: str, cell: Cell) -> bool:
    middle = (cell.heads, cell.width) == MIDDLE
    if cell.program == "xla":
        return backend == "tensorflow" and middle and cell.scores < MANY_SCORES_OF_XLA
    if backend == "torch":
        return cell.program == "eager" or (
            middle
            and cell.kind == "causal"
            and (cell.batch, cell.length) in SHAPES_OF_TORCH_COMPILE
        )
    return cell.program == "compiled" or middle or cell.scores < MANY_SCORES
