"""The house: floors, faces and sizes. No import runs up a floor or in a circle."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import adaptive_ts

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "adaptive_ts"
# Rooms (packages, or modules at a root), low to high; those of one line may import each other
# as long as no circle comes of it.
CORE = [
    ["types"],
    ["collectives"],
    ["schedules"],
    ["diffusion"],
    ["weightings"],
    ["timesteps"],
    ["learning"],
    ["samplers"],
    ["density", "testing", "integrations"],
]
EXPERIMENT = [
    ["errors"],
    ["config", "models", "files", "checkpoints", "commands"],
    ["devices", "pictures"],
    ["data", "solvers", "logs"],
    ["assembly"],
    ["quality", "generate"],
    ["evaluate"],
    ["train"],
    ["costs"],
    ["tables"],
    ["main"],
]
FLOOR = {room: level for level, rooms in enumerate(CORE) for room in rooms}
FLOOR |= {
    f"experiment.{room}": len(CORE) + level
    for level, rooms in enumerate(EXPERIMENT)
    for room in rooms
}
THIRD_PARTY = {"jax", "numpy", "scipy", "optax", "flax"}  # of the core
LENT = {  # to one module each
    "": {"lazy_loader"},
    "integrations.hackable_diffusion": {"hackable_diffusion", "kauldron"},
}
HEAVY = [
    "hackable_diffusion",
    "kauldron",
    "orbax",
    "tensorflow_datasets",
    "grain",
    "matplotlib",
    "sklearn",
    "tyro",
    "tqdm",
]


def _module(path: Path) -> str:
    """Dotted, below adaptive_ts; a package's face by the package's name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {_module(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}
CORE_FILES = [name for name in FILES if name and not name.startswith("experiment")]


def _room(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2] if parts[0] == "experiment" else parts[:1])


def _is_face(module: str) -> bool:
    return FILES[module].name == "__init__.py"


def _homes() -> dict[str, str]:
    """The room, below adaptive_ts, of each name that the stub gives the top."""
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text())
    return {
        alias.name: node.module or alias.name
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


HOMES = _homes()


def _from_the_top(module: str) -> set[str]:
    """Rooms of what a module uses as ``ats.X``, or takes by ``from adaptive_ts import X``."""
    nodes = list(ast.walk(TREES[module]))
    tops = {
        alias.asname or alias.name
        for node in nodes
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == "adaptive_ts"
    }
    used = {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in tops
    }
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module == "adaptive_ts":
            used |= {alias.name for alias in node.names}
    return {HOMES[name] for name in used if name in HOMES}


def _imports(module: str) -> set[tuple[str, str]]:
    """(module, name) of every import of ours, modules below adaptive_ts; name "" for a module."""
    found = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}".removeprefix("adaptive_ts.")
                found.add(
                    (f"adaptive_ts.{whole}", "") if whole in FILES else (node.module, alias.name)
                )
    inside = {(source, name) for source, name in found if source.partition(".")[0] == "adaptive_ts"}
    return {(source.removeprefix("adaptive_ts").lstrip("."), name) for source, name in inside}


def _third_party(module: str) -> set[str]:
    nodes = list(ast.walk(TREES[module]))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    tops = {name.partition(".")[0] for name in names}
    return tops - {"adaptive_ts"} - sys.stdlib_module_names


def _defined(module: str) -> set[str]:
    """What a module binds at its top level other than by imports, or by ``NAME = other.NAME``."""
    found, imported = set(), {name.rpartition(".")[2] for name, _ in _imports(module)}
    blocks = [TREES[module].body]
    while blocks:
        for node in blocks.pop():
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.If | ast.Try | ast.With):
                blocks.append(node.body)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                value = node.value
                if (
                    isinstance(value, ast.Attribute)
                    and isinstance(value.value, ast.Name)
                    and value.value.id in imported
                ):
                    continue  # handed on, not defined
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found |= {x.id for t in targets for x in ast.walk(t) if isinstance(x, ast.Name)}
    return found


