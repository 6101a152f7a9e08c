"""The operators: typed wrappers over ``torch.ops.metro.*``, a module per family.

Importing this package loads the compiled module ``metro_ext._C`` and registers, for every operator,
its fake kernel (shapes and dtypes, for ``torch.compile``) and its autograd formula.

Everywhere: T tokens of a packed batch, H hidden size, V vocabulary, N masked positions, S
sequences. Activations and matrices are float32 or bfloat16 (float16 too on CUDA); vectors of
parameters and statistics are float32; arithmetic is float32.
"""

import torch  # noqa: F401  (the binary resolves libtorch through the process that imported torch)

from metro_ext import _C
from metro_ext.ops.attention import attention, relative_bias
from metro_ext.ops.corruption import mask_tokens, replace_tokens
from metro_ext.ops.gelu import bias_gelu
from metro_ext.ops.layer_norm import Normed, layer_norm, normed
from metro_ext.ops.linear import bias_gelu_linear, linear
from metro_ext.ops.loss import METRICS, pretrain_loss, row_gradient
from metro_ext.ops.rtd_head import rtd_head
from metro_ext.ops.token_table import TokenTable
from metro_ext.ops.vocab_head import HeadGradients, VocabHead, vocab_head, vocab_head_loss

__all__ = [
    "METRICS",
    "_C",
    "HeadGradients",
    "Normed",
    "TokenTable",
    "VocabHead",
    "attention",
    "bias_gelu",
    "bias_gelu_linear",
    "layer_norm",
    "linear",
    "mask_tokens",
    "normed",
    "pretrain_loss",
    "relative_bias",
    "replace_tokens",
    "row_gradient",
    "rtd_head",
    "vocab_head",
    "vocab_head_loss",
]
