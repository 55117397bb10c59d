"""No module has what could run the files that it reads."""

import ast

import pytest
from small_run import ROOT

FORBIDDEN = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
RUNS = {"eval", "exec", "compile", "__import__"}


def offences(source):
    """What in a module could run what it reads."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        yield from (name for name in names if name and name.split(".")[0] in FORBIDDEN | {"yaml"})
        if not isinstance(node, ast.Call):
            continue
        called, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        last = called.rpartition(".")[2]
        if called in RUNS or last in ("exec_module", "import_module", "runpy", "run_path"):
            yield called
        if called in ("np.load", "numpy.load", "jnp.load") and "allow_pickle" not in given:
            yield "np.load without allow_pickle=False"
        if given.get("allow_pickle", "False") != "False":
            yield f"{called} with allow_pickle"
        if called == "torch.load" and given.get("weights_only") != "True":
            yield "torch.load without weights_only=True"


ALLOWED = {
    "adaptive_ts/experiment/quality/torch_file.py": [
        "pickle"
    ],  # an Unpickler that finds three names
    "adaptive_ts/experiment/config/row_files.py": ["spec.loader.exec_module"],  # the rows
    "adaptive_ts/experiment/main/command.py": ["importlib.import_module"],  # one of COMMANDS
}


def test_no_module_runs_what_it_reads():
    found = {}
    for path in [*(ROOT / "adaptive_ts").rglob("*.py"), ROOT / "train.py"]:
        bad = list(offences(path.read_text()))
        found |= {str(path.relative_to(ROOT)): bad} if bad else {}
    assert found == ALLOWED
    text = (ROOT / "adaptive_ts/experiment/quality/torch_file.py").read_text()
    uses = {ast.unparse(n) for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Attribute)}
    assert {use for use in uses if use.startswith("pickle.")} == {"pickle.Unpickler"}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "import yaml",
        "eval(text)",
        "np.load(path)",
        "np.load(path, allow_pickle=flag)",
        "np.lib.format.read_array(file, allow_pickle=True)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "importlib.import_module(name)",
    ],
)
def test_the_search_finds_what_it_is_for(line):
    assert list(offences(line))
