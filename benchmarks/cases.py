"""What is measured, and by which names."""

from dataclasses import asdict, dataclass, replace
from typing import Any

HEADS, WIDTH, FEATURES = 8, 64, 512
LENGTHS = (16, 64, 256, 1024, 2048, 4096, 8192, 16384, 32768)
# Whole scores of 8 heads beyond this length take minutes, or do not fit into memory.
LONGEST_WITH_WHOLE_SCORES = 8192
WINDOW, RATE, GROUPS = 512, 0.1, 2
TOKENS = 16384  # of a batch on a GPU or TPU
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
        batch: Integer, the number of sequences.
        dtype: String, of inputs and activations.
    """

    kind: str
    length: int
    compiler: str = ""
    batch: int = 1
    dtype: str = "float32"

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


def cases(backend: str, device: str = "cpu") -> list[Case]:
    """Returns all that is timed in rounds under a backend.

    Args:
        backend: String, the backend.
        device: String, the kind of device. Others than a CPU get what people train
            there: half types, and as many tokens as keep it busy.
    """
    if device != "cpu":
        return _of_accelerators()
    found = [Case("causal", length) for length in LENGTHS if length <= 4096]
    found.append(Case("causal", 16, "eager"))
    found += [Case(kind, 2048) for kind in ("padded", "window", "grouped", "biased")]
    found += [Case("dropout", 4096), Case("function", 4096), Case("window", 8192)]
    if backend == "tensorflow":
        found.append(Case("causal", 4096, "xla"))
    return found


def _of_accelerators() -> list[Case]:
    found = [Case("causal", length) for length in (256, 1024, 2048, 4096, 8192)]
    kinds = ("padded", "window", "dropout", "grouped", "biased", "function")
    found += [Case(kind, 2048) for kind in kinds]
    return [
        replace(case, batch=max(TOKENS // case.length, 1), dtype="bfloat16")
        for case in found
    ]


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
