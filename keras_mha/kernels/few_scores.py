"""How many scores are few: what a backend's numbers for its CPUs are."""

from typing import NamedTuple


class FewScores(NamedTuple):
    """From how many scores a head tiles are faster than whole scores, where that
    follows from how many there are of all heads and sequences.

    Args:
        in_all: From how many of all heads and sequences.
        least: But not with fewer a head than this.
        most: And always with as many as this.
    """

    in_all: int
    least: int
    most: int

    def of(self, sequences: int) -> int:
        """Returns the number for so many heads and sequences."""
        return min(self.most, max(self.least, self.in_all // max(sequences, 1)))


Few = int | FewScores | dict[str, int | FewScores]
"""One number for all calls, or one for each kind (`thresholds.kind_of`)."""


def few_of(few: Few, kind: str, sequences: int) -> int:
    """Returns the number for a kind of call with so many heads and sequences."""
    if isinstance(few, dict):
        few = few[kind]
    return few if isinstance(few, int) else few.of(sequences)
