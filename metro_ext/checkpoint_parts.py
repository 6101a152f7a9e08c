"""The tensors of a checkpoint that several ranks write at once, each what it holds.

`torch.distributed.checkpoint` plans and reshards; its storage for Hugging Face keeps one
safetensors file a rank and needs no pickle on disk. What every rank holds whole is written once, by
the rank with the least to write. Any number of ranks can read it back, and so can one process.

torch's `consolidate_safetensors_files` is not used: it loses tensors without dimensions (torch 2.10
to 2.13).
"""

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from metro_ext.errors import UserError


def write_parts(path: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Writes this rank's part into the folder, synced to disk. A collective.

    Args:
        path: the folder; the same on every rank.
        tensors: on the CPU; a DTensor is a part of a whole, any other tensor is the whole and the
            same on every rank.
        group: of CPU tensors; nothing else may use it meanwhile.

    Raises:
        UserError: the system refused to write; on every rank alike.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageWriter, save
    from torch.distributed.checkpoint.api import CheckpointException

    writer = HuggingFaceStorageWriter(str(path), save_distributed=True)
    try:
        save(dict(tensors), storage_writer=writer, process_group=group)
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        if isinstance(cause, OSError):
            raise UserError(f"rank {rank}: {cause.strerror}") from error
        raise


def part_of(path: Path, rank: int) -> Path | None:
    """The file that a rank wrote into the folder; None where it had nothing to write."""
    return next(path.glob(f"shard-{rank + 1:05d}-*.safetensors"), None)


def read_into(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills tensors in place; of a DTensor only what this rank holds is read. No collective.

    Args:
        path: the folder, with the files of any number of ranks.
        tensors: on the CPU.

    Raises:
        CheckpointException: a tensor is not there, or has another shape.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*assuming the intent is to load in a single process")
        load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)


def read_whole(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """All tensors of the folder, whole, on `device`."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    found = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(value.size, dtype=value.properties.dtype)
        for name, value in found.items()
        if isinstance(value, TensorStorageMetadata)  # its files hold nothing else
    }
    read_into(path, tensors)
    return {name: value.to(device) for name, value in tensors.items()}
