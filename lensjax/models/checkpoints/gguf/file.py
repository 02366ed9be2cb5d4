"""The header of a GGUF file: its metadata fields, and the position of each tensor.

The reader of the gguf package keeps several NumPy views of each string, which takes seconds and 120 MB for the 98,000
tokens and merges of SmolLM2. Therefore the header is read here; names, types and dequantisation are the package's.
"""

from __future__ import annotations

import dataclasses
import math
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lensjax._messages import nearby
from lensjax._textfiles import unreadable
from lensjax.errors import InputError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
"""Type number of a field -> NumPy type string."""
STRING, ARRAY = 8, 9
ALIGNMENT = 32
"""Alignment of the tensors in bytes if the file has no general.alignment."""


def is_gguf(name_or_path: str | os.PathLike[str]) -> bool:
    """Return whether a model is named by the path of a GGUF file."""
    return os.fspath(name_or_path).lower().endswith(".gguf")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Shape, type and position of a tensor.

    Attributes
    ----------
    shape : tuple of int
        Outermost dimension first, as in NumPy.
    kind : gguf.GGMLQuantizationType
    offset : int
        Position of its contents in the file, in bytes.
    """

    shape: tuple[int, ...]
    kind: Any
    offset: int

    def bytes_of(self, elements: int) -> int:
        """Return the size in bytes of a number of elements, which must fill complete quantisation blocks."""
        from gguf.constants import GGML_QUANT_SIZES

        block, size = GGML_QUANT_SIZES[self.kind]
        return elements // block * size


@dataclasses.dataclass
class GGUFFile:
    """A GGUF file's header.

    Attributes
    ----------
    path : str
    fields : dict
        Name -> number, bool, str, or list of these.
    tensors : dict
        Name -> `StoredTensor`.
    """

    path: str
    fields: dict[str, Any]
    tensors: dict[str, StoredTensor]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> GGUFFile:
        """Read the header of a file.

        Raises
        ------
        InputError
            If the file does not exist, is damaged, has an unsupported version, or is one part of several.
        """
        source = os.fspath(path)
        file = Path(path).expanduser()
        if not file.is_file():
            raise InputError(f"{source}: no such file; name a GGUF file that is there.{nearby(file)}")
        with file.open("rb") as stream:
            try:
                fields, tensors = _Reader(stream).header()
            except (ValueError, RecursionError) as error:
                raise InputError(f"{source}: cannot be read as GGUF{unreadable(file, error)}.") from error
        parts = fields.get("split.count", 1)
        if not isinstance(parts, int) or parts > 1:
            raise InputError(
                f"{source}: is one of {parts!r} parts of a model; join them with llama.cpp's llama-gguf-split --merge."
            )
        return cls(str(file), fields, tensors)

    def text(self, name: str) -> str | None:
        """Return the value of a field that must be text, or None if the file does not have it."""
        value = self.fields.get(name)
        if value is not None and not isinstance(value, str):
            raise InputError(f"{self.path}: the field {name} is {value!r}; it must be text: convert the model again.")
        return value

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return entries `start` to `stop` of a tensor's first axis, dequantised to float32.

        Raises
        ------
        InputError
            If the gguf package cannot dequantise it, or the file has been truncated since it was opened.
        """
        tensor = self.tensors[name]
        stop = tensor.shape[0] if stop is None else stop
        inner = math.prod(tensor.shape[1:])
        count = tensor.bytes_of((stop - start) * inner)
        # Not memory-mapped: pages read from a mapped file count as memory as long as it is open.
        with open(self.path, "rb") as stream:
            stream.seek(tensor.offset + tensor.bytes_of(start * inner))
            data = np.fromfile(stream, np.uint8, count)
        if len(data) != count:
            raise InputError(f"{self.path}: ends before the tensor {name} does; download it again.")
        array = self._dequantised(name, data.reshape(-1, tensor.bytes_of(tensor.shape[-1])))
        return array.reshape(stop - start, *tensor.shape[1:])

    def check_kinds(self) -> None:
        """Check that all tensors can be dequantised, without reading any.

        Raises
        ------
        InputError
        """
        from gguf.constants import GGML_QUANT_SIZES

        for name in {tensor.kind: name for name, tensor in reversed(self.tensors.items())}.values():
            self._dequantised(name, np.zeros((1, GGML_QUANT_SIZES[self.tensors[name].kind][1]), np.uint8))

    def _dequantised(self, name: str, data: np.ndarray) -> np.ndarray:
        from gguf.quants import dequantize

        kind = self.tensors[name].kind
        try:
            return dequantize(data, kind)
        except NotImplementedError as error:
            raise InputError(
                f"{self.path}: the tensor {name} is stored as {kind.name}, which the gguf package does not "
                "dequantise; use a file of another quantisation."
            ) from error


class _Reader:
    """Reads values one after the other."""

    def __init__(self, stream: BinaryIO):
        self.stream = stream
        self.left = os.fstat(stream.fileno()).st_size

    def take(self, count: int) -> bytes:
        # Checked before reading, because a length in a damaged file can be any number.
        if count > self.left:
            raise ValueError("it ends too early")
        self.left -= count
        return self.stream.read(count)

    def number(self, code: str) -> int:
        size = struct.calcsize(f"<{code}")
        return int(struct.unpack(f"<{code}", self.take(size))[0])

    def string(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if inner in SCALARS:
                dtype = np.dtype(SCALARS[inner])
                return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
            if count > self.left:
                raise ValueError("it ends too early")
            return [self.value(inner) for _ in range(count)]
        if kind not in SCALARS:
            raise ValueError(f"a value of unknown type {kind}")
        dtype = np.dtype(SCALARS[kind])
        return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()

    def header(self) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
        from gguf.constants import GGMLQuantizationType

        size = self.left
        if self.take(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self.number("I")
        if version not in VERSIONS:
            # A big-endian file appears to have a version of many millions.
            raise ValueError(f"version {version} is not one of {VERSIONS}, little-endian")
        tensor_count, field_count = self.number("Q"), self.number("Q")
        fields: dict[str, Any] = {}
        for _ in range(field_count):
            name = self.string()
            fields[name] = self.value(self.number("I"))
        tensors, known = {}, {int(kind) for kind in GGMLQuantizationType}
        for _ in range(tensor_count):
            name = self.string()
            shape = [self.number("Q") for _ in range(self.number("I"))]
            number, offset = self.number("I"), self.number("Q")
            if number not in known:
                raise ValueError(f"the tensor {name} is of type {number}, which this gguf package does not know")
            tensors[name] = StoredTensor(tuple(reversed(shape)), GGMLQuantizationType(number), offset)
        alignment = fields.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        start = -(-(size - self.left) // alignment) * alignment
        tensors = {name: dataclasses.replace(tensor, offset=start + tensor.offset) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            if tensor.offset + tensor.bytes_of(math.prod(tensor.shape)) > size:
                raise ValueError(f"it ends before the tensor {name} does")
        return fields, tensors
