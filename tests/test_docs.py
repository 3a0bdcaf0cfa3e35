"""Every command, file, option and link that the documentation shows is right (`make docs-check`).

A command is run by another test or by `.ci/run` (ELSEWHERE), or not at all for a reason (NOT_RUN),
or else here: all of them in the order of the pages, in a folder of tiny made data, each by the main
function of its program. SMALL is added to make them quick, and PLACEHOLDERS stand for what the
reader fills in.
"""

import functools
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from test_predictions import write_release

from common.errors import InputError
from configs.schema import config_from_dict
from configs.skeleton import MPII
from evaluation import pckh
from evaluation.predictions import as_entries
from model import checkpoint
from model.hourglass import StackedHourglass
from pipelines.shards import ShardSet

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
FIRST_WORD = re.compile(
    r"(python3?|torchrun|make|pip|git|mogrify|tar|pre-commit|evaluate\.py|train\.py) \S"
)
FOLDERS = "configs|pipelines|model|evaluation|training|tools|benchmarks|tests|docs|common"

# What runs the command; the first pattern that matches its beginning counts.
ELSEWHERE = {
    r"make (demo|test|test-slow)$": ".ci/run",
    r"make (docs-check|lint)$": "make test",
    r"(python|tar|evaluate).*(figures|data/(shards/)?people|mouse)": "tests/test_custom_data.py",
    r"torchrun .*evaluate\.py": "tests/test_evaluate.py",
    r"torchrun .*train\.py": "tests/test_training.py",
    r"python benchmarks/throughput\.py": "tests/test_throughput.py",
    r"python -m pytest": "make test",
    r".*s3://": "tests/test_remote_shards.py",
    r"python train\.py .*coco: 0\.5": "tests/test_joined_shards.py",
    r"python tools/find_label_errors\.py": "tests/test_label_errors.py",
    r"python evaluate\.py .*--calibrate": "tests/test_calibration.py",
}
NOT_RUN = {
    r"pip |python3 -m venv|make install|pre-commit": "it installs packages from the network",
    r"make (test-gpu|bench|fuzz|soak)": "it needs a GPU, or takes minutes to hours",
    r".*--webcam": "there is no camera",
    r"mogrify": "a program of others, for pictures that are refused",
    r"python test\.py -c pose|python train\.py -[ec] NAME": "commands of princeton-vl's code",
    r"git (clone|config)": "it is about the reader's own copy",
    r"torchrun .*(--nnodes|--max-restarts)": "several machines (see the page)",
    r"python tests/check_refactor\.py": "it needs two checkouts",
    r"python tests/measure_(remote_shards|video)\.py": "it takes minutes",
    r"(evaluate|train)\.py --[\w-]+$": "half a command, named in a sentence",
}
OF_OTHERS = {"--nproc-per-node", "--nnodes", "--max-restarts", "--signals-to-handle", "--signal"}
OF_OTHERS |= {"--minutes", "--every", "--loader", "--shm-size"}
"""Options of torchrun, Slurm and Docker, and of tests/soak.py."""
PLACEHOLDERS = {
    "--checkpoint PATH": "--checkpoint runs/made/best.pt",
    "tools/predict.py --checkpoint runs/2hg/best.pt": "tools/predict.py --checkpoint "
    "runs/made/best.pt",
    "tools/export_onnx.py runs/2hg/best.pt": "tools/export_onnx.py runs/made/best.pt",
    "--checkpoint runs/8hg/best.pt": "--checkpoint runs/made/best.pt",
    "convert_checkpoint.py runs/2hg/last.pt": "convert_checkpoint.py runs/made/best.pt",
    "evaluate.py --checkpoint runs/2hg/best.pt": "evaluate.py --checkpoint runs/made/best.pt",
    "--checkpoint CKPT": "--checkpoint runs/made/best.pt",
    "--shards DIR": "--shards data/shards/mpii/valid",
    "--images DIR": "--images data/mpii/images",
    "--annotations A": "--annotations data/mpii/annot",
    "--images I": "--images data/mpii/images",
    "--output O": "--output data/shards/o{number}",
    "--config C": "--config c.yaml --train.name c{number}",
    "--train.name NAME": "--train.name name{number}",
    "--predictions FILE": "--predictions predictions.json",
    "IN OUT": "runs/made/best.pt out.pt",
    "export_onnx.py PATH": "export_onnx.py runs/made/best.pt",
    'data/shards/coco: 0.5}"': 'data/shards/mpii-crops: 0.5}}" --data.preset hrnet',
    "--box X Y W H": "--box 20 20 60 60",
}
MODEL = {"stacks": 1, "width": 16, "depth": 4, "stem": [64, 128, 128]}
SMALL = {
    "train.py": "--data.batch_size 4 --data.workers 0 --data.input_px 64 --model.stacks 1 "
    "--model.width 16 --model.depth 4 --model.stem [64,128,128] --train.steps 2 --train.device cpu",
    "evaluate.py": "--batch-size 4 --workers 0 --device cpu",
    "tools/make_shards.py": "--workers 1",
    "tools/show_batch.py": "--people 2 --data.input_px 64",
}


