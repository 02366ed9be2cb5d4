"""Weights in pytorch_model.bin: read as torch writes them, and nothing in them is run."""

import io
import json
import pickle
import tracemalloc
import zipfile
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lensjax.errors import InputError
from lensjax.models import check_checkpoint, init_model, load_model, save_pretrained
from lensjax.models.checkpoints import pickled
from lensjax.models.checkpoints.pickled import PickledTensors, load_restricted
from lensjax.models.checkpoints.saving import export_tensors
from support.torch_files import Tensor, whole, write

CONFIG = {
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
LAYOUTS = ["zip", "old"]


@pytest.fixture
def model(tmp_path):
    model = init_model(CONFIG, jax.random.key(0))
    save_pretrained(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    return model


def state_dict(model):
    state = OrderedDict((name, whole(array)) for name, array in export_tensors(model).items())
    state._metadata = OrderedDict(version=1)  # torch saves it as an attribute
    return state


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("parameters", [False, True])
def test_weights_equal_those_that_were_saved(layout, parameters, model, tmp_path):
    state = state_dict(model)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = whole(np.arange(2, dtype=np.float32))
    write(tmp_path / "pytorch_model.bin", state, layout, parameters)
    assert check_checkpoint(tmp_path).layers == 2
    found = export_tensors(load_model(tmp_path))
    assert found.keys() == export_tensors(model).keys()
    for name, value in export_tensors(model).items():
        np.testing.assert_array_equal(found[name], value, strict=True)


def test_shards_are_read_by_their_index(model, tmp_path):
    state = state_dict(model)
    names = list(state)
    parts = {"pytorch_model-00001-of-00002.bin": names[:5], "pytorch_model-00002-of-00002.bin": names[5:]}
    for file, part in parts.items():
        write(tmp_path / file, {name: state[name] for name in part})
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    found = export_tensors(load_model(tmp_path))
    for name, value in export_tensors(model).items():
        np.testing.assert_array_equal(found[name], value)
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(InputError, match=r"shards named in .* are missing: pytorch_model-00002-of-00002\.bin"):
        load_model(tmp_path)
    for outside in ("../secret.bin", "/secret.bin"):
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": outside}}))
        with pytest.raises(InputError, match="names shards outside its directory"):
            load_model(tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16, np.int64, np.uint8, np.bool_])
def test_views_of_a_storage_are_read_as_numpy_reads_them(layout, dtype, tmp_path):
    storage = np.arange(40).astype(dtype)
    views = {
        "transposed": (Tensor(storage, 3, (4, 5), (1, 4)), storage[3:23].reshape(5, 4).T),
        "part": (Tensor(storage, 7, (3, 2), (10, 2)), storage[7:].reshape(-1)[[[0, 2], [10, 12], [20, 22]]]),
        "scalar": (Tensor(storage, 39, (), ()), storage[39]),
        "vector": (Tensor(storage, 1, (39,), (1,)), storage[1:]),
        "empty": (Tensor(storage, 0, (0, 5), (5, 1)), storage[:0].reshape(0, 5)),
    }
    write(tmp_path / "pytorch_model.bin", {name: tensor for name, (tensor, _) in views.items()}, layout)
    tensors = PickledTensors(tmp_path, "test")
    for name, (_, expected) in views.items():
        assert tensors.shapes[name] == expected.shape
        found = tensors.rows(name, 0, expected.shape[0] if expected.ndim else 1)
        np.testing.assert_array_equal(found, expected, strict=True)
        if expected.ndim and len(expected) > 2:
            np.testing.assert_array_equal(tensors.rows(name, 1, 3), expected[1:3], strict=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "tensor",
    [
        lambda a: Tensor(a, 0, (5,), (1,)),
        lambda a: Tensor(a, 1, (4,), (1,)),
        lambda a: Tensor(a, 0, (2, 2), (3, 1)),
        lambda a: Tensor(a, -1, (2,), (1,)),
        lambda a: Tensor(a, 3, (2,), (-1,)),
        lambda a: Tensor(a, 0, (10**9,), (0,)),
        lambda a: Tensor(a, 0, (2.0,), (1,)),
        lambda a: Tensor(a, 0, (2,), (1, 1)),
        lambda a: Tensor(a, 0, (4,), (1,), size=4000),
        lambda a: Tensor(a, 0, (3,), (1,), size=3),
        lambda a: "text",
    ],
)
def test_tensors_that_do_not_lie_in_the_file_are_refused(layout, tensor, tmp_path):
    write(tmp_path / "pytorch_model.bin", {"a": tensor(np.ones(4, np.float32))}, layout)
    with pytest.raises(InputError, match=r"pytorch_model\.bin: cannot be read as weights of PyTorch \("):
        PickledTensors(tmp_path, "test")


class Runs:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("function", [print, eval, exec, getattr, __import__, open, pickle.loads, io.open_code])
def test_nothing_in_a_pickle_is_run(layout, protocol, function, tmp_path, capsys):
    hostile = pickle.dumps({"a": Runs(function, "print('it ran')")}, protocol=protocol)
    if layout == "zip":
        with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as archive:
            archive.writestr("archive/data.pkl", hostile)
    else:
        parts = [pickle.dumps(part, protocol=2) for part in (pickled.MAGIC, pickled.PROTOCOL, {})]
        (tmp_path / "pytorch_model.bin").write_bytes(b"".join([*parts, hostile]))
    with pytest.raises(InputError, match="cannot be read as weights of PyTorch"):
        PickledTensors(tmp_path, "test")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "content",
    [
        b"cos\nsystem\n(S'true'\ntR.",  # the classic, in protocol 0
        # Attributes of what stands for a function
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb.",
        b"\x80\x02ctorch\nFloatStorage\n}X\x05\x00\x00\x00dtypeK\x01sb.",  # and for a data type
        b"\x80\x02ctorch\nFloatStorage\n)R.",  # calling what cannot be called
        b"\x80\x02ctorch\nFloatStorage\n)\x81.",  # making an instance
        b"\x80\x02ccollections\nOrderedDict\nN}X\x01\x00\x00\x00aK\x01s\x86b.",
        b"\x80\x02ccollections\nCounter\n)R.",
        b"\x80\x04\x8c\x0btorch._utils\x8c\x1a_rebuild_tensor_v2.__init__\x93.",  # by way of a dotted name
        b"\x80\x02}r\xff\xff\xff\x7f.",  # an index that would make the unpickler allocate 16 GB
        b"\x80\x02\x82\x01.",  # the registry of extensions
        b"\x80\x02U\x01aQ.",  # a storage that is none
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
        b"\x80\x02" + b"(" * 100_000 + b".",
        b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"h\x07.",
        b"\x80\x02R.",
        b"\x80\x02}",
        b"",
        b"\xff",
    ],
)
def test_hostile_pickles_are_refused_and_change_nothing(content):
    before = (
        dict(pickled.NAMES),
        [vars(value).copy() for value in pickled.NAMES.values() if not isinstance(value, type)],
    )
    with pytest.raises(ValueError):  # noqa: PT011 - each for another reason
        load_restricted(io.BytesIO(content))
    after = dict(pickled.NAMES), [vars(value).copy() for value in pickled.NAMES.values() if not isinstance(value, type)]
    assert before == after


