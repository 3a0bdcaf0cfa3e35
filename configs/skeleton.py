"""What a set of joints is: names, left-right pairs, limbs to draw, and groups to report."""

from typing import NamedTuple


class Skeleton(NamedTuple):
    """The joints of one data set. Indices count from 0 in the order of `names`."""

    name: str
    names: tuple[str, ...]
    """One name per joint."""
    flip_pairs: tuple[tuple[int, int], ...]
    """Pairs of joints that change places when a picture is mirrored."""
    limbs: tuple[tuple[int, int], ...]
    """Pairs of joints joined by a line in a drawing."""
    groups: tuple[tuple[str, tuple[int, ...]], ...]
    """Rows of the PCKh table: a name and its joints. Joints in none count in the pooled mean."""

    @property
    def joint_count(self) -> int:
        """Number of joints, J."""
        return len(self.names)

    @property
    def mirrored(self) -> tuple[int, ...]:
        """For each joint the joint that takes its place in a mirrored picture, length J."""
        order = list(range(self.joint_count))
        for a, b in self.flip_pairs:
            order[a], order[b] = b, a
        return tuple(order)