class Command(NamedTuple):
    """One command as a page shows it."""

    page: str
    text: str


def shown_on(page: Path) -> list[Command]:
    """Commands in ```bash blocks, in indented blocks and in `spans`, in the page's order."""
    found, block = [], ""
    for line in page.read_text().replace("\\\n", " ").splitlines():
        if line.startswith("```"):
            block = "" if block else line[3:] or "text"
        elif block == "bash" or (not block and line.startswith("    ")):
            found.append(line.strip().split("  #")[0].split("          ")[0])
        elif not block:
            found += re.findall(r"`([^`]+)`", line)
    name = page.relative_to(ROOT).as_posix()
    return [Command(name, " ".join(text.split())) for text in found if FIRST_WORD.match(text)]


COMMANDS = [command for page in PAGES for command in shown_on(page)]


def first_match(table: dict[str, str], text: str) -> str | None:
    return next((value for pattern, value in table.items() if re.match(pattern, text)), None)


def program_of(text: str) -> str | None:
    """The program that a command starts, such as tools/make_shards.py."""
    match = re.match(r"(?:python|torchrun)(?: --?\S+(?: \d+)?)* (\S+\.py)|(\w+\.py)", text)
    return (match[1] or match[2]) if match else None


@functools.cache
def options_of(program: str) -> set[str]:
    """Every option in the program's --help."""
    module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
    help_text = module.make_parser().format_help()
    return set(re.findall(r"(?<![\w-])--[a-zA-Z][\w.-]*", help_text))


def faults_of(text: str) -> list[str]:
    """What is wrong with a command as it is written: its program, options, target or files."""
    program = program_of(text)
    if program is None:
        target = re.match(r"make ([\w-]+)", text)
        known = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return [f"no target {target[1]}"] if target and target[1] not in known else []
    if not (ROOT / program).is_file():
        return [f"no program {program}"]
    after = text.split(program, 1)[1]
    words = [word.split("=")[0] for word in shlex.split(after)]
    unknown = {word for word in words if word.startswith("--")} - options_of(program)
    named = [word for word in words if re.match(rf"({FOLDERS})/", word)]
    return [f"no option {word}" for word in sorted(unknown)] + [
        f"no file {word}" for word in named if not (ROOT / word).exists()
    ]


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [("python evaluate.py --chekpoint PATH", "no option --chekpoint"),
     ("torchrun --nproc-per-node 4 train.py --optim.rate 1", "no option --optim.rate"),
     ("python train.py --config configs/16hg.yaml", "no file configs/16hg.yaml"),
     ("python tools/show_batches.py", "no program tools/show_batches.py"),
     ("make demos", "no target demos")],
)  # fmt: skip
def test_a_wrong_command_is_found(wrong, fault):
    assert faults_of(wrong) == [fault]


def test_every_program_option_target_and_file_of_a_command_exists():
    ours = [c for c in COMMANDS if not first_match(NOT_RUN, c.text) or c.text.startswith("make")]
    made = {"make_figures.py", "tests/check_refactor.py"}  # saved by the reader; checked elsewhere
    faults = {c: faults_of(c.text) for c in ours if program_of(c.text) not in made}
    assert len(faults) > 35
    assert not {c: f for c, f in faults.items() if f}