def test_every_truncation_and_many_changes_of_a_file_give_an_error_or_tensors_that_can_be_read(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    rng = np.random.default_rng(0)
    for layout in LAYOUTS:
        write(file, {"a": whole(np.arange(6, dtype=np.float32).reshape(2, 3))}, layout)
        content = file.read_bytes()
        changes = [content[:length] for length in range(0, len(content), 7)]
        for _ in range(300):
            place, value = rng.integers(len(content)), rng.integers(256)
            changes.append(content[:place] + bytes([value]) + content[place + 1 :])
        for changed in changes:
            file.write_bytes(changed)
            try:
                tensors = PickledTensors(tmp_path, "test")
            except InputError:
                continue
            for name, shape in tensors.shapes.items():
                assert tensors.rows(name, 0, shape[0] if shape else 1).shape == shape


@pytest.mark.parametrize(
    ("options", "message"),
    [({"compression": zipfile.ZIP_DEFLATED}, "is compressed"), ({"order": b"big"}, "is not little-endian")],
)
def test_archives_that_torch_does_not_write_are_refused(options, message, tmp_path):
    write(tmp_path / "pytorch_model.bin", {"a": whole(np.zeros(1000, np.float32))}, **options)
    with pytest.raises(InputError, match=message):
        PickledTensors(tmp_path, "test")


def test_a_length_beyond_the_file_is_refused_before_anything_is_allocated(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    write(file, {"a": whole(np.zeros(3, np.float32))})
    content = bytearray(file.read_bytes())
    # Both sizes of the first member, data.pkl, in the archive's directory: 3.75 GB.
    place = content.index(b"PK\x01\x02") + 20
    content[place : place + 8] = b"\x00\x00\x00\xf0" * 2
    file.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(InputError, match=r"cannot be read as weights of PyTorch \(it ends too early\)"):
        PickledTensors(tmp_path, "test")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_safetensors_come_first(model, tmp_path):
    write(tmp_path / "pytorch_model.bin", {"a": whole(np.zeros(3, np.float32))})
    save_pretrained(model, tmp_path)
    found = export_tensors(load_model(tmp_path))
    for name, value in export_tensors(model).items():
        np.testing.assert_array_equal(found[name], value)


def test_quantised_weights_are_refused(model, tmp_path):
    state = state_dict(model)
    state["model.norm.weight"] = whole(np.ones(8, np.int64))
    write(tmp_path / "pytorch_model.bin", state)
    with pytest.raises(InputError, match=r"model\.norm\.weight is stored as I64, so its weights are quantised"):
        load_model(tmp_path)
