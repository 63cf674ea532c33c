"""How tables are written, and what backends are called in them."""

TITLES = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}
NONE = "–"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Returns a table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def times_faster(ratio: float | None) -> str:
    """Writes how many times faster something is."""
    if ratio is None:
        return NONE
    return f"{ratio:.1f}x" if ratio >= 2 else f"{ratio:.2f}x"