@pytest.mark.parametrize("module", [name for name in FILES if name])
def test_imports_run_down(module):
    room = _room(module)
    for source, _ in _imports(module):
        if not source:
            continue  # the package itself, whose names resolve when they are used
        other = _room(source)
        if room != other:
            assert FLOOR[other] <= FLOOR[room], f"{module} imports {source}, a floor above"
        else:
            assert _is_face(module) or source != room, f"{module} imports its own package's face"
    for home in _from_the_top(module):
        assert FLOOR[home] <= FLOOR[room], f"{module} uses {home}, a floor above"


def test_nothing_runs_in_a_circle():
    modules = {name: {source for source, _ in _imports(name) if source} for name in FILES if name}
    rooms: dict[str, set[str]] = {}
    for name, sources in modules.items():
        rooms.setdefault(_room(name), set()).update({_room(s) for s in sources} - {_room(name)})
    for graph in (modules, rooms):
        graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, with the circle


@pytest.mark.parametrize("module", [name for name in FILES if name])
def test_names_come_from_where_they_are_defined(module):
    """Only a package's face hands on what it did not define, and it defines nothing."""
    if _is_face(module):
        own = _defined(module) - {"__all__"}
        assert not own, f"the face of {module} defines {own}"
        return
    listed = [
        ast.literal_eval(node.value)
        for node in TREES[module].body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    assert not listed or set(listed[0]) <= _defined(module), f"{module} hands on what it took"
    for source, name in _imports(module):
        if name and not _is_face(source):
            assert name in _defined(source), f"{module} takes {name} from {source}, not its home"


def test_violations_are_found(monkeypatch):
    """Each of these, in a core module, is one."""
    source = FILES["schedules.base"].read_text()
    for wrong, check in (
        ("def f():\n    import adaptive_ts as ats\n    return ats.adaptive", test_imports_run_down),
        ("def f():\n    from adaptive_ts import adaptive", test_imports_run_down),
        ("if 0:\n    from adaptive_ts.samplers.speed import speed", test_imports_run_down),
        ("__all__ = ['PerExample']", test_names_come_from_where_they_are_defined),
    ):
        monkeypatch.setitem(TREES, "schedules.base", ast.parse(f"{source}\n{wrong}\n"))
        with pytest.raises(AssertionError):
            check("schedules.base")
    handed_on = "from adaptive_ts import collectives\nPerExample = collectives.PerExample\n"
    monkeypatch.setitem(TREES, "schedules.base", ast.parse(handed_on))
    assert "PerExample" not in _defined("schedules.base")


@pytest.mark.parametrize("module", CORE_FILES)
def test_the_core_needs_few_packages(module):
    assert _third_party(module) <= THIRD_PARTY | LENT.get(module, set())
    assert "flax" not in _third_party(module) or module == "learning.policy", "flax is policy's"


def test_contract_module_imports_jax_alone():
    assert _third_party("types") == {"jax"} and not _imports("types")


def test_only_collectives_crosses_devices():
    words = ("psum", "pmean", "all_gather", "axis_index", "axis_size")
    for module in CORE_FILES:
        if module != "collectives":
            text = FILES[module].read_text()
            assert not [word for word in words if f"jax.lax.{word}(" in text], module


def test_importing_the_package_is_light():
    code = (
        "import sys, adaptive_ts as a; a.adaptive; a.integrations; "
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert run.stdout.strip() == "[]"


def test_the_house_has_few_rooms_and_none_is_crowded():
    assert {p.stem for p in PACKAGE.glob("[!_]*.py")} == {
        "types",
        "collectives",
        "density",
        "testing",
    }
    assert len(list((PACKAGE / "experiment").glob("[!_]*.py"))) <= 6
    packages = {path.parent for path in FILES.values()}
    for folder in packages:
        assert (folder / "__init__.py").is_file(), folder
        assert len(list(folder.glob("*.py"))) <= 16, folder
    assert len(adaptive_ts.__all__) <= 45


def test_tests_lie_where_their_subject_does():
    rooms = {str(path.parent.relative_to(PACKAGE)) for path in FILES.values()}
    own = {"golden", "parity", "support"}
    for path in (ROOT / "tests").rglob("test_*.py"):
        folder = str(path.parent.relative_to(ROOT / "tests"))
        assert folder in rooms | own, f"{path}: no package is called {folder}"


def test_files_and_functions_are_short():
    for path in [*FILES.values(), ROOT / "train.py", *(ROOT / "configs").glob("*.py")]:
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
