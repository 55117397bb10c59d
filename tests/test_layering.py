"""Modules import only from lower layers, never sideways; the core stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "adaptive_ts"
LAYERS = [
    ["types"],
    ["collectives", "schedules"],
    ["discrete_schedules", "continuous_schedules", "corruption"],
    ["grid", "statistics", "diffusion", "policy", "error_ratios"],
    ["tabulated", "selection", "weightings_scheduled", "uncertainty", "draws"],
    ["probe", "reinforce", "laws", "weightings"],
    [
        "samplers.static",
        "samplers.logit",
        "samplers.log_snr",
        "samplers.speed",
        "samplers.curriculum",
        "samplers.adaptive",
        "samplers.tabular",
        "samplers.impact",
        "samplers.wrappers",
    ],
    ["testing", "density"],
]
CORE = {name: level for level, names in enumerate(LAYERS) for name in names}
THIRD_PARTY = {"jax", "numpy", "scipy", "optax", "flax"}


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def _name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def _core_modules() -> list[Path]:
    files = [*PACKAGE.glob("*.py"), *(PACKAGE / "samplers").glob("*.py")]
    return [path for path in files if path.name != "__init__.py"]


@pytest.mark.parametrize("path", _core_modules(), ids=_name)
def test_core_module_imports_only_lower_layers(path):
    level = CORE[_name(path)]  # a new module needs its place in LAYERS
    for imported in _imports(path):
        top, _, rest = imported.partition(".")
        if top == "adaptive_ts":
            inside = [name for name in CORE if rest == name or rest.startswith(f"{name}.")]
            assert not rest.startswith("experiment"), imported
            assert all(CORE[name] < level for name in inside), f"{path.name} imports {imported}"
        elif top not in sys.stdlib_module_names:
            assert top in THIRD_PARTY, imported
            assert top != "flax" or path.name == "policy.py", "flax is for policy.py alone"


def test_contract_module_imports_jax_and_typing_only():
    tops = {name.split(".")[0] for name in _imports(PACKAGE / "types.py")}
    assert tops <= {"jax", "typing", "collections"}


def test_only_collectives_crosses_devices():
    words = ("lax.psum", "lax.pmean", "lax.all_gather", "lax.axis_index", "lax.axis_size")
    for path in _core_modules():
        if path.name != "collectives.py":
            text = path.read_text()
            assert not [word for word in words if f"jax.{word}(" in text], path


def test_experiment_has_one_integrator():
    for path in (PACKAGE / "experiment").rglob("*.py"):
        if path.name not in ("loop.py", "overhead.py"):
            assert not any(
                name.startswith("adaptive_ts.experiment.loop") for name in _imports(path)
            ), path


def test_importing_the_package_is_light():
    heavy = ["orbax", "tensorflow_datasets", "grain", "matplotlib", "sklearn", "tyro", "tqdm"]
    code = f"import sys, adaptive_ts; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert run.stdout.strip() == "[]"


def test_files_and_functions_are_short():
    for path in [*PACKAGE.rglob("*.py"), ROOT / "train.py", *(ROOT / "configs").glob("*.py")]:
        source = path.read_text()
        assert len(source.splitlines()) <= 400, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                body = [n for n in node.body if not _is_docstring(n)]
                length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
                nested = sum(
                    n.end_lineno - n.lineno + 1 for n in body if isinstance(n, ast.FunctionDef)
                )
                assert length - nested <= 60, f"{path}: {node.name} has {length} lines"
    assert len((ROOT / "train.py").read_text().splitlines()) <= 60


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
