"""The tensors of pytorch_model.bin, read without torch and without running code.

torch saves weights as a pickle, which can call any function when it is loaded. Here, the pickle may contain only the
opcodes and names that `torch.save` writes for a dictionary of tensors; the names stand for classes of this module,
which only describe where a tensor is in the file. Anything else is an error.

References
----------
Python's documentation of pickle, "Restricting globals"; torch.serialization, for the two file formats: a zip archive
with uncompressed members since version 1.6, and before that a sequence of pickles followed by the contents.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import jax.numpy as jnp
import numpy as np

from lensjax._textfiles import unreadable
from lensjax.errors import InputError
from lensjax.models.checkpoints.safetensors_files import FileTensors

WEIGHTS = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"

OPCODES = frozenset(
    (
        *(
            "PROTO",
            "FRAME",
            "STOP",
            "MARK",
            "POP",
            "POP_MARK",
            "GLOBAL",
            "STACK_GLOBAL",
            "REDUCE",
            "BUILD",
            "BINPERSID",
        ),
        *("MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "NONE", "NEWTRUE", "NEWFALSE"),
        *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
        *("BINUNICODE", "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING"),
        *("EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "APPEND", "APPENDS"),
        *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    )
)
"""Opcodes of the pickles that `torch.save` writes for tensors, with protocols 2 to 5."""

STORAGES: Mapping[str, tuple[Any, str]] = {
    "DoubleStorage": (np.dtype("<f8"), "F64"),
    "FloatStorage": (np.dtype("<f4"), "F32"),
    "HalfStorage": (np.dtype("<f2"), "F16"),
    "BFloat16Storage": (jnp.dtype(jnp.bfloat16), "BF16"),
    "LongStorage": (np.dtype("<i8"), "I64"),
    "IntStorage": (np.dtype("<i4"), "I32"),
    "ShortStorage": (np.dtype("<i2"), "I16"),
    "CharStorage": (np.dtype("i1"), "I8"),
    "ByteStorage": (np.dtype("u1"), "U8"),
    "BoolStorage": (np.dtype("?"), "BOOL"),
}
"""Class of a storage in torch -> NumPy data type and its name in safetensors."""

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
"""The first two pickles of a file in the format before torch 1.6."""

MAX_DIMENSIONS = 8
MAX_READ = 1 << 20
"""Bytes of the longest string or number in a pickle."""


class Sealed:
    """An object that a pickle cannot change: loading calls `__setstate__` for the opcode that sets attributes."""

    def __setstate__(self, state: Any) -> None:
        raise ValueError("it sets attributes of a tensor")


@dataclasses.dataclass(frozen=True)
class StorageType(Sealed):
    """Data type of a storage; stands for a class such as torch.FloatStorage."""

    dtype: Any
    kind: str


@dataclasses.dataclass(frozen=True)
class Storage(Sealed):
    """A one-dimensional array in the file, which tensors are views of.

    Attributes
    ----------
    type : StorageType
    key : str
    size : int
        Number of elements.
    """

    type: StorageType
    key: str
    size: int


@dataclasses.dataclass(frozen=True)
class StoredTensor(Sealed):
    """A view of a storage: element (i, j, ...) is at `offset + i * strides[0] + j * strides[1] + ...`."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Constructor(Sealed):
    """Stands for a function of torch; a plain function would have attributes that a pickle could set."""

    function: Callable[..., StoredTensor]

    def __call__(self, *arguments: Any) -> StoredTensor:
        """Return the tensor that the arguments in the pickle describe."""
        return self.function(*arguments)


class _Dict(dict[Any, Any]):
    """Stands for collections.OrderedDict; ignores attributes, of which torch saves the modules' versions."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


def _size(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a size")
    return value


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> StoredTensor:
    """Stands for torch._utils._rebuild_tensor_v2; checks that the tensor lies inside its storage."""
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise ValueError("a tensor is not a view of a storage")
    if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"a tensor has shape {shape} and strides {strides}")
    tensor = StoredTensor(storage, _size(offset), tuple(map(_size, shape)), tuple(map(_size, strides)))
    count = math.prod(tensor.shape)
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    if count > storage.size or (count and last >= storage.size):
        raise ValueError(f"a tensor of shape {shape} goes beyond its storage of {storage.size} elements")
    return tensor


def _parameter(tensor: Any, *_: Any) -> StoredTensor:
    """Stands for torch._utils._rebuild_parameter."""
    if not isinstance(tensor, StoredTensor):
        raise ValueError("a parameter is not a tensor")
    return tensor


NAMES: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Dict,
    ("torch._utils", "_rebuild_tensor_v2"): Constructor(_tensor),
    ("torch._utils", "_rebuild_parameter"): Constructor(_parameter),
    **{("torch", name): StorageType(*values) for name, values in STORAGES.items()},
}
"""What may be named in a pickle -> what it stands for here. None of these does more than describe a tensor."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in NAMES:
            raise ValueError(f"it names {module}.{name}, which is no part of a tensor")
        return NAMES[module, name]

    def persistent_load(self, pid: Any) -> Storage:
        # In the old format, a sixth entry describes views of storages, which torch no longer writes.
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage" or pid[5:] not in ((), (None,)):
            raise ValueError("it refers to something that is not a storage")
        if not isinstance(pid[1], StorageType) or not isinstance(pid[2], str):
            raise ValueError("a storage has no type or no key")
        return Storage(pid[1], pid[2], _size(pid[4]))


