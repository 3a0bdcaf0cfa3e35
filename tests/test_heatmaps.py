"""Rendering and decoding are an inverse pair, and princeton's rule is princeton's to the letter."""

import numpy as np
import pytest
import torch

from pipelines import heatmaps

RULES = [("exact", 1.0), ("princeton", 1.0), ("hrnet", 2.0)]


def test_princetons_targets_equal_the_golden_ones(shared):
    golden = np.load(shared / "golden" / "heatmaps.npz")
    joints = torch.from_numpy(golden["keypoints"])
    mine = heatmaps.render(joints, torch.ones(joints.shape[:2]), 64, "princeton", 1.0)
    assert golden["heatmaps"].shape == (6, 16, 64, 64)
    np.testing.assert_allclose(mine.numpy(), golden["heatmaps"], atol=1e-6)


def inner_joints(people: int = 200) -> torch.Tensor:
    return torch.rand(people, 5, 2, generator=torch.Generator().manual_seed(0)) * 48 + 8


def test_exact_targets_decode_to_the_very_joints():
    joints = inner_joints()
    heat = heatmaps.render(joints, torch.ones(200, 5), 64, "exact", 1.0)
    found, score = heatmaps.decode(heat, "exact")
    # The logarithm of a Gaussian is a parabola: nothing is lost but float32's last digits.
    torch.testing.assert_close(found, joints, atol=1e-4, rtol=0)
    assert score.min() > 0.75  # the pixel next to the joint is at most (0.5, 0.5) away


@pytest.mark.parametrize(
    ("rule", "sigma", "bias", "most"),
    # princeton: truncated, + 0.5 and a tie that steps back; hrnet: rounded.
    [("princeton", 1.0, -0.25, 0.76), ("hrnet", 2.0, 0.0, 0.51)],
)
def test_the_other_rules_lose_what_their_discretisation_loses(rule, sigma, bias, most):
    joints = inner_joints()
    heat = heatmaps.render(joints, torch.ones(200, 5), 64, rule, sigma)
    error = heatmaps.decode(heat, rule)[0] - joints
    assert error.mean().item() == pytest.approx(bias, abs=0.03)
    assert error.abs().max() < most


def test_a_worked_pixel_of_each_rule():
    joint, drawn = torch.tensor([[[20.6, 10.4]]]), torch.ones(1, 1)
    at = {r: heatmaps.render(joint, drawn, 64, r, s)[0, 0] for r, s in RULES}
    # exact: (21, 10) is (0.4, -0.4) away.
    assert at["exact"][10, 21].item() == pytest.approx(np.exp(-(0.16 + 0.16) / 2), abs=1e-6)
    # princeton: the centre is (20, 10), and the window ends 4 px away.
    assert at["princeton"][10, 20] == 1 and at["princeton"][10, 25] == 0
    assert at["princeton"][14, 24].item() == pytest.approx(np.exp(-16), rel=1e-4)
    # hrnet: the centre is (21, 10), sigma 2, and the window ends 6 px away.
    assert at["hrnet"][10, 21] == 1 and at["hrnet"][10, 28] == 0
    assert at["hrnet"][10, 27].item() == pytest.approx(np.exp(-36 / 8), rel=1e-5)


@pytest.mark.parametrize(("rule", "sigma"), RULES)
def test_joints_without_a_target_leave_an_empty_map(rule, sigma):
    heat = heatmaps.render(torch.full((1, 2, 2), 30.0), torch.tensor([[0, 1]]), 64, rule, sigma)
    assert heat.amax(dim=(2, 3)).tolist() == [[0, 1]]


def test_a_joint_outside_draws_nothing_by_princetons_rule_and_a_tail_by_the_exact_one():
    joint, drawn = torch.tensor([[[-1.5, 30.0]]]), torch.ones(1, 1)
    assert heatmaps.render(joint, drawn, 64, "princeton", 1.0).max() == 0
    tail = heatmaps.render(joint, drawn, 64, "exact", 1.0)
    assert tail.max().item() == pytest.approx(np.exp(-(1.5**2) / 2), rel=1e-5)


