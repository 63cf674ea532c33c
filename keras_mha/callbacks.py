"""What can watch a model while it trains."""

import io
import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_mha import _checks
from keras_mha.inspect import attention_maps


class AttentionRecorder(keras.callbacks.Callback):
    """Draws what a model attends to, as it learns.

    Before the first epoch and after each one, the model is run on a few samples (see
    `keras_mha.attention_maps`), and each layer's heads are drawn for each sample (see
    `keras_mha.plot_attention`), one file a picture:

        directory/path/of/layer/sample_0_epoch_0003.png

    where 3 epochs of training have been done. Training itself is not changed. (Of a
    layer with `attention_axes`, which attends several times within a sample, the files
    are `sample_0_part_0_epoch_0003.png` and so on.)

    Args:
        samples: A few samples, as the model is called with them: an array, or a list or
            dictionary of arrays, of shape `(samples, ...)`.
        directory: The folder for the pictures; made if it is not there. Pictures of an
            earlier training are written over.
        layers: Which attention layers, as for `attention_maps`. Defaults to all.
        heads: Which heads, as for `attention_maps`. Defaults to all.
        query_rows: Which queries, as for `attention_maps`. Defaults to all.
        every: Record after every so many epochs.
        query_tokens: For each sample the texts of all its queries, for the layers that
            have as many. Defaults to their numbers.
        key_tokens: For each sample the texts of its keys, for the layers that have as
            many. Defaults to their numbers; in self-attention give it as well as
            `query_tokens`.
        log_dir: A folder for TensorBoard, which then shows the pictures under "Images".
            Needs tensorboard. Defaults to none.

    Raises:
        MissingExtra: If matplotlib is not installed, or tensorboard, given `log_dir`.
        TypeError: If an argument is of a wrong type.
        ValueError: If `every` is below 1, or tokens are not given for every sample.

    Example:

    ```python
    recorder = keras_mha.AttentionRecorder(x_test[:2], "maps", layers="encoder/*")
    model.fit(x_train, y_train, epochs=10, callbacks=[recorder])
    ```
    """

    def __init__(
        self,
        samples: Any,
        directory: str | PathLike,
        *,
        layers: Any = None,
        heads: int | Sequence[int] | None = None,
        query_rows: int | Sequence[int] | None = None,
        every: int = 1,
        query_tokens: Sequence[Sequence[str]] | None = None,
        key_tokens: Sequence[Sequence[str]] | None = None,
        log_dir: str | PathLike | None = None,
    ):
        from keras_mha.info import require

        super().__init__()
        require("AttentionRecorder", {"matplotlib": "matplotlib"}, "viz")
        self.samples = samples
        self.directory = Path(directory)
        self.every = _checks.positive_integer("every", every)
        self._count = _sample_count(samples)
        self.query_tokens = _checked_tokens("query_tokens", query_tokens, self._count)
        self.key_tokens = _checked_tokens("key_tokens", key_tokens, self._count)
        self.log_dir = None if log_dir is None else Path(log_dir)
        if log_dir is not None:
            needed = {"tensorboard": "tensorboard"}
            require("AttentionRecorder with `log_dir`", needed, "tensorboard")
        self.heads = heads
        self._query_rows = None if query_rows is None else np.atleast_1d(query_rows)
        self._wishes = {"layers": layers, "query_rows": query_rows}
        self._writer = None
        self._is_new = True

    def on_train_begin(self, logs: dict | None = None) -> None:
        self._is_new = True

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        if self._is_new:  # not when training begins: that does not tell the epoch
            self.record(epoch)
        self._is_new = False

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        if (epoch + 1) % self.every == 0:
            self.record(epoch + 1)

    def on_train_end(self, logs: dict | None = None) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def record(self, epoch: int) -> None:
        """Draws what the model attends to now.

        Args:
            epoch: How many epochs have been done, for the files' names.
        """
        maps = attention_maps(self.model, self.samples, **self._wishes)
        for path, scores in maps.items():
            for row in range(len(scores)):
                self._draw(path, scores, row, epoch)
        if self._writer is not None:
            self._writer.flush()

    def _draw(self, path: str, scores: np.ndarray, row: int, epoch: int) -> None:
        from keras_mha.plotting import plot_attention

        sample, part = divmod(row, len(scores) // self._count)
        name = f"sample_{sample}"
        if len(scores) > self._count:
            name += f"_part_{part}"
        figure = plot_attention(
            scores,
            self._query_labels(sample, scores.shape[2]),
            _fitting(self.key_tokens, sample, scores.shape[3]),
            self.heads,
            sample=row,
            title=f"{path}, {name.replace('_', ' ')}, after {epoch} epochs",
        )
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
        # Some characters of layers' names are not allowed in files' names everywhere.
        folders = [re.sub(r'[<>:"\\|?*]', "_", part) for part in path.split("/")]
        folder = self.directory.joinpath(*folders)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{name}_epoch_{epoch:04}.png"
        file.write_bytes(picture.getvalue())
        if self.log_dir is not None:
            self._log(f"{path}/{name}", epoch, picture.getvalue(), figure)

    def _query_labels(self, sample: int, length: int) -> list[str] | None:
        if self._query_rows is None:
            return _fitting(self.query_tokens, sample, length)
        if self.query_tokens is None:
            return [str(row) for row in self._query_rows]
        tokens = self.query_tokens[sample]
        if not all(-len(tokens) <= row < len(tokens) for row in self._query_rows):
            return [str(row) for row in self._query_rows]  # of another layer's length
        return [tokens[row] for row in self._query_rows]

    def _log(self, tag: str, epoch: int, picture: bytes, figure: Any) -> None:
        """Writes a picture to TensorBoard's logs."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        if self._writer is None:
            self._writer = EventFileWriter(str(self.log_dir))
        width, height = (int(x) for x in figure.get_size_inches() * figure.dpi)
        image = Summary.Image(
            width=width, height=height, colorspace=3, encoded_image_string=picture
        )
        value = Summary.Value(tag=tag, image=image)
        self._writer.add_event(Event(step=epoch, summary=Summary(value=[value])))


def _sample_count(samples: Any) -> int:
    arrays = keras.tree.flatten(samples)
    if not arrays or not all(np.ndim(x) or hasattr(x, "shape") for x in arrays):
        raise TypeError(
            "`samples` must be an array, or a list or dictionary of arrays. "
            f"Received: samples={samples!r}"
        )
    return len(arrays[0])


def _checked_tokens(name: str, tokens: Any, count: int) -> list[list[str]] | None:
    if tokens is None:
        return None
    if not isinstance(tokens, Sequence | np.ndarray) or isinstance(tokens, str):
        raise TypeError(
            f"`{name}` must be a sequence of texts for each sample. "
            f"Received: {name}={tokens!r}"
        )
    if len(tokens) != count:
        raise ValueError(
            f"`{name}` must be given for each of the {count} samples. "
            f"Received: {name} for {len(tokens)}"
        )
    return [list(each) for each in tokens]


def _fitting(tokens: list | None, sample: int, length: int) -> list[str] | None:
    """Returns a sample's texts for an axis of this length, if there are as many."""
    if tokens is None or len(tokens[sample]) != length:
        return None
    return tokens[sample]
