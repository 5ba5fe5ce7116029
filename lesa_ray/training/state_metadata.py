"""`.metadata` of PyTorch's distributed checkpoint: which shards there are of each tensor, and in which file they lie.

The file is a pickle, and PyTorch loads it as one: whoever made it would run what he likes here. A training run may be
somebody else's, so only the classes are loaded that a checkpoint of tensors consists of. What PyTorch would unpickle
behind our back, an entry that is no tensor, is not among them.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from lesa_ray.faults import explain

_DCP = "torch.distributed.checkpoint"
_KNOWN = frozenset(
    {("torch", "Size"), ("torch.serialization", "_get_layout"), (f"{_DCP}.filesystem", "_StorageInfo")}
    | {
        (f"{_DCP}.metadata", name)
        for name in (
            *("Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata"),
            *("TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        )
    }
)


def parse_metadata(content: bytes) -> Metadata:
    """What the file says. Raises: pickle.UnpicklingError if it is damaged, or holds or names anything else."""
    try:
        metadata = _Unpickler(io.BytesIO(content)).load()
        assert isinstance(metadata, Metadata), "it is not the metadata of a checkpoint"
        named = {shard.relative_path for shard in (metadata.storage_data or {}).values()}
        outside = [name for name in named if "/" in name]
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # instructions of a pickle that make no sense fail in any way
        raise pickle.UnpicklingError(explain(error)) from error
    if outside:
        raise pickle.UnpicklingError(f"it names a file outside of the checkpoint ({outside[0]})")
    return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _KNOWN:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which no checkpoint of tensors does")
