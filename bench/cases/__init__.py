"""The cases of ``bench/ops.py``: a file an operator family, by the family's name."""

from bench.cases import attention, corruption, gelu, layer_norm, loss, rtd_head, vocab_head
from bench.cases.common import OpCase

FAMILIES = {
    "attention": attention,
    "vocab_head": vocab_head,
    "layer_norm": layer_norm,
    "gelu": gelu,
    "rtd_head": rtd_head,
    "corruption": corruption,
    "loss": loss,
}


def all_cases(device: str, small: bool) -> list[OpCase]:
    """Every family's cases, in the order of the table.

    ``small`` shrinks the shapes to a check that everything runs; its figures mean nothing.
    """
    return [case for family in FAMILIES.values() for case in family.cases(device, small)]
