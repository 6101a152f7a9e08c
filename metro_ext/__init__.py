"""METRO-ext: pretraining of METRO denoising encoders with fused C++/CUDA kernels.

``metro_ext.load(RUN)`` gives a trained model and its tokenizer; ``python -m metro_ext.train`` makes
one; ``metro_ext.ops`` holds the operators.
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from metro_ext.pretrained import Pretrained

__all__ = ["load"]
__version__ = "0.1.0"


def load(run: str | os.PathLike) -> "Pretrained":
    """The model and the tokenizer of a run folder: see `metro_ext.pretrained.load`."""
    # Imported here, so that the command lines that need no torch start at once.
    from metro_ext.pretrained import load as load_run

    return load_run(run)
