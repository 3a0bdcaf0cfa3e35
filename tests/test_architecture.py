"""Imports run one way: configs <- pipelines <- model <- evaluation <- training <- programs."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ["configs", "pipelines", "model", "evaluation", "training"]
PROGRAMS = ["tools", "benchmarks"]
ENTRY_FILES = ["train.py", "evaluate.py"]


def sources() -> list[Path]:
    folders = [ROOT / name for name in [*LAYERS, *PROGRAMS]]
    files = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    return files + [ROOT / name for name in ENTRY_FILES]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def place(path: Path) -> str:
    """The layer of a file, or "program"."""
    top = path.relative_to(ROOT).parts[0]
    return top if top in LAYERS else "program"


def test_the_walk_finds_the_house():
    names = {path.relative_to(ROOT).as_posix() for path in sources()}
    assert {
        "pipelines/geometry.py",
        "training/trainer.py",
        "tools/make_shards.py",
        "train.py",
    } <= names
    assert len(names) > 25


@pytest.mark.parametrize("path", sources(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_layer_imports_itself_and_those_below_alone(path):
    layer = place(path)
    allowed = LAYERS if layer == "program" else LAYERS[: LAYERS.index(layer) + 1]
    forbidden = {*LAYERS, *PROGRAMS, "train", "evaluate", "tests"} - set(allowed)
    # A program of several files may import its own parts, by the name of its folder.
    own = {"program": {path.parent.name} if path.parent != ROOT else set()}.get(layer, set())
    tops = {name.split(".")[0] for name in imports(path)}
    assert not tops & (forbidden - own)


def test_programs_never_import_each_other():
    programs = {
        "tools.make_shards",
        "tools.make_synthetic",
        "tools.convert_checkpoint",
        "tools.check_shards",
        "tools.compare_decoders",
        "tools.predict",
        "tools.export_onnx",
        "tools.show_batch",
        "benchmarks.throughput",
        "benchmarks.packing",
        "benchmarks.gpu_loader",
        "benchmarks.gpu_train",
        "benchmarks.gpu_accuracy",
    }
    for path in sources():
        if place(path) == "program":
            assert not imports(path) & programs, path


def test_dali_is_imported_in_one_file_alone():
    users = [p for p in sources() if any(n.startswith("nvidia") for n in imports(p))]
    assert [p.relative_to(ROOT).as_posix() for p in users] == ["pipelines/dali_loader.py"]


def test_dali_crops_is_imported_lazily():
    tree = ast.parse((ROOT / "pipelines" / "batches.py").read_text())
    top = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert top and all("dali" not in (node.module or "") for node in top)
    assert "pipelines.dali_loader" in imports(ROOT / "pipelines" / "batches.py")


def test_the_projects_own_files_alone_are_linted(tmp_path):
    names = ["call.py", "mine/train.py", "train.py", "tools/predict.py"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    words = [sys.executable, "-m", "ruff", "check", "--show-files", "."]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    listed = {Path(line).relative_to(tmp_path).as_posix() for line in done.stdout.splitlines()}
    assert listed == {"pyproject.toml", "train.py", "tools/predict.py"}
