"""The figures' class. This module alone imports matplotlib when it is imported."""

import io

from matplotlib.figure import Figure


class NotebookFigure(Figure):
    """A figure that a notebook shows although pyplot knows nothing of it."""

    def _repr_png_(self) -> bytes:
        # Where pyplot has told IPython how to show figures, this is not asked for: none
        # is shown twice.
        picture = io.BytesIO()
        self.savefig(picture, format="png")
        return picture.getvalue()
