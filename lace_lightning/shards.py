"""Checkpoints as folders: every process writes its part of the tensors, and any number of processes reads them.

```text
last.ckpt/
    meta.pt           what is no tensor, and where in the shards each tensor lies; replaced in one step
    shards-1f0c…/     files of torch.distributed.checkpoint, one or more for each process that wrote
```

Only tensors go through ``torch.distributed.checkpoint``, whose own index and objects are pickles that would be run when
they are read: our index is plain data in ``meta.pt``, which torch's restricted reader takes.
"""

from __future__ import annotations

import io
import shutil
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from lace_lightning.whole_file import whole_file

META = "meta.pt"
"""The file that makes a folder a checkpoint; Lightning's name for it."""
_INDEX = "lace_shards"
_STATE, _OPTIMIZERS = "state_dict", "optimizer_states"

Index = dict[str, dict[str, Any]]
"""Tensor name -> its size, dtype and chunks: (offsets, sizes, file, first byte, bytes)."""


class CheckpointError(ValueError):
    """A checkpoint does not hold what it should; the message names file and reason."""


def is_sharded(path: str | Path) -> bool:
    """Whether a path is a checkpoint in shards."""
    return (Path(path) / META).is_file()


# ---------------------------------------------------------------- a checkpoint as flat tensors and the rest


