"""What a run tells: one live line, metrics.jsonl and TensorBoard, on the first rank alone."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class Log:
    """The log of one process; silent unless it is the first rank."""

    def __init__(self, folder: Path, enabled: bool, steps: int, first_step: int):
        """folder: the run's. steps: length of the run. first_step: where this start begins."""
        self.enabled = enabled
        if not enabled:
            return
        _cut(folder / "metrics.jsonl", first_step)
        self._file = (folder / "metrics.jsonl").open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
        self._bar = tqdm(
            total=steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 15,
            file=sys.stderr,
        )

    def advance(self) -> None:
        """One more step is done."""
        if self.enabled:
            self._bar.update()

    def train(self, step: int, values: dict[str, float]) -> None:
        """Numbers of the steps since the last call."""
        if not self.enabled:
            return
        self._write("train", step, values)
        self._bar.set_postfix_str(
            f"loss {values['loss']:.5f}, {values['people_per_s']:.0f} people/s, "
            f"waiting for data {100 * values['wait_share']:.0f} %",
            refresh=False,
        )

    def validation(self, step: int, values: dict[str, float]) -> None:
        """Numbers of a validation."""
        if self.enabled:
            self._write("valid", step, values)

    def say(self, text: str) -> None:
        """A line that stays on the screen."""
        if self.enabled:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Flush and close everything."""
        if self.enabled:
            self._bar.close()
            self._board.close()
            self._file.close()

    def _write(self, kind: str, step: int, values: dict[str, float]) -> None:
        entry: dict[str, Any] = {
            "kind": kind,
            "step": step,
            "time": round(time.time(), 3),
            **values,
        }
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)


def _cut(path: Path, step: int) -> None:
    """Drop the lines after a step: a run resumed from there writes them again."""
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(kept))
    temporary.rename(path)