class _Limited:
    """A stream that never reads more than `MAX_READ` bytes at a time: a length in a damaged file can be any number."""

    def __init__(self, stream: BinaryIO):
        self.tell = stream.tell
        self._stream = stream

    def read(self, size: int) -> bytes:
        return self._stream.read(min(size, MAX_READ))

    def readline(self) -> bytes:
        return self._stream.readline(MAX_READ)


def load_restricted(stream: BinaryIO) -> Any:
    """Return the object of one pickle, which may contain only what `torch.save` writes for tensors.

    Raises
    ------
    ValueError
        If it contains anything else, or is not a pickle.
    """
    start = stream.tell()
    for count, (opcode, argument, _) in enumerate(pickletools.genops(cast("IO[bytes]", _Limited(stream)))):
        if opcode.name not in OPCODES:
            raise ValueError(f"its opcode {opcode.name} is not needed for tensors")
        # The unpickler allocates as much as the largest index says.
        if opcode.name in ("BINPUT", "LONG_BINPUT") and int(argument or 0) > count:
            raise ValueError("it has a wrong index")
    end = stream.tell()
    stream.seek(start)
    content = stream.read(end - start)
    try:
        return _Unpickler(io.BytesIO(content), encoding="latin-1").load()
    except (pickle.UnpicklingError, TypeError, AttributeError, IndexError, KeyError, EOFError, RecursionError) as error:
        raise ValueError(f"it is damaged: {error}") from error


