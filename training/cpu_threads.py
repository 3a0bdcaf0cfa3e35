"""How many CPU threads torch uses: set by train.threads, or measured in a run's first steps."""

import os
from statistics import median

import torch

from common.distributed import DistributedContext, cores_per_rank, set_cpu_threads, sum_over_ranks
from configs.schema import Config

WARM_UP_STEPS, ROUNDS, STEPS_PER_ROUND = 4, 2, 4
"""In each round each number of threads takes so many steps, of which the first is not counted."""


class ThreadTuner:
    """Finds the faster of two thread counts: all cores, or those that loader workers leave free.

    Threads of one step wait for each other, so a core shared with a busy worker slows all of them;
    but a worker that is hardly busy needs no core. This is measured with the real loader.
    """

    def __init__(self, config: Config, dist: DistributedContext):
        """Set the threads to start with; nothing is measured if there is no choice."""
        self._dist = dist
        self._schedule: list[tuple[int, bool]] = []
        """Of the next steps: thread count, and whether the step is counted."""
        if dist.device.type == "cpu" and config.train.threads:
            torch.set_num_threads(config.train.threads)
            return
        set_cpu_threads(dist.device, config.data.workers)
        counts = [torch.get_num_threads(), cores_per_rank()]
        fixed = dist.device.type != "cpu" or "OMP_NUM_THREADS" in os.environ
        if fixed or counts[0] == counts[1]:
            return
        self._seconds: dict[int, list[float]] = {count: [] for count in counts}
        self._schedule = [(counts[0], False)] * WARM_UP_STEPS
        for count in ROUNDS * counts:
            self._schedule += [(count, step > 0) for step in range(STEPS_PER_ROUND)]

    def add_step(self, seconds: float) -> dict[int, float]:
        """Record a step; after the last one the median seconds per thread count, else {}.

        Every rank must call it, and gets the same answer.
        """
        if not self._schedule:
            return {}
        count, is_counted = self._schedule.pop(0)
        if is_counted:
            self._seconds[count].append(seconds)
        if self._schedule:
            torch.set_num_threads(self._schedule[0][0])
            return {}
        medians = torch.tensor([median(s) for s in self._seconds.values()], dtype=torch.float64)
        means = sum_over_ranks(medians, self._dist) / self._dist.world_size
        return dict(zip(self._seconds, means.tolist(), strict=True))
