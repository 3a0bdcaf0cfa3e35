"""Weights of bearpaw/anibali, against a plain-torch network of that layout."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from common.errors import InputError
from configs.skeleton import MPII
from model import checkpoint
from model.foreign_checkpoints import INPUT_MEAN


class Bottleneck(nn.Module):
    def __init__(self, inputs, planes):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, planes, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(planes), nn.Conv2d(planes, planes, 3, padding=1)
        self.bn3, self.conv3 = nn.BatchNorm2d(planes), nn.Conv2d(planes, planes * 2, 1)
        if inputs != planes * 2:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, planes * 2, 1))

    def forward(self, x):
        y = self.conv1(functional.relu(self.bn1(x)))
        y = self.conv2(functional.relu(self.bn2(y)))
        y = self.conv3(functional.relu(self.bn3(y)))
        return y + (self.downsample(x) if hasattr(self, "downsample") else x)


class Levels(nn.Module):
    """The hourglass as a flat list of levels, the innermost first."""

    def __init__(self, depth, planes):
        super().__init__()
        self.depth = depth
        self.hg = nn.ModuleList(
            nn.ModuleList(
                nn.Sequential(Bottleneck(planes * 2, planes)) for _ in range(4 if level == 0 else 3)
            )
            for level in range(depth)
        )

    def level(self, n, x):
        up = self.hg[n - 1][0](x)
        low = self.hg[n - 1][1](functional.max_pool2d(x, 2))
        low = self.level(n - 1, low) if n > 1 else self.hg[0][3](low)
        return up + functional.interpolate(self.hg[n - 1][2](low), scale_factor=2)

    def forward(self, x):
        return self.level(self.depth, x)


class Plain(nn.Module):
    """Stem 64 -> 128, 128 -> 256, 256 -> 256; `feats` planes of 128 make a width of 256."""

    def __init__(self, stacks, joints, depth=4, feats=128):
        super().__init__()
        width = 2 * feats
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3), nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(Bottleneck(64, 64))
        self.layer2 = nn.Sequential(Bottleneck(128, 128))
        self.layer3 = nn.Sequential(Bottleneck(256, feats))
        self.hg = nn.ModuleList(Levels(depth, feats) for _ in range(stacks))
        self.res = nn.ModuleList(nn.Sequential(Bottleneck(width, feats)) for _ in range(stacks))
        self.fc = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 1), nn.BatchNorm2d(width), nn.ReLU())
            for _ in range(stacks)
        )
        self.score = nn.ModuleList(nn.Conv2d(width, joints, 1) for _ in range(stacks))
        self.fc_ = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(stacks - 1))
        self.score_ = nn.ModuleList(nn.Conv2d(joints, width, 1) for _ in range(stacks - 1))

    def forward(self, x):
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(functional.max_pool2d(self.layer1(x), 2)))
        out = []
        for i in range(len(self.hg)):
            y = self.fc[i](self.res[i](self.hg[i](x)))
            out.append(self.score[i](y))
            if i < len(self.hg) - 1:
                x = x + self.fc_[i](y) + self.score_[i](out[-1])
        return torch.stack(out, dim=1)


@pytest.fixture(scope="module")
def plain() -> Plain:
    torch.manual_seed(0)
    network = Plain(2, 16, depth=3, feats=128)
    for module in network.modules():  # statistics that a mix-up of layers would not survive
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return network.eval()


@pytest.mark.parametrize("prefix", ["", "module."])
@torch.no_grad()
def test_outputs_equal_those_of_a_plain_network_of_that_layout(prefix, plain, tmp_path):
    tensors = {prefix + name: tensor for name, tensor in plain.state_dict().items()}
    torch.save({"state_dict": tensors, "epoch": 7}, tmp_path / "b.pt")
    loaded = checkpoint.load_checkpoint(tmp_path / "b.pt")
    assert loaded.config.model.stem == (64, 128, 256)
    assert loaded.config.model.input_mean == INPUT_MEAN
    network = checkpoint.evaluation_network(loaded)
    images = torch.rand(2, 3, 64, 64)
    mean = torch.tensor(INPUT_MEAN).reshape(1, 3, 1, 1)
    torch.testing.assert_close(network(images), plain(images - mean), atol=1e-5, rtol=1e-5)


def test_joints_of_another_number_have_no_names(tmp_path):
    torch.save({"state_dict": Plain(1, 5, depth=2, feats=16).state_dict()}, tmp_path / "b.pt")
    skeleton = checkpoint.load_checkpoint(tmp_path / "b.pt").skeleton
    assert skeleton.joint_count == 5 and not skeleton.has_names
    assert not skeleton.same_joints(MPII)


def test_networks_of_several_residuals_a_place_are_refused(plain, tmp_path):
    tensors = {**plain.state_dict(), "layer1.1.conv1.weight": torch.zeros(1)}
    torch.save({"state_dict": tensors}, tmp_path / "b.pt")
    with pytest.raises(InputError, match=r"layer1\.1\.conv1\.weight"):
        checkpoint.load_checkpoint(tmp_path / "b.pt")