def split(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The large tensors of a checkpoint by flat name, and the checkpoint without them.

    Args:
        checkpoint: Lightning's, with optimizer states by parameter name.
    """
    tensors = {f"{_STATE}/{name}": tensor for name, tensor in checkpoint[_STATE].items()}
    rest = {**checkpoint, _STATE: {}, _OPTIMIZERS: []}
    for number, optimizer in enumerate(checkpoint.get(_OPTIMIZERS, [])):
        values: dict[str, dict[str, Any]] = {}
        for name, moments in optimizer["state"].items():
            values[name] = {key: value for key, value in moments.items() if not isinstance(value, Tensor)}
            large = {key: value for key, value in moments.items() if isinstance(value, Tensor)}
            tensors |= {f"{_OPTIMIZERS}/{number}/{name}/{key}": value for key, value in large.items()}
        rest[_OPTIMIZERS].append({**optimizer, "state": values})
    return tensors, rest


def join(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`split`."""
    checkpoint = {**rest, _STATE: {}, _OPTIMIZERS: [{**o, "state": dict(o["state"])} for o in rest[_OPTIMIZERS]]}
    for flat, tensor in tensors.items():
        kind, name = flat.split("/", 1)
        if kind == _STATE:
            checkpoint[_STATE][name] = tensor
        else:
            number, name, key = name.split("/")
            state = checkpoint[_OPTIMIZERS][int(number)]["state"]
            state[name] = {**state.get(name, {}), key: tensor}
    return checkpoint


def by_number(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state by parameter name as plain optimizers have it: by position in its groups."""
    names = [name for group in optimizer["param_groups"] for name in group["params"]]
    number = {name: i for i, name in enumerate(names)}
    groups = [{**group, "params": [number[name] for name in group["params"]]} for group in optimizer["param_groups"]]
    state = {number[name]: moments for name, moments in optimizer["state"].items()}
    return {"state": dict(sorted(state.items())), "param_groups": groups}


# ---------------------------------------------------------------- writing


def write(tensors: dict[str, Tensor], rest: bytes, path: Path, shards: str, group: Any, is_first: bool) -> None:
    """Write all shards, then let the folder point to them; a collective of all processes in ``group``.

    Args:
        tensors: by flat name, on the CPU; nothing else may change them meanwhile.
        rest: everything else, as :func:`frozen` made it.
        path: the checkpoint.
        shards: name of the new folder inside of it, the same on all processes.
        group: a process group on the CPU that nothing else uses meanwhile; None: this process alone.
        is_first: whether this process is the one that writes ``meta.pt``.
    """
    writer = dcp.FileSystemWriter(path / shards)
    metadata = dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)
    if is_first:
        checkpoint = torch.load(io.BytesIO(rest), weights_only=True)
        checkpoint[_INDEX] = {"folder": shards, "tensors": _index_of(metadata)}
        with whole_file(path / META) as unfinished:
            torch.save(checkpoint, unfinished)
        _remove_shards(path, except_for=shards)
        aside(path).unlink(missing_ok=True)


def aside(path: Path) -> Path:
    """Where an earlier checkpoint of the other form, file or folder, stands until the new one is written."""
    return path.with_name(f"{path.name}.before")


def remove_unfinished(path: Path) -> None:
    """Remove what killed processes left in a checkpoint's folder; no process may be writing it.

    A folder whose ``meta.pt`` cannot be read stays as it is. The file that one without was to replace comes back.
    """
    for left in path.glob(f".{META}.*.part"):
        left.unlink(missing_ok=True)
    if is_sharded(path):
        with suppress(Exception):  # torch raises many types on damaged files; whoever reads this one will say so
            _remove_shards(path, except_for=torch.load(path / META, weights_only=True, mmap=True)[_INDEX]["folder"])
    elif any(path.glob("shards-*")):
        _remove_shards(path, except_for=None)
        with suppress(OSError):  # there is more in it, or no such file
            path.rmdir()
            aside(path).replace(path)


def _remove_shards(path: Path, except_for: str | None) -> None:
    for shards in path.glob("shards-*"):
        if shards.name != except_for:
            shutil.rmtree(shards, ignore_errors=True)


def frozen(rest: Mapping[str, Any]) -> bytes:
    """What is no large tensor, as it is now."""
    stream = io.BytesIO()
    torch.save(dict(rest), stream)
    return stream.getvalue()


def _index_of(metadata: Metadata) -> Index:
    where = {(index.fqn, tuple(index.offset or ())): info for index, info in metadata.storage_data.items()}
    index: Index = {}
    for name, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        chunks = []
        for chunk in entry.chunks:
            info = where[name, tuple(chunk.offsets)]
            chunks.append((list(chunk.offsets), list(chunk.sizes), info.relative_path, info.offset, info.length))
        index[name] = {"size": list(entry.size), "dtype": entry.properties.dtype, "chunks": chunks}
    return index


# ---------------------------------------------------------------- reading


class ShardReader:
    """The tensors of a sharded checkpoint.

    Args:
        path: the checkpoint.
        meta: content of its ``meta.pt``.

    Raises:
        CheckpointError: ``meta`` names no shards, or shards outside of the checkpoint.
    """

    def __init__(self, path: str | Path, meta: dict[str, Any]) -> None:
        self.path = Path(path)
        try:
            named, self.index = meta[_INDEX]["folder"], dict(meta[_INDEX]["tensors"])
            self.folder, self._metadata = self.path / named, _metadata_of(self.index)
            files = {Path(chunk[2]).as_posix() for entry in self.index.values() for chunk in entry["chunks"]}
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"checkpoint {path} is damaged or foreign: {META} names no shards ({error!r})"
            ) from error
        if outside := [name for name in (named, *files) if name == ".." or Path(name).name != name]:
            raise CheckpointError(f"checkpoint {path} is foreign: it names {outside[0]}, outside of its folder")
        self.rest = {key: value for key, value in meta.items() if key != _INDEX}

    def check(self, part: int = 0, parts: int = 1) -> None:
        """Raise CheckpointError if a chunk is missing, cut or has a wrong checksum; looks at every ``parts``-th."""
        chunks = [(name, chunk) for name, entry in sorted(self.index.items()) for chunk in entry["chunks"]]
        for name, (_, _, file, start, length) in chunks[part::parts]:
            try:
                with (self.folder / file).open("rb") as stream:
                    stream.seek(start)
                    with zipfile.ZipFile(io.BytesIO(stream.read(length))) as archive:  # torch ignores the checksums
                        damaged = archive.testzip()
            except (OSError, zipfile.BadZipFile, ValueError) as error:
                raise CheckpointError(f"{self.folder / file} cannot be read: {name}: {error}") from error
            if damaged is not None:
                raise CheckpointError(f"{self.folder / file} is damaged: the checksum of {name} is wrong")

    def read_into(self, tensors: dict[str, Tensor], group: Any = None) -> None:
        """Fill tensors, sharded in whatever way; a collective of ``group``, or of this process alone."""
        reader = _Reader(self.folder, self._metadata)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it should be
            dcp.load(tensors, storage_reader=reader, process_group=group, no_dist=group is None)

    def checkpoint(self) -> dict[str, Any]:
        """All of it on the CPU of this process, laid out like a checkpoint of one file."""
        self.check()
        tensors = {name: torch.empty(entry["size"], dtype=entry["dtype"]) for name, entry in self.index.items()}
        self.read_into(tensors)
        whole = join(tensors, self.rest)
        return {**whole, _OPTIMIZERS: [by_number(optimizer) for optimizer in whole[_OPTIMIZERS]]}


class _Reader(dcp.FileSystemReader):
    """DCP's reader, which is told the index instead of unpickling one."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


def _metadata_of(index: Index) -> Metadata:
    entries: dict[str, Any] = {}
    where = {}
    for name, entry in index.items():
        chunks = [
            ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes, *_ in entry["chunks"]
        ]
        properties = TensorProperties(dtype=entry["dtype"])
        entries[name] = TensorStorageMetadata(properties, torch.Size(entry["size"]), chunks)
        for number, (offsets, _, file, start, length) in enumerate(entry["chunks"]):
            where[MetadataIndex(name, torch.Size(offsets), number)] = _StorageInfo(file, start, length)
    return Metadata(entries, storage_data=where)
