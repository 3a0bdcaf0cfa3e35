"""Cases for benchmarks/throughput.py: evaluation one person at a time, and in batches.

The one-by-one way re-creates what princeton-vl/pytorch_stacked_hourglass does for each person: its
crop, a forward pass for the picture and one for its mirror image, a loop over joints to decode, a
matrix inverse for each joint to go back to the picture.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from benchmarks.timing import Case
from common.distributed import DistributedContext
from evaluation.inference import (
    choose_batch_size,
    last_heatmaps,
    predict_distributed,
)
from model.hourglass import StackedHourglass
from pipelines import opencv_loader as opencv_crops
from pipelines import princeton
from pipelines.augment import PRESETS
from pipelines.codec import Codec
from pipelines.shard_format import unpack_records
from pipelines.shards import ShardSet

Points = npt.NDArray[np.float64]


def decode_cases(shards: ShardSet, device: torch.device) -> list[Case]:
    """Heatmaps -> joints in the picture, without crop and network."""
    count = len(shards)
    fields = unpack_records(shards.records().astype(np.float64))
    heat = torch.rand(count, shards.manifest.joints, 64, 64, device=device) ** 4
    codec = princeton_codec(shards)

    def one_by_one() -> int:
        for row in range(count):
            decode_by_loop(heat[row], fields.center_N2[row], float(fields.scale_N[row]))
        return count

    def batched() -> int:
        joints, _ = codec.decode(heat)
        codec.image_joints(joints, fields, torch.empty(0))
        return count

    return [Case("one by one (princeton)", one_by_one), Case("batched", batched)]


def evaluate_cases(shards: ShardSet, workers: int, device: torch.device) -> list[Case]:
    """The whole way with the flip test: read, decode the JPEG, crop, network, joints."""
    on_gpu = device.type == "cuda"
    width, people = (256, len(shards)) if on_gpu else (32, min(len(shards), 32))
    codec, samples = princeton_codec(shards), np.arange(people)
    network = StackedHourglass(2, width, shards.manifest.joints).to(device).eval()
    twin = StackedHourglass(2, width, shards.manifest.joints).to(device).eval()
    twin.load_state_dict(network.state_dict())
    twin.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    # As for many more people, so that every size that these can fill is tried.
    size, _ = choose_batch_size(
        twin, codec, 16 * people, flip=True, device=device, dtype=torch.float32
    )
    dist = DistributedContext(0, 1, device, torch.float32)

    def one_by_one() -> int:
        for sample in samples:
            predict_by_one(network, shards, int(sample), device)
        return people

    def batched() -> int:
        predict_distributed(
            twin, shards, samples, codec, dist, batch_size=size, workers=workers, flip=True
        )
        return people

    name = f"2 stacks of width {width}"
    return [
        Case(f"{name}, one by one (princeton)", one_by_one),
        Case(f"{name}, batches of {size}, {workers} workers", batched),
    ]


def princeton_codec(shards: ShardSet) -> Codec:
    """Crop, heatmaps and decoding by its rules, at 256 px."""
    return Codec(
        preset=PRESETS["princeton"],
        rule="princeton",
        sigma=1.0,
        input_px=256,
        skeleton=shards.manifest.skeleton,
    )


@torch.no_grad()
def predict_by_one(
    network: nn.Module, shards: ShardSet, sample: int, device: torch.device
) -> Points:
    """(J, 2) image px of one person, by two forward passes of one picture."""
    fields = unpack_records(shards.record(sample)[None].astype(np.float64))
    center, scale = fields.center_N2[0], float(fields.scale_N[0])
    image = opencv_crops.decode(shards.jpeg(sample), shards.where(sample))
    crop = princeton.crop(image, center, scale, 256)[..., ::-1].copy()
    pixels = torch.from_numpy(crop.transpose(2, 0, 1) / 255).float()[None].to(device)
    codec = princeton_codec(shards)
    plain = last_heatmaps(network, pixels, codec, flip=False)
    other = last_heatmaps(network, pixels.flip(3), codec, flip=False)
    mirrored = torch.tensor(shards.manifest.skeleton.mirrored, device=device)
    heat = ((plain + other.flip(3)[:, mirrored]) / 2).clamp_max(1)
    return decode_by_loop(heat[0], center, scale)


def decode_by_loop(heat_JHW: Tensor, center: npt.NDArray, scale: float) -> Points:
    """(J, 2) image px of one person: princeton's rule with a loop over joints."""
    peaks = torch.nn.functional.max_pool2d(heat_JHW[None], 3, 1, 1)[0] == heat_JHW
    values, index = (heat_JHW * peaks).flatten(1).topk(1, dim=1)
    maps, size = heat_JHW.cpu().numpy(), heat_JHW.shape[-1]
    joints = np.zeros((len(maps), 2))
    found = zip(maps, values[:, 0].cpu().numpy(), index[:, 0].cpu().numpy(), strict=True)
    for joint, (one, value, place) in enumerate(found):
        y, x = divmod(int(place), size)
        point = np.array([x, y, 1.0])
        if value > 0:
            right, left = one[y, min(x + 1, size - 1)], one[y, max(x - 1, 0)]
            below, above = one[min(y + 1, size - 1), x], one[max(y - 1, 0), x]
            point[0] += 0.75 if right > left else 0.25
            point[1] += 0.75 if below > above else 0.25
        point[:2] *= 256 / size
        image_from_crop = np.linalg.inv(princeton.crop_from_image(center, scale, 256))
        joints[joint] = (image_from_crop @ point)[:2].astype(int)
    return joints
