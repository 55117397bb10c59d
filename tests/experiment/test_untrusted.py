"""A stranger's checkpoint, config, archive or data set is refused or left aside; none of it runs.

A stranger's ``configs/*.py`` is another thing: a file of rows is Python, and naming one of its rows
runs it. Read it first.
"""

import importlib
import json
import pathlib
import pickle
import shutil
import sys
import zipfile

import numpy as np
import pytest
from saved import make_state, restore, save
from small_run import same_run, train, tree

from adaptive_ts.experiment.checkpoints.checksums import state_digest
from adaptive_ts.experiment.config.groups import DataConfig
from adaptive_ts.experiment.data.loading import load
from adaptive_ts.experiment.errors import UserError
from adaptive_ts.experiment.files import json_digest
from adaptive_ts.experiment.generate import trained
from adaptive_ts.experiment.main import decode, evaluate
from adaptive_ts.experiment.quality import classifier, reference
from adaptive_ts.experiment.quality.inception import Activations, load_inception

ONE_LINE = r"\A[^\n]*\Z"


class Bait:
    """Unpickled, it makes a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return pathlib.Path.touch, (self.mark,)


class Baits:
    """Files that run when they are unpickled, and whether one was."""

    def __init__(self, folder):
        self.mark = folder / "was run"
        self.raw = pickle.dumps(Bait(self.mark))

    def forms(self, keys):
        """name -> what writes it: a pickle, NumPy's archives and arrays of objects, nothing."""
        objects = np.array([Bait(self.mark)], dtype=object)
        npy = self.mark.with_name("object.npy")
        np.save(npy, objects)
        return {
            "pickle": lambda path: path.write_bytes(self.raw),
            "array of objects": lambda path: shutil.copy(npy, path),
            "archive of objects": lambda path: np.savez(path, **dict.fromkeys(keys, objects)),
            "archive of pickles": lambda path: self.archive(path, keys),
            "nothing": lambda path: path.write_bytes(b""),
        }

    def archive(self, path, keys):
        with zipfile.ZipFile(path, "w") as archive:
            for key in keys:
                archive.writestr(f"{key}.npy", self.raw)


@pytest.fixture
def bait(tmp_path):
    """`Baits` that do bite, and were not taken when the test is over."""
    (tmp_path / "bait").mkdir()
    baits = Baits(tmp_path / "bait")
    pickle.loads(baits.raw)
    assert baits.mark.exists()
    baits.mark.unlink()
    path = baits.mark.with_name("objects.npz")
    baits.forms(["a"])["archive of objects"](path)
    with np.load(path, allow_pickle=True) as arrays:
        assert len(arrays["a"]) == 1
    assert baits.mark.exists()
    baits.mark.unlink()
    yield baits
    assert not baits.mark.exists(), "a stranger's code was run"


def refused(words, function, *args):
    with pytest.raises(UserError, match=ONE_LINE) as error:
        function(*args)
    assert words in str(error.value), error.value
    return error.value


# --- archives ---


def test_archives_that_a_command_is_given_are_refused(six, run_data, bait, tmp_path, monkeypatch):
    monkeypatch.setattr(trained, "load_trained", None)  # before anything slow
    before, path = tree(six[0]), tmp_path / "a.npz"
    command = [str(six[0]), "--data_dir", str(run_data)]
    for option, words, keys in (
        ("--images", "is no .npz file with images", ["images"]),
        ("--reference", "is no readable .npz file", ["mu", "sigma"]),
        ("--inception_weights", "is not the Inception file expected", ["fc.weight"]),
    ):
        features = ["--features", "inception"] if "inception" in option else []
        for write in bait.forms(keys).values():
            write(path)
            error = refused(words, evaluate.main, [*command, *features, option, str(path)])
            assert error.exit_code == 2 and str(path) in str(error)
    assert tree(six[0]) == before


@pytest.mark.parametrize("suffix", [".npz", ".pth"])
def test_weights_of_any_checksum_are_read_without_running_them(bait, tmp_path, suffix):
    for write in bait.forms(["fc.weight"]).values():
        write(tmp_path / "a.npz")
        path = (tmp_path / "a.npz").rename(tmp_path / f"weights{suffix}")
        with pytest.raises(UserError, match=ONE_LINE):
            load_inception(path, sha256=None)


def test_latents_of_a_stranger_are_refused(bait, tmp_path):
    for write in bait.forms(["latents", "labels"]).values():
        write(tmp_path / "a.npz")
        command = [str(tmp_path / "a.npz"), str(tmp_path / "out")]
        refused("no .npz file with latents", decode.main, command)


ODD = {
    "numbers": {"images": 3, "labels": 4, "num_classes": [1, 2], "fingerprint": "x"},
    "other types": {
        "images": np.zeros((297, 8, 8, 1), np.uint8),
        "labels": np.zeros(297),
        "num_classes": 10,
        "fingerprint": "x",
    },
    "no arrays": {},
}


