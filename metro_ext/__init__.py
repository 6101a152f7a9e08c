"""METRO-ext: pretraining of METRO denoising encoders with fused C++/CUDA kernels."""

__version__ = "0.1.0"
