"""What is measured, and by which names."""

from dataclasses import asdict, dataclass
from typing import Any

HEADS, WIDTH, FEATURES = 8, 64, 512
LENGTHS = (16, 64, 256, 1024, 2048, 4096, 8192, 16384, 32768)
# Whole scores of 8 heads beyond this length take minutes, or do not fit into memory.
LONGEST_WITH_WHOLE_SCORES = 8192
WINDOW, RATE, GROUPS = 512, 0.1, 2


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Args:
        kind: String, one of `KINDS`.
        length: Integer, the sequence length.
        compiler: String, `"xla"` for TensorFlow's, `"eager"` for none, else `""` for
            what is usual: `jax.jit`, `tf.function`, PyTorch as it is.
    """

    kind: str
    length: int
    compiler: str = ""

    @property
    def name(self) -> str:
        """Names the case in a file."""
        return " ".join(filter(None, [self.kind, str(self.length), self.compiler]))

    @property
    def config(self) -> dict[str, Any]:
        """The case as JSON holds it."""
        return asdict(self)


KINDS = {
    "causal": "causal",
    "padded": "causal, last quarter padding",
    "window": f"causal, window of {WINDOW}",
    "dropout": f"causal, dropout={RATE}",
    "grouped": f"causal, {GROUPS} key heads",
    "biased": "causal, bias (T, T)",
    "function": "causal, attention alone",
}


def cases(backend: str) -> list[Case]:
    """Returns all that is timed in rounds under a backend."""
    found = [Case("causal", length) for length in LENGTHS if length <= 4096]
    found.append(Case("causal", 16, "eager"))
    found += [Case(kind, 2048) for kind in ("padded", "window", "grouped", "biased")]
    found += [Case("dropout", 4096), Case("function", 4096), Case("window", 8192)]
    if backend == "tensorflow":
        found.append(Case("causal", 4096, "xla"))
    return found


def memory_cases() -> list[Case]:
    """Returns all whose memory is measured under each backend."""
    found = [Case("causal", length) for length in LENGTHS if length >= 4096]
    found.append(Case("dropout", 4096))
    return found
