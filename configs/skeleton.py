"""Sets of joints: names, left-right pairs, limbs to draw, groups to report. MPII's is built in.

`load_skeleton` reads another one from a YAML file (docs/custom-data.md).
"""

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from common.cli import did_you_mean
from common.errors import InputError
from common.files import read_yaml

Pairs = tuple[tuple[int, int], ...]
Groups = tuple[tuple[str, tuple[int, ...]], ...]
Side = Literal["left", "right", "middle"]

_CHOICES = {
    "occluded": ("use", "ignore"),
    "outside": ("use", "ignore", "unmarked"),
    "unmarked": ("empty", "ignore"),
}
_OPTIONAL_KEYS = ("groups", "normalize", "mirror", "sigmas", *_CHOICES)
_KEYS = ("name", "joints", "flip_pairs", "limbs", *_OPTIONAL_KEYS)
# The side is a separate word, or written in full before a capital: l_knee, knee-right, leftKnee.
_SIDE_FIRST = re.compile(r"(?:(?i:(left|right|l|r)[ _.-]+)|(left|right|Left|Right)(?=[A-Z]))(.+)")
_SIDE_LAST = re.compile(r"(.+?)[ _.-]+(left|right|l|r)", re.IGNORECASE)
_HAS_SIDE = re.compile(r"left|right|(?<![a-z])[lr](?![a-z])", re.IGNORECASE)


class Length(NamedTuple):
    """The length in px that errors are divided by: a factor times a distance."""

    joints: tuple[int, ...]
    """The two joints whose distance is used; empty: the longer side of the person's box."""
    factor: float


class Skeleton(NamedTuple):
    """The joints of one data set. Indices count from 0 in the order of `names`."""

    name: str
    names: tuple[str, ...]
    """One name per joint, length J; all empty if they are not known."""
    flip_pairs: Pairs
    """Left and right joints, which are swapped when a picture is mirrored."""
    limbs: Pairs
    """Pairs of joints that drawings connect by a line."""
    groups: Groups
    """Columns of the PCKh table: a name and its joints. The pooled mean counts all joints."""
    length: Length | None = None
    """None: the annotation file gives each person's length, as MPII's do."""
    mirror: bool = True
    """Whether pictures may be mirrored. False if the left-right pairs are not known."""
    sigmas: tuple[float, ...] = ()
    """Standard deviation of each joint's annotation / sqrt(person's area), for OKS; or none."""
    occluded: Literal["use", "ignore"] = "use"
    """Whether joints that are marked as occluded are trained and scored."""
    outside: Literal["use", "ignore", "unmarked"] = "use"
    """The same for joints marked outside of the picture; they may also count as not marked."""
    unmarked: Literal["empty", "ignore"] | None = None
    """Train joints that are not marked as empty heatmaps, or not; None: as `loss.unmarked` says."""

    @property
    def joint_count(self) -> int:
        return len(self.names)

    @property
    def flip_indices(self) -> tuple[int, ...]:
        """For each joint the index of its left-right partner or its own, length J."""
        order = list(range(self.joint_count))
        for a, b in self.flip_pairs:
            order[a], order[b] = b, a
        return tuple(order)

    @property
    def sides(self) -> tuple[Side, ...]:
        """The body side of each joint, length J, from the names in its flip pair.

        If the names do not tell, the first joint of the pair is the left one.
        """
        sides: list[Side] = ["middle"] * self.joint_count
        for a, b in self.flip_pairs:
            swapped = side_of(self.names[a])[0] == "right" or side_of(self.names[b])[0] == "left"
            sides[a], sides[b] = ("right", "left") if swapped else ("left", "right")
        return tuple(sides)

    @property
    def assumed_left(self) -> tuple[str, ...]:
        """The joints taken as left because they come first in their flip pairs, not by name."""
        pairs = [(self.names[a], self.names[b]) for a, b in self.flip_pairs]
        return tuple(a for a, b in pairs if side_of(a)[0] == side_of(b)[0] == "middle")

    @property
    def metric(self) -> str:
        """PCKh if errors are divided by the annotated head length, else PCK."""
        return "PCK" if self.length else "PCKh"

    @property
    def has_names(self) -> bool:
        return all(self.names)

    def same_joints(self, other: "Skeleton") -> bool:
        """Whether the joints are the same; without names only their number is compared."""
        if not (self.has_names and other.has_names):
            return self.joint_count == other.joint_count
        return (self.names, self.flip_indices) == (other.names, other.flip_indices)

    def as_dict(self) -> dict[str, Any]:
        """Lists, strings and numbers only, for manifests and checkpoints."""
        return json.loads(json.dumps(self._asdict()))


