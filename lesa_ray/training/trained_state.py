"""The trained parameters of a training checkpoint, read one at a time, whole, by a single process.

The checkpoint is a folder of PyTorch's distributed checkpoint (DCP): each worker's file holds its shards of every
tensor, `.metadata` says where they are. Each shard is one range read, so memory is bounded by the largest tensor
(about twice: the tensor and a shard of it), and neither the optimizer's state nor frozen weights are touched.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from lesa_ray.checkpoint.storage import Storage
from lesa_ray.errors import MachineError, UserError
from lesa_ray.faults import explain
from lesa_ray.training.state_files import METADATA_FILE, StateReader

PREFIX = "model."
_SAMPLES, _SAMPLE_BYTES = 16, 4096
_DAMAGE = (RuntimeError, ValueError, KeyError, AssertionError, AttributeError, EOFError, pickle.UnpicklingError)
"""What PyTorch raises where the bytes are not what the metadata say."""


class TrainedState:
    """The `model.*` tensors of a DCP folder. Picklable by its URL."""

    def __init__(self, url: str) -> None:
        """Raises: UserError if there is no such checkpoint; MachineError if the store does not answer."""
        self.storage = Storage(url)
        self.url = self.storage.url
        if not self.storage.exists(METADATA_FILE):
            raise UserError(f"training checkpoint {url}: there is no {METADATA_FILE} in it; it was not finished")

    def __reduce__(self) -> tuple[type[TrainedState], tuple[str]]:
        return TrainedState, (self.url,)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and whole shapes of the trained parameters."""
        entries = self._metadata.state_dict_metadata.items()
        return {
            name.removeprefix(PREFIX): tuple(entry.size)
            for name, entry in entries
            if name.startswith(PREFIX) and isinstance(entry, TensorStorageMetadata)
        }

    def read(self, name: str) -> torch.Tensor:
        """One trained parameter, in the dtype it was trained in. Raises: UserError if it is damaged; MachineError."""
        key = PREFIX + name
        entry = self._metadata.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata)
        # NaN, so that a part that no shard covers cannot pass for trained weights
        tensor = torch.full(tuple(entry.size), torch.nan, dtype=entry.properties.dtype)
        with self._answering():
            planner = DefaultLoadPlanner()
            planner.set_up_planner({key: tensor}, self._metadata, is_coordinator=True)
            self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
            plan = self._reader.prepare_local_plan(planner.create_local_plan())
            self._reader.read_data(plan, planner).wait()
        return tensor

    def digest(self) -> str:
        """What identifies the checkpoint without reading it whole: hash of its record, names, sizes and samples.

        Of each file the store's ETag, on a local disk 16 samples of 4 KiB.
        """
        sha = hashlib.sha256()
        for name, size in sorted(self.storage.list().items()):
            tag = None if self.storage.is_local else self.storage.etag(name)
            sha.update(json.dumps([name, size, tag]).encode())
            if tag is None:
                for sample in range(_SAMPLES):
                    start = max((size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1), 0)
                    sha.update(self.storage.read(name, start, min(start + _SAMPLE_BYTES, size)))
        return sha.hexdigest()

    @cached_property
    def _reader(self) -> StateReader:
        return StateReader(self.storage)

    @cached_property
    def _metadata(self) -> Metadata:
        with self._answering():
            metadata: Metadata = self._reader.read_metadata()
        return metadata

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Errors of PyTorch and of the store, in this tool's words."""
        try:
            yield
        except (MachineError, UserError):
            raise
        except (FileNotFoundError, CheckpointException, *_DAMAGE) as error:
            raise UserError(
                f"training checkpoint {self.url}: is damaged ({explain(error)[:200]}); export another one"
            ) from error
        except Exception as error:  # each backend has its own classes
            raise MachineError(f"training checkpoint {self.url}: cannot be read ({explain(error)[:200]})") from error
