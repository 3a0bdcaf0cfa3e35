"""The network has the size and cost of its published form; the loss is the mean it says it is."""

import numpy as np
import pytest
import torch
from helpers import new_network
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from configs.schema import ModelConfig
from model import checkpoint
from model.hourglass import AddUpsampled, StackedHourglass
from model.loss import pck, peak_height, stack_losses


@pytest.mark.parametrize(("stacks", "parameters"), [(2, 6_562_144), (8, 25_402_816)])
def test_live_parameters_at_width_256(stacks, parameters):
    network = new_network(stacks, 256, 16)
    assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.mark.parametrize(
    ("stacks", "gmac"), [(2, 8.335), pytest.param(8, 27.440, marks=pytest.mark.slow)]
)
def test_forward_cost_at_256_px(stacks, gmac):
    with torch.device("meta"):
        network, image = new_network(stacks, 256, 16), torch.empty(1, 3, 256, 256)
    with FlopCounterMode(display=False) as counter:
        network(image)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmac, abs=0.001)


def test_any_size_gives_heatmaps_of_a_quarter_for_every_stack():
    network = new_network(3, 20, 5, depth=2, stem=(8, 12, 14)).eval()
    assert network(torch.rand(2, 3, 48, 80)).shape == (2, 3, 5, 12, 20)


def test_later_stacks_see_the_heatmaps_of_earlier_ones():
    network = new_network(2, 16, 4, depth=1, stem=(8, 8, 8)).eval()
    image = torch.rand(1, 3, 32, 32)
    before = network(image)
    torch.nn.init.zeros_(network.heads[0].weight)
    after = network(image)
    assert not torch.equal(before[:, 1], after[:, 1])


def test_channels_last_stays_channels_last():
    network = new_network(1, 16, 4, depth=1, stem=(8, 8, 8)).to(memory_format=torch.channels_last)
    image = torch.rand(2, 32, 32, 3).permute(0, 3, 1, 2)
    with torch.no_grad():
        features = network.hourglasses[0](network.stem(image))
    assert features.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adding_an_upsampled_map_equals_torchs_interpolation_bit_for_bit(dtype, layout):
    """The sum, its layout and both gradients."""

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(dtype).contiguous(memory_format=layout).requires_grad_()

    inputs = x, low = noise(3, 6, 8, 20), noise(3, 6, 4, 10)
    found = AddUpsampled.apply(*inputs)
    expected = x + functional.interpolate(low, scale_factor=2.0, mode="nearest")
    assert torch.equal(found, expected) and found.is_contiguous(memory_format=layout)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad(y, inputs, weights) for y in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b) and a.is_contiguous(memory_format=layout)


def test_head_scale_multiplies_the_heatmaps_of_a_fresh_network():
    """Of the first stack, whose input does not depend on heatmaps."""
    found = []
    for scale in (1.0, 0.25):
        torch.manual_seed(0)
        model = ModelConfig(stacks=2, width=16, depth=1, stem=(8, 8, 8), head_scale=scale)
        network = StackedHourglass(model, 4)
        found.append(network.eval()(torch.ones(1, 3, 16, 16)))
    assert found[0].abs().min() > 0
    torch.testing.assert_close(found[1][:, 0], found[0][:, 0] / 4)


def test_the_loss_of_a_stack_is_the_mean_over_joints_and_pixels():
    rng = np.random.default_rng(0)
    heat = rng.normal(size=(2, 3, 4, 5, 6)).astype(np.float32)
    target = rng.normal(size=(2, 4, 5, 6)).astype(np.float32)
    mine = stack_losses(torch.tensor(heat), torch.tensor(target), torch.ones(2, 4))
    expected = [((heat[:, s] - target) ** 2).mean() for s in range(3)]
    np.testing.assert_allclose(mine.numpy(), expected, rtol=1e-5)


def test_the_loss_is_the_mean_over_the_joints_that_count():
    heat, target = torch.ones(1, 1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    target[0, 0] = 3.0
    for counts, expected in (([1, 1, 1], (4 + 1 + 1) / 3), ([1, 1, 0], 2.5), ([1, 0, 0], 4)):
        found = stack_losses(heat, target, torch.tensor([counts], dtype=torch.bool))
        assert found.item() == pytest.approx(expected)


def test_foreground_multiplies_the_error_of_a_pixel_by_one_plus_its_share_of_the_target():
    """Errors 1, 0.25, 0 and 4 by hand, with a foreground of 10 and targets 0, 0.5, 1 and 1."""
    target = torch.tensor([0.0, 0.5, 1.0, 1.0]).reshape(1, 1, 2, 2)
    heat = target[:, None] + torch.tensor([1.0, -0.5, 0.0, 2.0]).reshape(1, 1, 1, 2, 2)
    found = stack_losses(heat, target, torch.ones(1, 1), 10.0)
    assert found.item() == pytest.approx((1 * 1 + 6 * 0.25 + 11 * 0 + 11 * 4) / 4)


def test_the_loss_is_float32_under_autocast():
    heat = torch.full((1, 1, 1, 64, 64), 1.0, dtype=torch.bfloat16)
    target = torch.full((1, 1, 64, 64), 0.999)
    loss = stack_losses(heat, target, torch.ones(1, 1))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(1e-6, rel=1e-3)


def test_peak_height_and_pck_count_drawn_joints_alone():
    heat = torch.zeros(1, 3, 8, 8)
    heat[0, 0, 1, 1], heat[0, 1, 2, 2], heat[0, 2, 3, 3] = 0.5, 0.1, 9.0
    drawn = torch.tensor([[True, True, False]])
    assert peak_height(heat, drawn).item() == pytest.approx(0.3)
    found = torch.tensor([[[0.0, 0.0], [9.0, 9.0], [0.0, 0.0]]])
    assert pck(found, torch.zeros(1, 3, 2), drawn, 1.0).item() == 0.5


def test_running_out_of_gpu_memory_is_not_reported_as_a_damaged_checkpoint(
    tiny_shards, tmp_path, monkeypatch
):
    from helpers import make_trainer, tiny_config

    def out_of_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    config = tiny_config(tiny_shards, optim={"ema_decay": 0.9})
    make_trainer(config, tmp_path).save(["last.pt"])
    saved = checkpoint.load_checkpoint(tmp_path / "last.pt")
    for owner, name in (
        (StackedHourglass, "load_state_dict"),
        (StackedHourglass, "to"),
        (torch.optim.Adam, "load_state_dict"),
    ):
        with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
            patch.setattr(owner, name, out_of_memory)
            make_trainer(config, tmp_path, saved)
    monkeypatch.setattr(StackedHourglass, "load_state_dict", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        checkpoint.trained_network(saved)