def skeleton_from_dict(raw: dict[str, Any]) -> Skeleton:
    """The Skeleton of the dict that `as_dict` returned."""
    pairs, limbs = (tuple(map(tuple, raw[key])) for key in ("flip_pairs", "limbs"))
    groups = tuple((name, tuple(joints)) for name, joints in raw["groups"])
    length = raw["length"] and Length(tuple(raw["length"][0]), raw["length"][1])
    names, sigmas = tuple(raw["names"]), tuple(raw["sigmas"])
    rules = {key: raw[key] for key in ("mirror", *_CHOICES)}
    return Skeleton(raw["name"], names, pairs, limbs, groups, length, sigmas=sigmas, **rules)


def unnamed(joints: int) -> Skeleton:
    """A Skeleton without names, pairs and limbs, for files that do not name their joints."""
    return Skeleton("unnamed", ("",) * joints, (), (), ())


def require_same_joints(found: Skeleton, wanted: Skeleton, where: object, other: object) -> None:
    """Raise InputError unless the joints are the same. where, other: their files."""
    if not found.same_joints(wanted):
        theirs = f"{found.joint_count} joints ({found.name}): {', '.join(found.names[:4])}, ..."
        expected = f"the {wanted.joint_count} joints of {other} ({wanted.name})"
        advice = "use data and a checkpoint of the same joints, or start a run with --init_from"
        raise InputError(where, theirs, expected, advice)


def length_in_words(skeleton: Skeleton) -> str | None:
    """What errors are divided by, in words; None if the annotation file gives it."""
    if skeleton.length is None:
        return None
    joints = [skeleton.names[joint] for joint in skeleton.length.joints]
    what = f"distance of {joints[0]} and {joints[1]}" if joints else "longer side of the box"
    return f"{skeleton.length.factor:g} x the {what}"


def side_of(name: str) -> tuple[Side, str]:
    """The side in a joint's name and the rest of the name: l_knee -> left, knee."""
    if match := _SIDE_FIRST.fullmatch(name):
        word, rest = match[1] or match[2], match[3]
    elif match := _SIDE_LAST.fullmatch(name):
        rest, word = match[1], match[2]
    else:
        return "middle", name
    return ("left" if word[0] in "lL" else "right"), rest


def named_pairs(names: tuple[str, ...]) -> Pairs:
    """All pairs of a left joint and a right joint whose names differ in the side only."""
    sides = [side_of(name) for name in names]
    return tuple(
        (a, b)
        for a, b in itertools.permutations(range(len(names)), 2)
        if (sides[a], sides[b]) == (("left", sides[b][1]), ("right", sides[a][1]))
        or names[a].replace("left", "right").replace("Left", "Right") == names[b]
    )


def with_named_pairs(skeleton: Skeleton) -> Skeleton:
    """The skeleton with the pairs in its names, if each joint with a side is in exactly one
    and no other names differ only in the letters l and r."""
    names, pairs = skeleton.names, named_pairs(skeleton.names)
    with_side = [joint for joint, name in enumerate(names) if _HAS_SIDE.search(name)]
    others = [name.lower() for joint, name in enumerate(names) if joint not in with_side]
    are_alike = len({name.replace("r", "l") for name in others}) < len(others)  # eyeL, eyeR
    if not pairs or sorted(itertools.chain(*pairs)) != with_side or are_alike:
        return skeleton
    return skeleton._replace(flip_pairs=pairs, groups=default_groups(names, pairs), mirror=True)


def default_groups(names: tuple[str, ...], flip_pairs: Pairs) -> Groups:
    """One group for each flip pair and for each other joint, in the order of the joints.

    A pair is named without its side (l_knee, r_knee: knee) if no third joint has that name.
    """
    partner = dict(flip_pairs) | {b: a for a, b in flip_pairs}
    rests = [side_of(name)[1] for name in names]
    groups: list[tuple[str, tuple[int, ...]]] = []
    for joint, name in enumerate(names):
        other, rest = partner.get(joint), rests[joint]
        if other is None:
            groups.append((name, (joint,)))
        elif joint < other:
            is_clear = rests[other] == rest and rests.count(rest) == 2
            groups.append((rest if is_clear else f"{name}/{names[other]}", (joint, other)))
    return tuple(groups)


def load_skeleton(path: Path) -> Skeleton:
    """A Skeleton from a YAML file with the keys of docs/custom-data.md. Raises InputError."""
    raw = read_yaml(path, f"the keys {', '.join(_KEYS)}")
    try:
        return parse_skeleton(raw)
    except ValueError as error:
        expected, advice = "joints and pairs as docs/custom-data.md describes", "correct the file"
        raise InputError(path, str(error), expected, advice) from error


