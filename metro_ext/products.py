"""Which matrix products of a model run in fewer than sixteen bits, and by what.

Those of each layer that ``products.linears`` names (queries, keys and values; attention's output;
the feed-forward's two), but for the first and last ``products.skip`` layers of each encoder.
Embeddings, heads, norms, softmax and the relative bias stay as they are, and so do master weights,
gradients and AdamW. That is the common recipe: the ends of the network are the most sensitive, and
the products of its middle are nearly all of the work.

    fp8               torchao's Float8Linear: real eight-bit products (E4M3; gradients E5M2 or
                      E4M3, by the recipe) on GPUs from sm_89 on, and slowly on a CPU; not yet run
                      on a GPU
    mxfp4-emulated    metro_ext.ops.block_scaled: what four bits would do to the numbers, to study
    nvfp4-emulated    recipes; slower than bf16 everywhere
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from metro_ext.config_schema import Config, ProductsConfig
from metro_ext.errors import UserError
from metro_ext.model import PRODUCTS, Layer, PretrainingModel
from metro_ext.ops.block_scaled import Recipe, block_scaled_linear

# x [T, K], weight [N, K], seed int64 [], draw -> x·weightᵀ [T, N]
Product = Callable[[Tensor, Tensor, Tensor, int], Tensor]

FP8_MULTIPLE = 16  # of every dimension of an eight-bit product
_ROWWISE, _TENSORWISE = (9, 0), (8, 9)  # compute capabilities with such products


def lower_products(model: PretrainingModel, config: Config, device: torch.device) -> None:
    """Gives the layers of a model, on any device, the products of ``config.products``.

    Args:
        device: that it will run on.

    Raises:
        UserError: an unknown name in ``products.linears``, torchao is missing, or device or sizes
            have no eight-bit products.
    """
    if config.products.format == "full":
        return
    unknown = [name for name in config.products.linears if name not in PRODUCTS]
    if unknown:
        raise UserError(
            f"products.linears must name some of {', '.join(PRODUCTS)}, found {unknown[0]!r}"
        )
    product = _product(config, device)
    for layer in lowered_layers(model, config.products.skip):
        layer.products = dict.fromkeys(config.products.linears, product)


def lowered_layers(model: PretrainingModel, skip: int) -> Iterator[Layer]:
    """All but the first and the last `skip` layers of each encoder."""
    for encoder in (model.auxiliary, model.main):
        if encoder is not None:
            layers = cast(list[Layer], list(encoder.layers))
            yield from layers[skip : len(layers) - skip]


def _product(config: Config, device: torch.device) -> Product:
    products = config.products
    if products.format == "fp8":
        _check_sizes(config)
        return Fp8Product(products, device)
    recipe = Recipe(
        products.format.removesuffix("-emulated"), products.stochastic_rounding, products.hadamard
    )
    return functools.partial(_block_scaled, recipe)


def _block_scaled(recipe: Recipe, x: Tensor, weight: Tensor, seed: Tensor, draw: int) -> Tensor:
    return block_scaled_linear(x, weight, recipe, seed, draw)


def _check_sizes(config: Config) -> None:
    for key, size in (
        ("model.hidden", config.model.hidden),
        ("model.ffn", config.model.ffn),
        ("run.tokens_per_batch", config.run.tokens_per_batch),
    ):
        if size % FP8_MULTIPLE:
            raise UserError(
                f"products.format=fp8 needs {key} to be a multiple of {FP8_MULTIPLE}, found {size}"
            )


class Fp8Product:
    """A product by torchao's Float8Linear, which scales, rounds and multiplies both ways.

    Raises:
        UserError: torchao is missing, or the device is a GPU without such products.
    """

    def __init__(self, config: ProductsConfig, device: torch.device):
        try:
            from torchao.float8 import Float8LinearConfig, convert_to_float8_training
        except ImportError:
            raise UserError(
                "products.format=fp8 needs torchao: pip install 'metro-ext[fp8]', or leave "
                "products.format out"
            ) from None
        if device.type == "cuda" and not config.emulate:
            least = _TENSORWISE if config.recipe == "tensorwise" else _ROWWISE
            found = torch.cuda.get_device_capability(device)
            if found < least:
                raise UserError(
                    f"products.recipe={config.recipe} needs a GPU of compute capability "
                    f"{least[0]}.{least[1]} or later, found {found[0]}.{found[1]}; "
                    "--products.emulate=true computes the same slowly"
                )
        recipe = Float8LinearConfig.from_recipe_name(config.recipe)
        # A stand-in: weights are handed in call by call, so one of any size serves all layers.
        with torch.device("meta"):
            self._linear = nn.Sequential(nn.Linear(FP8_MULTIPLE, FP8_MULTIPLE, bias=False))
        convert_to_float8_training(
            self._linear, config=dataclasses.replace(recipe, emulate=config.emulate)
        )

    def __call__(self, x: Tensor, weight: Tensor, seed: Tensor, draw: int) -> Tensor:
        weight = weight.to(x.dtype)
        return torch.func.functional_call(self._linear, {"0.weight": weight}, (x,))
