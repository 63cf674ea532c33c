"""Pictures of attention, drawn with matplotlib, which is imported when it is needed."""

from keras_mha.plotting.attention import plot_attention
from keras_mha.plotting.image import plot_heads_over_image
from keras_mha.plotting.mask import plot_mask

__all__ = ["plot_attention", "plot_heads_over_image", "plot_mask"]