def skeleton_yaml(skeleton: Skeleton) -> str:
    """YAML text that `load_skeleton` reads; for skeletons whose length is the box."""
    names = skeleton.names
    pairs, limbs = (
        [[names[a], names[b]] for a, b in pairs] for pairs in (skeleton.flip_pairs, skeleton.limbs)
    )
    assert skeleton.length and not skeleton.length.joints
    raw = {
        "name": skeleton.name,
        "joints": list(names),
        "flip_pairs": pairs,
        "mirror": skeleton.mirror,
        "limbs": limbs,
        "normalize": {"box": skeleton.length.factor},
        "sigmas": list(skeleton.sigmas) or None,
    }
    return yaml.safe_dump(raw, sort_keys=False, default_flow_style=None, allow_unicode=True)


def shipped_skeleton(names: list[str]) -> Skeleton | None:
    """The skeleton in configs/skeletons with these joints, if there is one."""
    shipped = map(load_skeleton, sorted(Path(__file__).with_name("skeletons").glob("*.yaml")))
    return next((each for each in shipped if list(each.names) == names), None)


def parse_skeleton(raw: dict[str, Any]) -> Skeleton:
    """A Skeleton from the keys of a YAML file. Raises ValueError."""
    for key in raw:
        _index(key, _KEYS, "the file")
    missing = [key for key in _KEYS if key not in raw and key not in _OPTIONAL_KEYS]
    if missing:
        raise ValueError(f"no {', '.join(missing)}")
    names = tuple(_name_list(raw["joints"], "joints"))
    pairs = _pairs(raw["flip_pairs"], names, "flip_pairs")
    mirror = raw.get("mirror", True)
    if type(mirror) is not bool:
        raise ValueError(f"mirror: {mirror!r} is not true or false")
    if mirror:
        _check_sides(names, pairs)
    groups = default_groups(names, pairs)
    if raw.get("groups") is not None:
        groups = _groups(raw["groups"], names)
    for key in _CHOICES.keys() & raw.keys():
        _index(raw[key], _CHOICES[key], key)
    return Skeleton(
        name=_name_list([raw["name"]], "name")[0],
        names=names,
        flip_pairs=pairs,
        limbs=_pairs(raw["limbs"], names, "limbs"),
        groups=groups,
        length=_length(raw.get("normalize"), names),
        mirror=mirror,
        sigmas=_sigmas(raw.get("sigmas"), len(names)),
        **{key: raw[key] for key in _CHOICES if key in raw},
    )


def _index(name: Any, known: tuple[str, ...], where: str) -> int:
    """The index of a name among the known ones."""
    if name not in known:
        advice = did_you_mean(str(name), known) or f"known are {', '.join(known)}"
        raise ValueError(f"{where}: unknown {name!r}; {advice}")
    return known.index(name)


def _name_list(raw: Any, where: str) -> list[str]:
    """At least one name, none twice."""
    is_list = isinstance(raw, list) and len(raw) > 0
    # YAML reads an unquoted yes, no, on, off as true or false, and digits as a number.
    if not is_list or not all(isinstance(n, str) and n.strip() and n.isprintable() for n in raw):
        raise ValueError(f"{where}: {raw!r} are not names (write them in quotes)"[:300])
    if twice := sorted({name for name in raw if raw.count(name) > 1}):
        raise ValueError(f"{where}: {', '.join(twice)} more than once")
    return raw


def _joints(raw: Any, names: tuple[str, ...], where: str) -> tuple[int, ...]:
    """Indices of different joints, at least one."""
    return tuple(_index(name, names, where) for name in _name_list(raw, where))


def _pairs(raw: Any, names: tuple[str, ...], where: str) -> Pairs:
    pairs: list[tuple[int, int]] = []
    for i, entry in enumerate(raw if isinstance(raw, list) else [raw]):
        joints = _joints(entry, names, f"{where}[{i}]")
        if len(joints) != 2 or set(joints) in map(set, pairs):
            raise ValueError(f"{where}[{i}]: {entry} is not a pair of joints, or is repeated")
        pairs.append((joints[0], joints[1]))
    return tuple(pairs)


