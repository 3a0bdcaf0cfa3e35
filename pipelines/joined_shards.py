"""Several data sets as one split, whose skeleton has the joints of all of them.

Joints are matched by name; l_knee, left_knee and kneeLeft are the same joint. The joints that a
data set does not label are ignored for its people, by loss and metrics.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from common.errors import InputError
from configs.skeleton import Length, Skeleton, side_of
from pipelines.shard_format import COLUMNS, HEADER_LENGTH, IGNORED, record_length
from pipelines.shards import ShardSet

Joint = tuple[str, str]
"""Side and name of a joint in any skeleton."""


def joints_of(skeleton: Skeleton) -> list[Joint]:
    """The joints in the order of the skeleton."""
    return [side_of(name) for name in skeleton.names]


def union_skeleton(skeletons: dict[str, Skeleton]) -> Skeleton:
    """The joints of all skeletons, in the order of their first appearance, with the first's names.

    skeletons: by the name of their data set. Raises InputError if they have no names, name a joint
    twice, or contradict each other in their left-right pairs.
    """
    first: dict[Joint, str] = {}
    partners: dict[Joint, Joint] = {}
    for name, skeleton in skeletons.items():
        joints = joints_of(skeleton)
        if not skeleton.has_names or len(set(joints)) < len(joints):
            found, expected = ", ".join(skeleton.names), "a name for each joint, none twice"
            raise InputError(name, found, expected, "pack it with such a --skeleton")
        first |= {j: n for j, n in zip(joints, skeleton.names, strict=True) if j not in first}
        for left, right in skeleton.flip_pairs:
            partners |= {joints[left]: joints[right], joints[right]: joints[left]}
    for name, skeleton in skeletons.items():
        joints = joints_of(skeleton)
        for here, other in enumerate(skeleton.flip_indices if skeleton.mirror else ()):
            partner = partners.get(joints[here], joints[here])
            if partner != joints[other] and (here != other or partner in joints):
                found = f"{skeleton.names[here]} is mirrored to {skeleton.names[other]}"
                expected = f"{first[partner]}, as in another data set"
                raise InputError(name, found, expected, "correct flip_pairs and pack it again")
    place = {joint: number for number, joint in enumerate(first)}
    limbs, groups = list[tuple[int, int]](), dict[str, tuple[int, ...]]()
    for skeleton in skeletons.values():
        own = [place[joint] for joint in joints_of(skeleton)]
        limbs += [(own[a], own[b]) for a, b in skeleton.limbs]
        for group, members in skeleton.groups:
            more = [own[joint] for joint in members]
            groups[group] = tuple(dict.fromkeys([*groups.get(group, ()), *more]))
    rules = {skeleton.unmarked for skeleton in skeletons.values()}
    return Skeleton(
        name="+".join(dict.fromkeys(skeleton.name for skeleton in skeletons.values())),
        names=tuple(first.values()),
        flip_pairs=tuple((place[a], place[b]) for a, b in partners.items() if place[a] < place[b]),
        limbs=tuple(dict.fromkeys(limbs)),
        groups=tuple(groups.items()),
        # Records have each person's length; this one only makes the metric's name PCK.
        length=Length((), 1.0) if any(each.length for each in skeletons.values()) else None,
        mirror=all(skeleton.mirror for skeleton in skeletons.values()),
        # Records have the ignored joints of data sets that ignore what is not marked.
        unmarked=rules.pop() if len(rules) == 1 else "empty" if "empty" in rules else None,
    )


class JoinedShards(ShardSet):
    """Several splits as one. Its samples are those of the splits, one after another."""

    def __init__(
        self, splits: dict[str, ShardSet], skeleton: Skeleton, weights: Sequence[float] = (1.0,)
    ):
        """splits: by name. skeleton: with the joints of all. Raises InputError.

        weights: how often the people of each split are taken in an epoch.
        """
        # What is not set below, such as the packing, is that of the first split.
        self.__dict__.update(next(iter(splits.values())).__dict__)
        self.weights, parts = weights, list(splits.values())
        for name, split in splits.items():
            if (split.cache and len(parts) > 1) or split.is_raw != self.is_raw:
                expected = "folders, all with raw or all with JPEG shards, if there are several"
                found = "object storage" if split.cache else f"--packing {split.manifest.packing}"
                raise InputError(name, found, expected, "copy it to a folder, or pack it again")
        self._files = {}
        ends = np.cumsum([len(split) for split in parts]).tolist()
        self.samples_of_set = {
            name: range(end - len(split), end)
            for end, (name, split) in zip(ends, splits.items(), strict=True)
        }
        self.manifest = replace(
            self.manifest,
            people=ends[-1],
            joints=skeleton.joint_count,
            skeleton=skeleton,
            shards=tuple(shard for split in parts for shard in split.manifest.shards),
        )
        self.tars = [tar for split in parts for tar in split.tars]
        first_tar = np.cumsum([0] + [len(split.tars) for split in parts])
        self.shard_of_sample = np.concatenate(
            [split.shard_of_sample + tar for split, tar in zip(parts, first_tar, strict=False)]
        )
        self.keys = [key for split in parts for key in split.keys]
        self._ranges_NC2 = np.concatenate([split._ranges_NC2 for split in parts])
        self._origin_N = np.arange(ends[-1])
        # Rows of the annotations count on from set to set.
        self._records = _joined_records(parts, skeleton)
        names = set.intersection(*(set(split._columns) for split in parts))
        self._columns = {n: [x for split in parts for x in split._columns[n]] for n in names}

    def keys_of_epoch(self, seed: int, epoch: int) -> npt.NDArray[np.int64]:
        """As of ShardSet. Each set has passes of its own, which the epochs cut into pieces."""
        pieces = []
        parts = zip(self.samples_of_set.values(), self.weights, strict=True)
        for number, (samples, weight) in enumerate(parts):
            taken = max(1, round(weight * len(samples)))
            own_N, place_N = np.divmod(epoch * taken + np.arange(taken), len(samples))
            for own in np.unique(own_N):
                order = np.random.default_rng([seed, own, number, 1]).permutation(samples)
                chosen = order[place_N[own_N == own]]
                pieces.append(np.column_stack([chosen, np.full(len(chosen), own)]))
        return np.concatenate(pieces)


def _joined_records(splits: list[ShardSet], skeleton: Skeleton) -> npt.NDArray[np.float32]:
    """(N, record_length) records with the joints of the skeleton; read-only. Raises InputError."""
    joints, parts, rows = joints_of(skeleton), [], 0
    for split in splits:
        own = split.records()
        records = np.zeros((len(own), record_length(len(joints))), dtype=np.float32)
        records[:, :HEADER_LENGTH] = own[:, :HEADER_LENGTH]
        records[:, COLUMNS["row"]] += rows
        rows = int(records[:, COLUMNS["row"]].max()) + 1
        joints_NJ4 = records[:, HEADER_LENGTH:].reshape(len(own), -1, 4)  # a view
        joints_NJ4[:] = IGNORED
        columns = [joints.index(joint) for joint in joints_of(split.manifest.skeleton)]
        joints_NJ4[:, columns] = own[:, HEADER_LENGTH:].reshape(len(own), -1, 4)
        parts.append(records)
    joined = np.concatenate(parts)
    joined.setflags(write=False)
    return joined


def with_joints_of(split: ShardSet, skeleton: Skeleton) -> ShardSet:
    """The split with the joints of a skeleton that has all of its joints and more, else itself."""
    own = split.manifest.skeleton
    is_part = own.has_names and set(joints_of(own)) <= set(joints_of(skeleton))
    if own.same_joints(skeleton) or not is_part:
        return split
    # The union checks the pairs.
    union_skeleton({str(split.folder): own, "the network's joints": skeleton})
    places = [joints_of(skeleton).index(joint) for joint in joints_of(own)]
    length = own.length and own.length._replace(joints=tuple(places[j] for j in own.length.joints))
    return JoinedShards({str(split.folder): split}, skeleton._replace(length=length))