def _zip_offsets(file: Path) -> tuple[Any, dict[str, tuple[int, int]]]:
    """Return the object of a file in the zip format, and the storages: key -> position and size in bytes."""
    length = file.stat().st_size
    with zipfile.ZipFile(file) as archive, file.open("rb") as stream:
        members = {info.filename: info for info in archive.infolist()}
        root = next((name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")), None)
        if root is None:
            raise ValueError("it has no data.pkl")
        offsets = {}
        for name, info in members.items():
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                raise ValueError(f"its member {name} is compressed")
            if info.header_offset + info.file_size > length:
                raise ValueError("it ends too early")
            # The header of a member is 30 bytes, and the lengths of its name and extra field are in the last four.
            stream.seek(info.header_offset + 26)
            lengths = np.frombuffer(stream.read(4), "<u2")
            if len(lengths) != 2:
                raise ValueError("it ends too early")
            offsets[name] = (info.header_offset + 30 + int(lengths.sum()), info.file_size)
        start, size = offsets.get(f"{root}byteorder", (0, 0))
        stream.seek(start)
        if size and stream.read(min(size, 8)) != b"little":
            raise ValueError("it is not little-endian")
        start, size = offsets[f"{root}data.pkl"]
        stream.seek(start)
        content = load_restricted(io.BytesIO(stream.read(size)))
    data = f"{root}data/"
    return content, {name.removeprefix(data): span for name, span in offsets.items() if name.startswith(data)}


def _old_offsets(file: Path) -> tuple[Any, dict[str, tuple[int, int]]]:
    """Return the same as `_zip_offsets` for a file in the format before torch 1.6."""
    with file.open("rb") as stream:
        if load_restricted(stream) != MAGIC or load_restricted(stream) != PROTOCOL:
            raise ValueError("it is not a file of torch.save")
        load_restricted(stream)  # sizes of C types on the machine that wrote it
        content = load_restricted(stream)
        keys = load_restricted(stream)
        if not isinstance(keys, list):
            raise ValueError("it has no list of storages")
        if not isinstance(content, dict):
            return content, {}
        storages = {tensor.storage.key: tensor.storage for tensor in content.values() if _is_tensor(tensor)}
        offsets = {}
        for key in keys:
            head = stream.read(8)
            if key not in storages or len(head) < 8 or int.from_bytes(head, "little") != storages[key].size:
                raise ValueError("its storages are not those of its tensors")
            size = storages[key].size * storages[key].type.dtype.itemsize
            offsets[key] = (stream.tell(), size)
            stream.seek(size, io.SEEK_CUR)
    return content, offsets


def _is_tensor(value: Any) -> bool:
    return isinstance(value, StoredTensor)


def read_header(file: Path) -> dict[str, tuple[StoredTensor, int]]:
    """Return the tensors of a file of torch.save and the position of each one's storage in bytes.

    Raises
    ------
    ValueError
        If the file is no dictionary of tensors, or is damaged.
    """
    try:
        content, offsets = (_zip_offsets if zipfile.is_zipfile(file) else _old_offsets)(file)
    except (zipfile.BadZipFile, NotImplementedError, OverflowError, RecursionError, UnicodeError) as error:
        raise ValueError(str(error)) from error
    if not isinstance(content, dict) or not content:
        raise ValueError("it is not a dictionary of tensors")
    length = file.stat().st_size
    tensors = {}
    for name, tensor in content.items():
        if not isinstance(name, str) or not _is_tensor(tensor):
            raise ValueError(f"its entry {str(name)[:80]!r} is not a tensor")
        storage = tensor.storage
        start, size = offsets.get(storage.key, (0, -1))
        if size != storage.size * storage.type.dtype.itemsize:
            raise ValueError(f"the storage of {name} has another size than it should")
        if start + size > length:
            raise ValueError("it ends too early")
        tensors[name] = (tensor, start)
    return tensors


class PickledTensors(FileTensors):
    """The tensors of pytorch_model.bin, or of its shards.

    Parameters
    ----------
    directory : Path
        With at least one of `WEIGHTS` and `INDEX`.
    source : str
        Names the checkpoint in error messages.

    Raises
    ------
    InputError
        If a file is missing, damaged, or contains anything but tensors.
    """

    def __init__(self, directory: Path, source: str):
        self.source = source
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.kinds: dict[str, str] = {}
        self._tensors: dict[str, tuple[Path, StoredTensor, int]] = {}
        for file in pickled_files(directory, source):
            try:
                tensors = read_header(file)
            except (ValueError, OSError) as error:
                reason = unreadable(file, error, "download it again, or convert it to safetensors")
                raise InputError(f"{file}: cannot be read as weights of PyTorch{reason}.") from error
            for name, (tensor, start) in tensors.items():
                if name in self._tensors:
                    raise InputError(f"{source}: tensor {name} is in two shards, {self._tensors[name][0]} and {file}.")
                self._tensors[name] = (file, tensor, start)
                self.shapes[name], self.kinds[name] = tensor.shape, tensor.storage.type.kind

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return entries `start` to `stop` of the tensor's first axis, as stored; all of a scalar."""
        file, tensor, position = self._tensors[name]
        dtype, shape, strides, offset = tensor.storage.type.dtype, tensor.shape, tensor.strides, tensor.offset
        if shape:
            offset, shape = offset + start * strides[0], (max(0, min(stop, shape[0]) - start), *shape[1:])
        if not math.prod(shape):
            return np.empty(shape, dtype)
        count = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        with file.open("rb") as stream:
            stream.seek(position + offset * dtype.itemsize)
            values = np.frombuffer(stream.read(count * dtype.itemsize), dtype)
        if len(values) != count:
            raise InputError(f"{file}: ends before the tensor {name} does; download it again.")
        return np.lib.stride_tricks.as_strided(
            values, shape, [stride * dtype.itemsize for stride in strides], writeable=False
        )


def has_pickled_weights(directory: Path) -> bool:
    """Return whether a directory has weights in the format that `PickledTensors` reads."""
    return (directory / WEIGHTS).is_file() or (directory / INDEX).is_file()


def pickled_files(directory: Path, source: str) -> list[Path]:
    """Return pytorch_model.bin or its shards.

    Raises
    ------
    InputError
        If the index is not valid, or a shard is missing.
    """
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    index = directory / INDEX
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(f"{index}: is not a valid index of shards ({error!r}); download it again.") from error
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise InputError(f"{index}: names shards outside its directory; download it again.")
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise InputError(f"{source}: shards named in {INDEX} are missing: {', '.join(missing)}; download them again.")
    return [directory / name for name in names]