def test_every_option_named_alone_exists():
    programs = {"train.py", "evaluate.py", "benchmarks/throughput.py"}
    programs |= {f"tools/{p.name}" for p in (ROOT / "tools").glob("*.py") if "run_main" in
                 p.read_text()}  # fmt: skip
    known = set().union(*map(options_of, programs)) | OF_OTHERS
    named = {
        option
        for page in PAGES
        for span in re.findall(r"`([^`\n]+)`", page.read_text())
        if span.startswith("--")
        for option in re.findall(r"--[a-zA-Z][\w.-]*", span)
    }
    assert len(named) > 10
    assert named <= known


def test_every_file_named_exists():
    named = {
        (page.relative_to(ROOT).as_posix(), name)
        for page in PAGES
        for name in re.findall(rf"`((?:{FOLDERS})/[\w./-]+)`", page.read_text())
    }
    assert len(named) > 20
    examples = {"model/simple.py", "pipelines/my_format.py", "pipelines/my_loader.py"}
    examples.add("tests/test_my_format.py")
    missing = {(page, name) for page, name in named if not (ROOT / name).exists()}
    assert not {(page, name) for page, name in missing if name not in examples}


def slug(heading: str) -> str:
    """The anchor that a heading gets."""
    return re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")


def test_every_link_leads_somewhere():
    links = [
        (page, target)
        for page in PAGES
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text())
        if not target.startswith("http")
    ]
    assert len(links) > 10
    for page, target in links:
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page.name}: {target}"


def test_the_scripts_of_the_pages_are_shell_and_yaml(tmp_path):
    blocks = [
        block
        for page in PAGES
        for block in re.findall(r"^```(bash|yaml)\n(.*?)^```", page.read_text(), re.S | re.M)
    ]
    assert {"#SBATCH", "PyTorchJob"} <= set(re.findall(r"#SBATCH|PyTorchJob", str(blocks)))
    for language, text in blocks:
        if language == "yaml":
            assert yaml.safe_load(text)
        else:
            done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr


