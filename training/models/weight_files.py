"""The weights of a model to deploy, written as they come, one tensor at a time.

In: (name, whole tensor) pairs, which the ranks gather one after another; the model, for its configuration. Out: its
safetensors files of at most 4 GiB, with an index where there are several, and config.json, as transformers writes them.
Cost: memory of one tensor. The header stands before tensors that are not known yet, so room for it is kept, and what is
left of the room is filled with spaces, as the format allows.

Some architectures have other names in their files than in the model. They are written a second time, from the files of
the first, which are mapped into memory.
"""

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from training.models.loss import causal_model
from training.models.shards import INDEX, shards, tensors_of

FILE_BYTES = 4 << 30
ENTRY_BYTES = 160  # of a tensor in a header, without its name
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass
class Files:
    """The files so far; the last one is open."""

    directory: Path
    room: int  # for a header
    paths: list[Path] = field(default_factory=list)
    names: list[list[str]] = field(default_factory=list)  # of the tensors in each file
    num_bytes: int = 0  # of all tensors
    stream: BinaryIO | None = None
    header: dict[str, Any] = field(default_factory=dict)
    offset: int = 0  # in the open file, behind the header

    def add(self, name: str, value: Tensor) -> None:
        """One more tensor, in a new file where the open one would become too large."""
        if self.stream is None or (self.offset and self.offset + value.nbytes > FILE_BYTES):
            self._open()
        assert self.stream, "opened above"
        end = self.offset + value.nbytes
        place = {"dtype": DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": [self.offset, end]}
        self.header[name] = place
        self.stream.write(value.contiguous().flatten().view(torch.uint8).numpy().data)
        self.names[-1].append(name)
        self.offset = end
        self.num_bytes += value.nbytes

    def _open(self) -> None:
        self.close()
        self.paths.append(self.directory / f".{len(self.paths)}.safetensors")
        self.names.append([])
        self.stream = open(self.paths[-1], "wb")  # noqa: SIM115  # `close` closes it
        self.stream.seek(8 + self.room)
        self.header, self.offset = {"__metadata__": {"format": "pt"}}, 0

    def close(self) -> None:
        """Put the header of the open file into its room; the file is on the disk then."""
        if self.stream is None:
            return
        text = json.dumps(self.header).encode().ljust(self.room)
        assert len(text) == self.room, f"the header takes {len(text)} bytes, there is room for {self.room}"
        self.stream.seek(0)
        self.stream.write(len(text).to_bytes(8, "little") + text)
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.stream.close()
        self.stream = None

    def publish(self) -> None:
        """Close, name the files as transformers does, and write the index of several."""
        self.close()
        count, weight_map = len(self.paths), {}
        for number, path in enumerate(self.paths):
            name = f"model-{number + 1:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"
            path.rename(self.directory / name)
            weight_map.update(dict.fromkeys(self.names[number], name))
        if count > 1:
            index = {"metadata": {"total_size": self.num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            (self.directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_streamed(model: Any, weights: Iterable[tuple[str, Tensor]], directory: Path) -> None:
    """Files of weights and config.json of a whole model; takes the weights one by one."""
    directory.mkdir(parents=True, exist_ok=True)
    causal = causal_model(model)
    causal.save_pretrained(directory, state_dict={})  # all but the weights
    names = list(model.state_dict())
    files = Files(directory, sum(len(json.dumps(name)) + ENTRY_BYTES for name in names) // 8 * 8 + 64)
    left_out = set(causal._keys_to_ignore_on_save or ())
    for name, value in weights:
        if name not in left_out:
            files.add(name, value)
    files.publish()
    if _has_other_names(causal, directory):
        _write_as_transformers_does(causal, directory)


def _has_other_names(causal: Any, directory: Path) -> bool:
    """Whether transformers would write tensors of other names or shapes: tried with tensors that hold nothing."""
    from transformers.core_model_loading import revert_weight_conversion

    written = {
        name: torch.empty(info.shape, dtype=torch.int8, device="meta") for name, info in tensors_of(directory).items()
    }
    reverted = revert_weight_conversion(causal, dict(written))
    return {name: value.shape for name, value in reverted.items()} != {name: v.shape for name, v in written.items()}


def _write_as_transformers_does(causal: Any, directory: Path) -> None:
    """Once more, by transformers, from what has been written."""
    raw = directory / ".raw"
    raw.mkdir()
    for path in [*shards(directory), *directory.glob(INDEX)]:
        path.rename(raw / path.name)
    state = {name: info.read() for name, info in tensors_of(raw).items()}
    causal.save_pretrained(directory, state_dict=state, max_shard_size=FILE_BYTES)
    shutil.rmtree(raw)
