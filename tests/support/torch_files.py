"""Files as `torch.save` writes them, made without torch."""

import contextlib
import io
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict

import jax.numpy as jnp
import numpy as np

from lensjax.models.checkpoints import pickled

STORAGE_OF = {
    "<f4": "FloatStorage",
    "<f2": "HalfStorage",
    "|u1": "ByteStorage",
    "<i8": "LongStorage",
    "|b1": "BoolStorage",
}


class Tensor:
    """A view of a storage, which the pickle of these tests writes as torch writes a tensor."""

    def __init__(self, storage, offset, shape, strides, size=None):
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides
        self.size = storage.size if size is None else size


def whole(array):
    array = np.asarray(array)
    return Tensor(
        np.ravel(array), 0, array.shape, tuple(s // array.itemsize for s in np.ascontiguousarray(array).strides)
    )


def stand_in(name):
    """Return a function that pickles as the one of this name in torch._utils."""

    def build(*_):
        raise AssertionError("a function of torch was called")

    build.__module__, build.__name__, build.__qualname__ = "torch._utils", name, name
    return build


@contextlib.contextmanager
def modules():
    """Have modules with the names that torch's pickles contain, for pickle looks them up when it writes."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in pickled.STORAGES:
        setattr(torch, name, type(name, (), {"__module__": "torch"}))
    functions = {name: stand_in(name) for name in ("_rebuild_tensor_v2", "_rebuild_parameter")}
    vars(utils).update(functions)
    before = {name: sys.modules.get(name) for name in ("torch", "torch._utils")}
    sys.modules |= {"torch": torch, "torch._utils": utils}
    try:
        yield torch, functions
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def write(path, content, layout="zip", parameters=False, compression=zipfile.ZIP_STORED, order=b"little"):
    """Write a dictionary of `Tensor` as torch does, in the zip format or the one before it."""
    storages = {}

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            if isinstance(obj, tuple) and len(obj) == 2 and obj[0] == "a storage":
                tensor = obj[1]
                key = storages.setdefault(id(tensor.storage), (str(len(storages)), tensor))[0]
                dtype = tensor.storage.dtype
                name = "BFloat16Storage" if dtype == jnp.bfloat16 else STORAGE_OF[dtype.str]
                pid = ("storage", getattr(torch, name), key, "cpu", tensor.size)
                return pid if layout == "zip" else (*pid, None)
            return None

        def reducer_override(self, obj):
            if not isinstance(obj, Tensor):
                return NotImplemented
            arguments = (("a storage", obj), obj.offset, obj.shape, obj.strides, False, OrderedDict())
            if parameters and not getattr(obj, "inner", False):
                inner = Tensor(obj.storage, obj.offset, obj.shape, obj.strides, obj.size)
                inner.inner = True
                return functions["_rebuild_parameter"], (inner, True, OrderedDict())
            return functions["_rebuild_tensor_v2"], arguments

    data = io.BytesIO()
    with modules() as (torch, functions):
        Pickler(data, protocol=2).dump(content)
    arrays = {key: tensor.storage for key, tensor in storages.values()}
    if layout == "zip":
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr("archive/data.pkl", data.getvalue())
            archive.writestr("archive/byteorder", order)
            for key, array in arrays.items():
                archive.writestr(f"archive/data/{key}", array.tobytes())
        return
    parts = [pickle.dumps(part, protocol=2) for part in (pickled.MAGIC, pickled.PROTOCOL, {"little_endian": True})]
    parts += [data.getvalue(), pickle.dumps(sorted(arrays), protocol=2)]
    for key in sorted(arrays):
        parts += [struct.pack("<q", arrays[key].size), arrays[key].tobytes()]
    path.write_bytes(b"".join(parts))
