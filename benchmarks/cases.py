"""What is measured, and by which names."""

from dataclasses import asdict, dataclass
from typing import Any

HEADS, WIDTH, FEATURES = 8, 64, 512
LENGTHS = (16, 64, 256, 1024, 2048, 4096, 8192, 16384, 32768)
# Whole scores of 8 heads beyond this length take minutes, or do not fit into memory.
LONGEST_WITH_WHOLE_SCORES = 8192
WINDOW, RATE, GROUPS = 512, 0.1, 2
# Decoding: the 512th and the 4096th token, and how many a `jax.lax.scan` decodes.
EARLY, LATE, SCANNED = 512, 4096, 32


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


@dataclass(frozen=True)
class Step:
    """One token decoded by a layer that keeps keys and values in a cache.

    Args:
        contestant: String, whose layer.
        token: Integer, which token of the sequence it is, counted from 1.
        slots: Integer, how many tokens the cache has room for.
        program: String, `"scan"` for the last of some steps in a `jax.lax.scan`, else
            `""` for one step in what is usual: `jax.jit`, `tf.function`, PyTorch as it
            is.
    """

    contestant: str
    token: int
    slots: int
    program: str = ""

    @property
    def name(self) -> str:
        """Names the step apart from all others."""
        return f"{self.contestant} {self.token} {self.slots} {self.program}".rstrip()

    @property
    def count(self) -> int:
        """How many tokens are decoded, this one being the last."""
        return min(SCANNED, self.token) if self.program == "scan" else 1

    @property
    def config(self) -> dict[str, Any]:
        """The step as JSON holds it."""
        return asdict(self)


PLACES = ((EARLY, LATE), (LATE, LATE), (EARLY, EARLY))  # tokens and slots


def programs(backend: str) -> tuple[str, ...]:
    """Returns how a backend's steps are run."""
    return ("", "scan") if backend == "jax" else ("",)


def steps(backend: str) -> list[Step]:
    """Returns all steps of decoding that are timed under a backend."""
    return [
        Step(contestant, token, slots, program)
        for program in programs(backend)
        for token, slots in PLACES
        for contestant in ("keras_mha", "keras_hub")
    ]
