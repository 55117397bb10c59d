"""PyTorch files: those that torch.save wrote (golden), damaged ones and malicious ones."""

import collections
import io
import os
import pickle
import sys
import types
import zipfile

import numpy as np
import pytest

from adaptive_ts.experiment.errors import UserError
from adaptive_ts.experiment.quality.torch_file import read_state_dict


@pytest.mark.parametrize("kind", ["zip", "stream"])
def test_tensors_are_those_that_torch_saved(kind, golden):
    """Of real torch.save: views, transposed, shared, scalar, empty, halves, doubles, integers."""
    saved = golden("inception_features")
    found = read_state_dict(saved[f"torch_{kind}"].tobytes())
    expected = {k[13:]: v for k, v in saved.items() if k.startswith("torch_tensor_")}
    assert set(found) == set(expected) and len(found) >= 12
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        np.testing.assert_array_equal(found[name], value)
        assert found[name].flags.writeable and found[name].flags.owndata


@pytest.mark.parametrize("kind", ["zip", "stream"])
def test_a_damaged_file_is_one_line(kind, golden):
    content = golden("inception_features")[f"torch_{kind}"].tobytes()
    for cut in range(0, len(content), 97):
        with pytest.raises(UserError, match=r"^it is no readable PyTorch file [^\n]*$"):
            read_state_dict(content[:cut], "it")
    rng, seen = np.random.default_rng(0), set()
    for _ in range(400):  # any byte changed: the same tensors, others, or one line
        changed = bytearray(content)
        changed[rng.integers(len(content))] = rng.integers(256)
        try:
            read_state_dict(bytes(changed), "it")
        except UserError as error:
            assert "\n" not in str(error)
            seen.add(str(error))
    assert len(seen) > 5


class Runs:
    """Pickled, it asks to call a function with arguments."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def zipped(data, storages=None, order=b"little", compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", order)
        for key, raw in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", raw)
    return file.getvalue()


def streamed(data):
    header = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    return b"".join(pickle.dumps(x, 2) for x in header) + data + pickle.dumps([], 2)


@pytest.mark.parametrize("wrap", [zipped, streamed])
@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("function", [os.system, eval, exec, os.putenv, getattr])
def test_nothing_that_is_pickled_is_run(wrap, protocol, function, tmp_path):
    mark = tmp_path / "was run"
    args = {os.system: (f"touch '{mark}'",), os.putenv: ("A", "B"), getattr: ({}, "clear")}
    call = Runs(function, *args.get(function, (f"open({str(mark)!r}, 'w')",)))
    module = function.__module__
    for state in ({"a": call}, call, {"a": [collections.OrderedDict(x=call)]}):
        data = pickle.dumps(state, protocol)
        with pytest.raises(UserError, match=r"weights\.pth is refused: it asks to run") as error:
            read_state_dict(wrap(data), "weights.pth")
        names = {f"{module}.{function.__name__}", f"__builtin__.{function.__name__}"}
        assert any(name in str(error.value) for name in names) and "\n" not in str(error.value)
    assert not mark.exists()


@pytest.mark.parametrize("wrap", [zipped, streamed])
@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04\x8c\x0btorch._utils\x94\x8c\x12_rebuild_tensor_v2.__class__\x94\x93.",
        b"\x80\x04\x8c\x0bcollections\x94\x8c\x14OrderedDict.fromkeys\x94\x93.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}U\x01aK\x01s\x86b.",  # set an attribute
        b"\x80\x02ccollections\nOrderedDict\nN}U\x05clearK\x01s\x86b.",
        b"\x80\x02ctorch\nFloatStorage\n)R.",
        b"\x80\x02cos\nsystem\n.",
        b"(lp0\n0cbuiltins\neval\n.",
    ],
)
def test_what_is_known_leads_nowhere_else(wrap, data):
    with pytest.raises(UserError):
        read_state_dict(wrap(data))
    assert collections.OrderedDict(a=1).clear() is None


@pytest.fixture
def view(monkeypatch):
    """``view(offset, shape, strides, numbers, dtype)``: the pickle of one tensor, as torch's."""
    modules = {name: types.ModuleType(name) for name in ("torch", "torch._utils")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)

    def rebuild(*args):
        raise AssertionError

    rebuild.__module__, rebuild.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    rebuild.__name__ = "_rebuild_tensor_v2"
    modules["torch._utils"]._rebuild_tensor_v2 = rebuild
    storage = type("FloatStorage", (), {"__module__": "torch"})
    modules["torch"].FloatStorage = storage

    def make(offset=0, shape=(2, 3), strides=(3, 1), numbers=6, kind="storage", extra=()):
        class Pickler(pickle.Pickler):
            def persistent_id(self, thing):
                if isinstance(thing, storage):
                    return (kind, storage, "0", "cpu", numbers, *extra)
                return None

        file = io.BytesIO()
        tensor = Runs(rebuild, storage(), offset, shape, strides, False, collections.OrderedDict())
        Pickler(file, 2).dump({"a": tensor, "epoch": 3})
        return file.getvalue()

    return make


RAW = {"0": np.arange(6, dtype="<f4").tobytes()}


def test_a_tensor_is_a_view_of_its_storage(view):
    np.testing.assert_array_equal(
        read_state_dict(zipped(view(), RAW))["a"], np.arange(6.0).reshape(2, 3)
    )
    part = read_state_dict(zipped(view(1, (2, 2), (3, 1)), RAW))
    np.testing.assert_array_equal(part["a"], [[1, 2], [4, 5]])
    assert list(part) == ["a"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"offset": 1}, "storage of 6 numbers"),
        ({"strides": (4, 1)}, "storage of 6 numbers"),
        ({"strides": (-3, 1)}, "strides"),
        ({"offset": -2}, "strides"),
        ({"offset": 2**62}, "storage of 6 numbers"),
        ({"shape": (2**40, 3), "strides": (0, 0)}, "storage of 6 numbers"),
        ({"shape": (2, 3, 1)}, "strides"),
        ({"shape": (2.0, 3)}, "strides"),
        ({"numbers": 7}, "24 bytes for 7 numbers"),
        ({"numbers": -1}, "storage of -1 numbers"),
        ({"numbers": 2**61}, "24 bytes"),
        ({"kind": "module"}, "unknown reference to 'module'"),
        ({"extra": (("view", 0, 1),)}, "unknown reference"),
    ],
)
def test_numbers_outside_of_the_file_are_not_read(view, changes, words):
    with pytest.raises(UserError, match=f"^it is no readable PyTorch file .*{words}"):
        read_state_dict(zipped(view(**changes), RAW), "it")


def test_other_files(view):
    for content, words in (
        (b"", "EOFError"),
        (b"not a PyTorch file", "Error"),
        (zipped(view(), RAW, order=b"big"), "big-endian"),
        (zipped(view(), RAW, compression=zipfile.ZIP_DEFLATED), "compressed"),
        (zipped(view(), {}), "KeyError"),
        (zipped(pickle.dumps([1, 2], 2)), "holds a list, not a state dict"),
        (zipped(view()).replace(b"data.pkl", b"other.pk"), "0 files data.pkl"),
        (pickle.dumps({"a": 1}), "Error"),
        (pickle.dumps(1) + pickle.dumps(2), "first bytes"),
    ):
        with pytest.raises(UserError, match=words) as error:
            read_state_dict(content)
        assert "\n" not in str(error.value) and error.value.exit_code == 2