def _check_sides(names: tuple[str, ...], pairs: Pairs) -> None:
    """Raise ValueError for a joint in two pairs, and if names and pairs disagree on the sides.

    Such a mistake would silently train left joints as right ones.
    """
    paired = [joint for pair in pairs for joint in pair]
    for joint in paired:
        if paired.count(joint) > 1:
            raise ValueError(f"flip_pairs: {names[joint]} in {paired.count(joint)} pairs")
    sides = [side_of(name) for name in names]
    for a, b in pairs:
        if sides[a][0] == sides[b][0] != "middle":
            raise ValueError(f"flip_pairs: {names[a]} and {names[b]} are both {sides[a][0]}")
    missing = [(a, b) for a, b in named_pairs(names) if not {(a, b), (b, a)} & set(pairs)]
    if missing:
        words = ", ".join(f"{names[a]} and {names[b]}" for a, b in missing)
        raise ValueError(f"flip_pairs: no pair of {words}")


def _groups(raw: Any, names: tuple[str, ...]) -> Groups:
    if not isinstance(raw, dict):
        raise ValueError(f"groups: {raw!r} has no name and list of joints for each group"[:300])
    keys = _name_list([*raw], "groups")
    return tuple((key, _joints(raw[key], names, f"groups.{key}")) for key in keys)


def _length(raw: Any, names: tuple[str, ...]) -> Length | None:
    if raw is None:
        return None
    keys = set(raw) if isinstance(raw, dict) else set()
    factor = raw.get("box", raw.get("factor", 1.0)) if keys else 0
    if type(factor) in (int, float) and 0 < factor < math.inf:
        if keys == {"box"}:
            return Length((), float(factor))
        joints = _joints(raw.get("between"), names, "normalize.between")
        if len(joints) == 2 and keys <= {"between", "factor"}:
            return Length(joints, float(factor))
    expected = "{box: FACTOR} or {between: [JOINT, JOINT], factor: FACTOR}, with FACTOR above 0"
    raise ValueError(f"normalize: {raw!r} is not {expected}"[:400])


def _sigmas(raw: Any, joints: int) -> tuple[float, ...]:
    if raw is None:
        return ()
    is_list = isinstance(raw, list) and len(raw) == joints
    if not is_list or not all(type(each) is float and 0 < each < 1 for each in raw):
        raise ValueError(f"sigmas: {raw!r} is not a list of {joints} numbers in 0..1"[:400])
    return tuple(raw)


R_ANKLE, R_KNEE, R_HIP, L_HIP, L_KNEE, L_ANKLE = 0, 1, 2, 3, 4, 5
PELVIS, THORAX, UPPER_NECK, HEAD_TOP = 6, 7, 8, 9
R_WRIST, R_ELBOW, R_SHOULDER, L_SHOULDER, L_ELBOW, L_WRIST = 10, 11, 12, 13, 14, 15

MPII = Skeleton(
    name="mpii",
    names=(
        "r_ankle", "r_knee", "r_hip", "l_hip", "l_knee", "l_ankle", "pelvis", "thorax",
        "upper_neck", "head_top", "r_wrist", "r_elbow", "r_shoulder", "l_shoulder", "l_elbow",
        "l_wrist",
    ),
    flip_pairs=(
        (R_ANKLE, L_ANKLE), (R_KNEE, L_KNEE), (R_HIP, L_HIP),
        (R_WRIST, L_WRIST), (R_ELBOW, L_ELBOW), (R_SHOULDER, L_SHOULDER),
    ),
    limbs=(
        (R_ANKLE, R_KNEE), (R_KNEE, R_HIP), (R_HIP, PELVIS), (PELVIS, L_HIP), (L_HIP, L_KNEE),
        (L_KNEE, L_ANKLE), (PELVIS, THORAX), (THORAX, UPPER_NECK), (UPPER_NECK, HEAD_TOP),
        (R_WRIST, R_ELBOW), (R_ELBOW, R_SHOULDER), (R_SHOULDER, THORAX), (THORAX, L_SHOULDER),
        (L_SHOULDER, L_ELBOW), (L_ELBOW, L_WRIST),
    ),
    groups=(
        ("head", (HEAD_TOP,)), ("neck", (UPPER_NECK,)), ("shoulder", (R_SHOULDER, L_SHOULDER)),
        ("elbow", (R_ELBOW, L_ELBOW)), ("wrist", (R_WRIST, L_WRIST)), ("hip", (R_HIP, L_HIP)),
        ("knee", (R_KNEE, L_KNEE)), ("ankle", (R_ANKLE, L_ANKLE)),
    ),
)  # fmt: skip

# mpii_annotations.json gives the scale and centre of the body. In the h5 files of princeton-vl both
# are enlarged so that the box contains the whole person (docs/conventions.md).
BOX_SCALE = 1.25
BOX_SHIFT_Y_PX = 15.0
PIXELS_PER_SCALE = 200.0
MPII_HEAD_LENGTH = Length((HEAD_TOP, UPPER_NECK), 0.75)
"""Used if the annotation file has no head box."""
