"""Imports run one way: common <- configs <- pipelines <- ... <- training <- programs."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ["common", "configs", "pipelines", "model", "evaluation", "training"]
PROGRAM_FOLDERS = ["tools", "benchmarks"]


def sources() -> list[Path]:
    """All production files."""
    folders = [ROOT / name for name in [*LAYERS, *PROGRAM_FOLDERS]]
    files = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    return [*files, ROOT / "train.py", ROOT / "evaluate.py"]


def programs() -> list[Path]:
    """The files that a user starts."""
    return [path for path in sources() if "\n    run_main(" in path.read_text()]


def module(path: Path) -> str:
    return path.relative_to(ROOT).as_posix().removesuffix(".py").replace("/", ".")


def imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere in it, names of modules with their packages."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_the_walk_finds_the_files():
    assert {"pipelines.geometry", "training.trainer", "train"} <= {*map(module, sources())}
    assert {"train", "evaluate", "tools.make_shards"} <= {*map(module, programs())}


@pytest.mark.parametrize("path", sources(), ids=module)
def test_a_layer_imports_only_itself_and_the_layers_below(path):
    package = path.relative_to(ROOT).parts[0]
    # A program of several files imports its own parts.
    order = LAYERS if package in LAYERS else [*LAYERS, package]
    allowed = {*order[: order.index(package) + 1]}
    ours = {*LAYERS, *PROGRAM_FOLDERS, "train", "evaluate", "tests"}
    assert {name.split(".")[0] for name in imports(path)} & ours <= allowed


def test_programs_never_import_each_other():
    names = {*map(module, programs())}
    for path in sources():
        assert not imports(path) & names, path


def test_only_one_file_imports_dali_and_only_when_a_loader_is_asked_for():
    users = [path for path in sources() if any(n.startswith("nvidia") for n in imports(path))]
    assert [module(path) for path in users] == ["pipelines.dali_loader"]
    loader = ast.parse((ROOT / "pipelines" / "loader.py").read_text())
    at_import = [node.module or "" for node in loader.body if isinstance(node, ast.ImportFrom)]
    assert at_import and not any("dali" in name for name in at_import)
