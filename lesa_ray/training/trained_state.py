"""The trained parameters of a training checkpoint, read one at a time, whole, by a single process.

The checkpoint is a folder of PyTorch's distributed checkpoint (DCP): each worker's file holds its shards of every
tensor, `.metadata` says where they are. Each shard is one range read, so memory is bounded by the largest tensor
(about twice: the tensor and a shard of it), and neither the optimizer's state nor frozen weights are touched.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from lesa_ray.checkpoint.storage import Storage
from lesa_ray.errors import MachineError, UserError
from lesa_ray.faults import explain
from lesa_ray.training.state_files import METADATA_FILE, StateReader

PREFIX = "model."
_SAMPLES, _SAMPLE_BYTES = 16, 4096
_DAMAGE = (RuntimeError, ValueError, KeyError, AssertionError, AttributeError, EOFError, pickle.UnpicklingError)
"""What PyTorch raises where the bytes are not what the metadata say."""


class TrainedState:
    """The `model.*` tensors of a DCP folder, or some of them. Picklable by its URL; some, with where they lie."""

    def __init__(self, url: str, part: Metadata | None = None) -> None:
        """part: the metadata of some tensors, as `of` makes them; by default they are read, of all.

        Raises: UserError if there is no such checkpoint; MachineError if the store does not answer."""
        self.storage = Storage(url)
        self.url = self.storage.url
        self._part = part
        if part is None and not self.storage.exists(METADATA_FILE):
            raise UserError(f"training checkpoint {url}: there is no {METADATA_FILE} in it; it was not finished")

    def __reduce__(self) -> tuple[type[TrainedState], tuple[str, Metadata | None]]:
        return TrainedState, (self.url, self._part)

    def of(self, names: Iterable[str]) -> TrainedState:
        """Some of the trained parameters.

        Of hundreds of workers the metadata are hundreds of megabytes, which not everyone should read who reads a few
        tensors."""
        keys = [PREFIX + name for name in names if name in self.shapes]
        entries = {key: self._metadata.state_dict_metadata[key] for key in keys}
        places = {index: place for key in keys for index, place in self._places[key].items()}
        return TrainedState(self.url, replace(self._metadata, state_dict_metadata=entries, storage_data=places))

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
        """One trained parameter, in the dtype it was trained in. Several threads may read at once.

        Raises: UserError if it is damaged; MachineError."""
        key = PREFIX + name
        entry = self._metadata.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata)
        # NaN, so that a part that no shard covers cannot pass for trained weights
        tensor = torch.full(tuple(entry.size), torch.nan, dtype=entry.properties.dtype)
        with self._answering():
            planner = DefaultLoadPlanner()
            planner.set_up_planner({key: tensor}, self._metadata, is_coordinator=True)
            reader = StateReader(self.storage)  # one serves one thread
            reader.set_up_storage_reader(self._metadata, is_coordinator=True)
            plan = reader.prepare_local_plan(planner.create_local_plan())
            reader.read_data(plan, planner).wait()
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
    def _metadata(self) -> Metadata:
        if self._part is not None:
            return self._part
        with self._answering():
            metadata = StateReader(self.storage).read_metadata()
        # the optimizer's are two thirds
        entries = {key: entry for key, entry in metadata.state_dict_metadata.items() if key.startswith(PREFIX)}
        places = {index: place for index, place in metadata.storage_data.items() if index.fqn in entries}
        return replace(metadata, state_dict_metadata=entries, storage_data=places)

    @cached_property
    def _places(self) -> dict[str, dict[MetadataIndex, Any]]:
        """Where the shards of each tensor lie."""
        found: dict[str, dict[MetadataIndex, Any]] = {key: {} for key in self._metadata.state_dict_metadata}
        for index, place in self._metadata.storage_data.items():
            found[index.fqn][index] = place
        return found

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