def test_rendering_equals_a_loop_over_joints():
    joints = torch.rand(3, 4, 2) * 40
    heat = heatmaps.render(joints, torch.ones(3, 4), 32, "exact", 2.0)
    y, x = np.mgrid[:32, :32]
    for person in range(3):
        for joint in range(4):
            cx, cy = joints[person, joint].tolist()
            expected = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / 2)  # sigma 2 at 64 px is 1 at 32
            np.testing.assert_allclose(heat[person, joint], expected, atol=1e-6)


def test_exact_mirrors_pixel_by_pixel():
    joints = inner_joints(3)
    flip_indices = torch.tensor([1, 0, 2, 4, 3])
    other = torch.stack([63 - joints[..., 0], joints[..., 1]], dim=-1)[:, flip_indices]
    plain = heatmaps.render(joints, torch.ones(3, 5), 64, "exact", 1.0)
    flipped = heatmaps.render(other, torch.ones(3, 5), 64, "exact", 1.0)
    torch.testing.assert_close(heatmaps.flip_back(flipped, flip_indices, "exact"), plain)


def test_hrnet_moves_the_mirrored_map_by_one_pixel():
    heat = torch.zeros(1, 1, 4, 8)
    heat[0, 0, 1, 2] = 1
    same = torch.tensor([0])
    assert heatmaps.flip_back(heat, same, "princeton")[0, 0, 1].argmax() == 5
    assert heatmaps.flip_back(heat, same, "hrnet")[0, 0, 1].argmax() == 6


def test_princetons_decode_takes_the_first_maximum_and_steps_back_on_a_tie():
    heat = torch.zeros(1, 2, 64, 64)
    heat[0, 0, 10, 20], heat[0, 0, 40, 50] = 0.7, 0.7
    heat[0, 0, 10, 21] = 0.2  # the right neighbour is higher; above and below tie
    joints, score = heatmaps.decode(heat, "princeton")
    assert joints[0, 0].tolist() == [20.75, 10.25]
    assert score[0].tolist() == pytest.approx([0.7, 0.0])


def test_princetons_decode_equals_suppressing_every_map():
    """Its own order of doing things, spelt out; with ties, zeros and maps below zero."""
    rng = np.random.default_rng(0)
    heat = np.round(rng.normal(size=(6, 5, 16, 12)), 1).astype(np.float32)  # rounded: many ties
    heat[1] -= 10  # nothing positive
    heat[2, 0], heat[2, 1] = -3.0, 0.0  # all peaks, and all zeros
    found, score = heatmaps.decode(torch.from_numpy(heat), "princeton")
    padded = np.pad(heat, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    around = [padded[..., y : y + 16, x : x + 12] for y in range(3) for x in range(3)]
    suppressed = heat * (heat == np.max(around, axis=0))
    for person, joint in np.ndindex(6, 5):
        one, plain = suppressed[person, joint], heat[person, joint]
        y, x = divmod(int(one.argmax()), 12)
        where = np.array([x, y], dtype=float)
        if one.max() > 0:
            right, left = plain[y, min(x + 1, 11)], plain[y, max(x - 1, 0)]
            below, above = plain[min(y + 1, 15), x], plain[max(y - 1, 0), x]
            where += [0.75 if right > left else 0.25, 0.75 if below > above else 0.25]
        assert found[person, joint].tolist() == where.tolist()
        assert score[person, joint].item() == one.max()


@pytest.mark.parametrize("rule", ["exact", "hrnet", "princeton"])
def test_peaks_at_the_border_stay_inside(rule):
    heat = torch.zeros(1, 4, 16, 16)
    for joint, (x, y) in enumerate([(0, 0), (15, 0), (0, 15), (15, 15)]):
        heat[0, joint, y, x] = 1
    joints, _ = heatmaps.decode(heat, rule)
    assert joints.min() >= 0 and joints.max() <= 16
