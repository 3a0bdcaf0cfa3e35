"""Compiles the kernels of a network for compute capability 9.0 on a machine without a GPU.

usage: python tests/compile_kernels.py FOLDER SIDE JOINTS,WIDTH,STEM,STEM,STEM ...
SIDE: of the picture, in pixels. FOLDER: for temporary files. Nothing is computed. Prints a JSON
object for each compiled kernel, with its resources as cuobjdump reports them.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from configs.schema import ModelConfig
from model.fused_kernels import fused_network
from model.hourglass import StackedHourglass

BINARIES = Path(triton.__file__).parent / "backends/nvidia/bin"
launch = JITFunction.run
compiled: set[str] = set()


class NoGpu:
    """Replaces triton's CUDA driver for compilation."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(kernel: JITFunction, *args: object, grid: object, warmup: bool, **options: object):
    """Compile what a launch with these arguments would compile, and print its resources."""
    result = launch(kernel, *args, grid=grid, warmup=True, **options)
    if result.hash not in compiled:
        compiled.add(result.hash)
        cubin = Path(sys.argv[1]) / "kernel.cubin"
        cubin.write_bytes(result.asm["cubin"])
        command = [BINARIES / "cuobjdump", "--dump-resource-usage", cubin]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        print(json.dumps({"name": kernel.__name__, "shared": result.metadata.shared, **found}))


def main() -> None:
    driver.set_active(NoGpu())
    JITFunction.run = compile_only
    side = int(sys.argv[2])
    for shape in sys.argv[3:]:
        joints, width, *stem = map(int, shape.split(","))
        model = ModelConfig(stacks=2, width=width, depth=1, stem=(*stem,))
        network = StackedHourglass(model, joints).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):  # for cuDNN's convolutions
            heatmaps = fused_network(network, torch.zeros(2, 3, side, side))
        torch.stack(heatmaps).sum().backward()


if __name__ == "__main__":
    main()
