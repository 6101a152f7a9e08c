"""Inputs of the vocabulary head's tests."""

import torch


def make_inputs(rows, width, vocab, dtype=torch.float32, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator).to(dtype)
    weight = (scale * torch.randn(vocab, width, generator=generator) / width**0.5).to(dtype)
    bias = torch.randn(vocab, generator=generator)
    target = torch.randint(vocab, (rows,), generator=generator)
    return hidden, weight, bias, target


def key(seed):
    return torch.tensor([seed])