@pytest.fixture
def sandbox(tiny_set: Path, tiny_shards: Path, tmp_path: Path) -> Path:
    """A folder as the reader has it: configs, MPII's files, photographs, a run, checkpoints."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for name in ("data/mpii", "lspet", "mpii_sample"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(tiny_set)
    (tmp_path / "data" / "MPII").symlink_to(tiny_set)
    (tmp_path / "data" / "shards").mkdir()
    (tmp_path / "data" / "shards" / "synthetic").symlink_to(tiny_shards)
    for name in ("valid.h5", "test.h5"):
        (tmp_path / name).symlink_to(tiny_set / "annot" / "valid.h5")
    # Person i of valid.h5 is the i-th of picture i, from 0.
    people_in = [1, 2, 3, 4, 5]
    release = tmp_path / "mpii_human_pose_v1_u12_1.mat"
    write_release(release, [0] * 5, people_in, [[count] for count in people_in])
    plain = MPII.as_dict()
    pairs = {key: [[MPII.names[j] for j in pair] for pair in plain[key]]
             for key in ("flip_pairs", "limbs")}  # fmt: skip
    text = yaml.safe_dump({"name": "mine", "joints": plain["names"], **pairs})
    (tmp_path / "S.yaml").write_text(text)
    (tmp_path / "c.yaml").write_text(
        (ROOT / "configs" / "2hg.yaml").read_text().replace("name: 2hg", "name: c")
    )
    people, _ = ShardSet(tiny_shards / "valid").people()
    scores = np.ones(people.joints.shape[:2])
    (tmp_path / "predictions.json").write_text(
        str(as_entries(people, people.joints, scores)).replace("'", '"')
    )
    other = pckh.summary(people.joints, people, MPII)
    for name in ("OTHER.json", "other.json"):
        (tmp_path / name).write_text(json.dumps({"network": other}))
    write_checkpoints(tmp_path)
    write_photographs(tmp_path, tiny_set / "images" / people.images[0])
    return tmp_path


def write_photographs(folder: Path, picture: Path) -> None:
    """A photograph, a folder of them with its people, and a video."""
    (folder / "data" / "synthetic" / "images").mkdir(parents=True)
    (folder / "photos").mkdir()
    for name in ("photo.jpg", "photos/a.jpg"):
        shutil.copy(picture, folder / name)
    large = cv2.resize(cv2.imread(str(picture)), (640, 640))  # the README's box is inside
    cv2.imwrite(str(folder / "data/synthetic/images/100000076.jpg"), large)
    (folder / "people.csv").write_text("image,x,y,width,height\na.jpg,20,20,60,60\n")
    (folder / "video.csv").write_text("frame,x,y,width,height\n1,5,5,30,40\n1,20,5,30,40\n")
    names = {"images": [{"id": 1, "file_name": "a.jpg"}]}
    (folder / "coco.json").write_text(json.dumps(names))
    detection = {"image_id": 1, "category_id": 1, "bbox": [20, 20, 60, 60], "score": 0.9}
    (folder / "detections.json").write_text(json.dumps([detection]))
    video = cv2.VideoWriter(
        str(folder / "video.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10.0, (64, 48)
    )
    for _ in range(2):
        video.write(np.zeros((48, 64, 3), np.uint8))
    video.release()


def write_checkpoints(folder: Path) -> None:
    """runs/made/best.pt of this project, and checkpoint.pt as princeton-vl's code writes it."""
    data = {"shards": "data/shards/mpii", "input_px": 64, "workers": 0, "batch_size": 4}
    config = config_from_dict(
        {"data": {**data, "preset": "princeton"}, "heatmaps": {"rule": "princeton"},
         "model": MODEL},
        "test",
    )  # fmt: skip
    network = StackedHourglass(config.model, MPII.joint_count)
    optimizer = torch.optim.Adam(network.parameters())
    sum(p.sum() for p in network.parameters()).backward()
    optimizer.step()
    path = folder / "runs" / "made" / "best.pt"
    path.parent.mkdir(parents=True)
    made = checkpoint.Checkpoint(
        path=path,
        config=config,
        skeleton=MPII,
        step=0,
        weights=network.state_dict(),
        averaged={},
        optimizer=optimizer.state_dict(),
        run=None,
    )
    checkpoint.save_checkpoint(path, made)
    for name in ("demo",):
        (folder / "runs" / name).mkdir()
        (folder / "runs" / name / "best.pt").symlink_to(path)
    loaded = checkpoint.load_checkpoint(path)
    checkpoint.write_archive(folder / "checkpoint.pt", checkpoint.to_princeton(loaded))


def filled_in(text: str, number: int) -> str:
    for name, value in PLACEHOLDERS.items():
        text = re.sub(rf"{name}(?!\S)", value.format(number=number), text)
    return text


@pytest.mark.slow
def test_the_other_commands_run_in_the_order_of_the_pages(sandbox, monkeypatch, capsys):
    monkeypatch.chdir(sandbox)
    ran, failed = 0, {}
    for number, command in enumerate(COMMANDS):
        if first_match({**NOT_RUN, **ELSEWHERE}, command.text):
            continue
        program = program_of(command.text)
        assert program, f"neither run nor listed: {command}"
        words = shlex.split(filled_in(command.text, number).split(program, 1)[1])
        if "--help" in words:
            continue
        if "--to" in words:
            (sandbox / words[words.index("--to") - 1]).unlink(missing_ok=True)
        monkeypatch.setattr(sys, "argv", [program, *words, *SMALL.get(program, "").split()])
        module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
        try:
            failed |= {command: code} if (code := module.main()) else {}
        except (InputError, SystemExit) as error:
            failed[command] = str(error)
        ran += 1
    assert not failed, "\n".join(f"{c.page}: {c.text}\n  {why}" for c, why in failed.items())
    assert ran >= 20


@pytest.mark.slow
def test_the_python_of_the_readme_names_every_joint(sandbox, monkeypatch, capsys):
    monkeypatch.chdir(sandbox)
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGES[0].read_text(), re.MULTILINE | re.DOTALL)
    exec(block, {})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(MPII.names)
