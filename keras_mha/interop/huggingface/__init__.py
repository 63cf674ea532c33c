"""From the attention modules of Hugging Face's transformers.

References:
    Wolf et al., 2020, Transformers: https://arxiv.org/abs/1910.03771
"""

from typing import TYPE_CHECKING, Any

from keras_mha.info import require
from keras_mha.interop.huggingface import decoders, encoders
from keras_mha.interop.recipe import make_layer
from keras_mha.layers.multi_head_attention import MultiHeadAttention
from keras_mha.layers.position_bias import RelativePositionBias

if TYPE_CHECKING:
    import torch

# By their names, so that transformers need not be imported to recognise its modules.
# Each of them is run beside the layer made of it by the tests.
READERS = {
    "BartAttention": encoders.bart,
    "BertAttention": encoders.bert,
    "BertCrossAttention": encoders.bert_heads,
    "BertSelfAttention": encoders.bert_heads,
    "BloomAttention": decoders.bloom,
    "CLIPAttention": encoders.bart,
    "DistilBertSelfAttention": encoders.distilbert,
    "GPT2Attention": decoders.gpt2,
    "Gemma2Attention": decoders.gemma2,
    "Gemma3Attention": decoders.gemma3,
    "GemmaAttention": decoders.llama,
    "GptOssAttention": decoders.gpt_oss,
    "LlamaAttention": decoders.llama,
    "MBartAttention": encoders.bart,
    "MT5Attention": encoders.t5,
    "MistralAttention": decoders.mistral,
    "Phi3Attention": decoders.phi3,
    "Qwen2Attention": decoders.qwen2,
    "Qwen3Attention": decoders.qwen3,
    "RobertaAttention": encoders.bert,
    "RobertaCrossAttention": encoders.bert_heads,
    "RobertaSelfAttention": encoders.bert_heads,
    "SiglipAttention": encoders.bart,
    "SwinAttention": encoders.swin,
    "T5Attention": encoders.t5,
    "ViTAttention": encoders.vit,
    "WhisperAttention": encoders.bart,
}

BY_HAND = (
    "For any other, make a MultiHeadAttention with the module's options and give it "
    "the weights with keras_mha.interop.set_projections"
)


def from_huggingface(
    module: "torch.nn.Module",
    *,
    position: RelativePositionBias | None = None,
    **kwargs: Any,
) -> MultiHeadAttention:
    """Makes our layer of an attention module of Hugging Face's transformers.

    Known are the modules of BERT, RoBERTa, DistilBERT, GPT-2, Llama, Mistral, Qwen 2
    and 3, Gemma 1 to 3, Phi-3, gpt-oss, T5, mT5, BLOOM, BART, mBART, Whisper, ViT,
    CLIP, SigLIP and Swin, as transformers 5 has them. torch and transformers need only
    be installed, whatever backend Keras runs on. Heads, grouped or not, biases, dropout
    of the attention weights, rotary positions with their scaling, ALiBi, the tables of
    T5 and Swin, window, soft cap, normalised heads, sinks and scale are taken over.

    A layer is attention and nothing around it:

    - Causal is an argument of the call. Decoders take
      `layer(x, use_causal_mask=True)`, BLOOM's too, whose ALiBi is meant for that.
    - Residual, LayerNorm and dropout after the output projection stay outside. Of a
      `BertAttention` it is `LayerNorm(layer(x) + x)` that equals the module, of a
      `BloomAttention` `layer(x, use_causal_mask=True) + residual`.
    - A module without an output projection (`BertSelfAttention`) gives a layer whose
      output projection is the identity.
    - Cross-attention is `layer(x, memory)`.
    - In T5 one table of positions, the first block's, serves all blocks of its stack:
      see `position`. Its cross-attention has none.
    - Of Swin it is the attention within a window, whose tokens are given row by row;
      shifted windows bring their mask along as `attention_mask` (`True` where a query
      may attend).
    - Masks are `True` where a query may attend. One that may attend to nothing gives
      zeros here.

    Args:
        module: The attention module of a layer, such as
            `model.model.layers[0].self_attn` of a Llama. It stays as it is.
        position: For T5's blocks without a table of their own: that of the layer made
            of the first block of the stack, `first.position`, which the layers then
            share.
        **kwargs: `name`, `dtype` and `trainable`, as for any Keras layer.

    Returns:
        A `MultiHeadAttention`, built.

    Raises:
        MissingExtra: If torch or transformers is not installed.
        TypeError: If `module` is none of the known modules (those are named), or of a
            subclass, or `position` is no `RelativePositionBias`.
        ValueError: If the module has what this layer has not: other scalings of rotary
            positions (`"longrope"`, say), relative positions in BERT, adapters or
            quantized weights; or if `position` does not belong to it.

    Example:

    >>> model = transformers.AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")
    >>> layer = keras_mha.interop.from_huggingface(model.model.layers[0].self_attn)
    >>> layer.num_key_value_heads, layer.position.max_wavelength
    (8, 1000000.0)

    The first two blocks of T5, which share the first one's table:

    >>> blocks = model.encoder.block
    >>> modules = [block.layer[0].SelfAttention for block in blocks]
    >>> first = keras_mha.interop.from_huggingface(modules[0])
    >>> second = keras_mha.interop.from_huggingface(
    ...     modules[1], position=first.position
    ... )
    """
    packages = {"torch": "torch", "transformers": "transformers"}
    require("from_huggingface", packages, "huggingface")
    kind = type(module).__name__
    is_theirs = type(module).__module__.startswith("transformers.")
    if not is_theirs or kind not in READERS:
        raise TypeError(
            "`module` must be one of transformers' attention modules "
            f"{', '.join(READERS)}. {BY_HAND}. "
            f"Received: a {type(module).__module__}.{type(module).__qualname__}"
        )
    reader = READERS[kind]
    if position is not None and reader is not encoders.t5:
        raise ValueError(
            "`position` is for modules that take theirs from another one, T5's. "
            f"Received: position={position!r}, with a {kind}"
        )
    more = {} if position is None else {"position": position}
    try:
        recipe = reader(module, **more)
    except AttributeError as error:
        raise ValueError(
            f"`module` is a {kind}, but not as transformers 5 makes it: {error}. "
            f"{BY_HAND}"
        ) from error
    return make_layer(recipe, **kwargs)