def test_decoded_images_of_a_stranger_are_decoded_anew(run_data, bait, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(run_data / "digits", data / "digits")
    path = data / "digits" / "1.0.0" / "decoded-test.npz"
    own = load("digits", split="test", data_dir=data).fingerprint
    forms = bait.forms(["images", "labels", "num_classes", "fingerprint"])
    forms |= {name: lambda path, a=arrays: np.savez(path, **a) for name, arrays in ODD.items()}
    for name, write in forms.items():
        write(path)
        said = []
        assert load("digits", split="test", data_dir=data, log=said.append).fingerprint == own
        assert len(said) == 2 and "is damaged" in said[0] and "\n" not in said[0], name


def test_features_of_a_stranger_are_computed_anew(run_data, bait, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(run_data / "digits", data / "digits")
    seen = []

    def extract(images):
        seen.append(len(images))
        features = images.reshape(len(images), -1)[:, 20:23].astype(np.float32)
        return Activations(features, features)

    network = reference.FeatureNetwork("stub", "a stub", "stub", 3, extract)

    def get():
        config = DataConfig(dir=str(data))
        return reference.reference_features(config, network, split="test", log=lambda line: None)

    own = get().digest
    (path,) = data.rglob("features-stub-*.npz")
    for write in bait.forms(["mu", "sigma", "features", "digest"]).values():
        write(path)
        seen.clear()
        assert get().digest == own and sum(seen) == 297


def test_a_classifier_of_a_stranger_is_trained_anew(run_data, bait, tmp_path, monkeypatch):
    data, trained = tmp_path / "data", []
    ignored = shutil.ignore_patterns("classifier-*")  # another test's
    shutil.copytree(run_data / "digits", data / "digits", ignore=ignored)

    def train_none(model, params, dataset):
        trained.append(1)
        return params

    monkeypatch.setattr(classifier, "_train", train_none)

    def get():
        return classifier.load_classifier(DataConfig(dir=str(data)), log=lambda line: None)

    own = get().digest
    (path,) = data.rglob("classifier-*.npz")
    kept = dict(np.load(path))
    for write in bait.forms(kept).values():
        write(path)
        trained.clear()
        assert get().digest == own and trained
    trained.clear()
    assert get().digest == own and not trained


# --- checkpoints ---


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of TensorStore
def test_pickles_in_the_place_of_a_checkpoint_s_files(bait, tmp_path):
    """One by one: the file is not looked at, or the checkpoint is damaged; then all of them."""
    made = tmp_path / "made"
    save(made, (1, 2))
    files = [p.relative_to(made) for p in sorted((made / "2").rglob("*")) if p.is_file()]
    assert {"_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt"} <= {p.name for p in files}
    damaged = set()
    for number, file in enumerate(files):
        folder = shutil.copytree(made, tmp_path / str(number))
        (folder / file).write_bytes(bait.raw)
        said = []
        step, state, meta = restore(folder, said.append)
        assert state_digest(state) == state_digest(make_state(step)) and meta == {"seed": step}
        assert (step == 2) == (not said) and "\n" not in "".join(said)
        damaged |= {file.name} if said else set()
    assert {"_METADATA", "manifest.ocdbt"} & damaged
    for file in made.rglob("*"):
        if file.is_file():
            file.write_bytes(bait.raw)
    refused("no usable checkpoint in", restore, made, lambda line: None)


def test_a_checkpoint_names_no_code_to_load(bait, tmp_path, monkeypatch):
    module(bait, tmp_path, monkeypatch)
    folder = tmp_path / "made"
    save(folder, (1,))
    path = folder / "1" / "_CHECKPOINT_METADATA"
    content = json.loads(path.read_text())
    content["item_handlers"] = dict.fromkeys(content["item_handlers"], "stranger.Handler")
    path.write_text(json.dumps(content))
    for path in folder.rglob("_METADATA"):
        text = path.read_text().replace("jax.Array", "stranger.Array")
        path.write_text(text)
    step, state, _ = restore(folder, lambda line: None)
    assert step == 1 and state_digest(state) == state_digest(make_state(1))


@pytest.mark.parametrize("changes", [{"layout": []}, {"checksums": 3}, {"layout": {"x": "y"}}])
def test_a_checkpoint_s_own_words_are_checked(changes, bait, tmp_path):
    folder = tmp_path / "made"
    save(folder, (1,))
    path = folder / "1" / "meta" / "metadata"
    content = {k: v for k, v in json.loads(path.read_text()).items() if k != "sha256"} | changes
    path.write_text(json.dumps({**content, "sha256": json_digest(content)}))
    with pytest.raises(UserError, match=ONE_LINE):
        restore(folder, lambda line: None)


def test_a_run_steps_back_from_a_stranger_s_checkpoint(six, run_data, bait, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(six[0], folder)
    (folder / "summary.json").unlink()
    for file in (folder / "checkpoints" / "6").rglob("*"):
        if file.is_file():
            file.write_bytes(bait.raw)
    code, said = train(folder, run_data, "--train.steps 6")
    assert code == 0 and said[0].startswith("checkpoint 6 is damaged") and "\n" not in said[0]
    same_run(folder, six[0])


# --- configs ---

CONFIGS = {
    "Python": "__import__('pathlib').Path('was run').touch()",
    "a list": "[1, 2]",
    "a number": "7",
    "deep": "[" * 100_000,
    "a name of a sampler": '{"sampler": {"name": "os.system"}}',
    "another type": '{"model": {"channels": "__import__(\'os\')"}}',
    "no group": '{"train": 3, "evil": {"a": 1}}',
    "out of range": '{"model": {"channels": -1}}',
}


@pytest.mark.parametrize("name", ["a pickle", *CONFIGS])
def test_a_config_of_a_stranger_is_data(name, six, run_data, bait, tmp_path, monkeypatch):
    monkeypatch.chdir(bait.mark.parent)  # where the Python would leave its mark
    folder = tmp_path / "run"
    shutil.copytree(six[0], folder)
    content = bait.raw if name == "a pickle" else CONFIGS[name].encode()
    (folder / "config.json").write_bytes(content)
    before = tree(folder)
    with pytest.raises(UserError, match=ONE_LINE):
        evaluate.main([str(folder), "--data_dir", str(run_data)])
    with pytest.raises(UserError, match=ONE_LINE):
        train(folder, run_data, "--train.steps 6")
    assert tree(folder) == before


# --- data sets ---


def module(bait, tmp_path, monkeypatch):
    """A module ``stranger`` on the path that, imported, leaves the mark."""
    (tmp_path / "path").mkdir()
    code = f"import pathlib; pathlib.Path({str(bait.mark)!r}).touch()\nclass Handler: pass\n"
    (tmp_path / "path" / "stranger.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path / "path")
    importlib.import_module("stranger")
    forget(bait)


def forget(bait):
    del sys.modules["stranger"]
    bait.mark.unlink()


IMAGE = {"shape": [8, 8, 1], "dtype": "uint8", "encoding_format": "png"}
DICT = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
FEATURES = {
    "of an image": {
        "pythonClassName": DICT,
        "featuresDict": {"features": {"image": {"pythonClassName": "stranger.Image", "image": {}}}},
    },
    "of all": {"python_class_name": "stranger.Dict", "features_dict": {"features": {}}},
    "older": {"type": "stranger.Image", "content": IMAGE},
    "older, inside": {
        "type": DICT,
        "content": {"image": {"type": "stranger.Image", "content": IMAGE}},
    },
    "JSON in JSON": {
        "pythonClassName": DICT,
        "jsonFeature": {"json": json.dumps({"image": {"type": "stranger.Image", "content": {}}})},
    },
}


@pytest.mark.parametrize("name", FEATURES)
def test_a_data_set_names_no_module_to_import(name, run_data, bait, tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    module(bait, tmp_path, monkeypatch)
    shutil.copytree(run_data / "digits" / "1.0.0", tmp_path / "data" / "digits" / "1.0.0")
    folder = tmp_path / "data" / "digits" / "1.0.0"
    (folder / "features.json").write_text(json.dumps(FEATURES[name]))
    (folder / "decoded-test.npz").unlink()
    with pytest.raises(Exception, match=r"stranger|Unrecognized"):
        tfds.builder_from_directory(folder)
    forget(bait)  # it does import it
    words = r"is refused: its features\.json asks to import 'stranger\."
    with pytest.raises(UserError, match=words):
        load("digits", split="test", data_dir=tmp_path / "data", log=lambda line: None)
    assert "stranger" not in sys.modules


def features_json(**features):
    return json.dumps({"pythonClassName": DICT, "featuresDict": {"features": features}}).encode()


TEXT = {"pythonClassName": "tensorflow_datasets.core.features.text_feature.Text", "text": {}}
INFO = [b"[]", b"3", b"{", b"\xff", b"[" * 100_000, b'{"splits": 3}', b'{"splits": [{}]}']
INFO += [b'{"splits": [{"name": "test", "shardLengths": ["many"]}], "fileFormat": "array_record"}']
HARM = {
    **{f"dataset_info.json {i}": ("dataset_info.json", content) for i, content in enumerate(INFO)},
    "dataset_info.json a pickle": ("dataset_info.json", None),
    "features.json a pickle": ("features.json", None),
    "features.json deep": ("features.json", b"[" * 100_000),
    "no image": ("features.json", features_json(label=TEXT)),
    "a text for an image": ("features.json", features_json(image=TEXT)),
    "records a pickle": ("digits-test.array_record-00000-of-00001", None),
}


@pytest.mark.parametrize("name", HARM)
def test_files_of_a_data_set_are_refused_in_one_line(name, run_data, bait, tmp_path):
    folder = tmp_path / "data" / "digits" / "1.0.0"
    shutil.copytree(run_data / "digits" / "1.0.0", folder)
    (folder / "decoded-test.npz").unlink()
    file, content = HARM[name]
    assert (folder / file).is_file()
    (folder / file).write_bytes(bait.raw if content is None else content)
    with pytest.raises(UserError, match=ONE_LINE) as error:
        load("digits", split="test", data_dir=tmp_path / "data", log=lambda line: None)
    assert str(folder) in str(error.value) or "digits" in str(error.value)
