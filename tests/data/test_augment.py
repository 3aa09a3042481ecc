"""EDM's non-leaking augmentations: the same images and labels as its authors' pipe, keyed by position."""

from __future__ import annotations

import math

import torch

from diffscale.data.loading.augment import Drawn, augment_images, draw, transform

PARAMETERS = [
    [1.0, 0.0, 0.0, 1.0],  # mirrored
    [0.0, 1.0, 0.0, 0.0],  # upside down
    [0.5, -1.0, 0.0, 1.5],  # scale
    [0.4, 0.0, -2.0, 3.0],  # angle
    [0.0, 1.5, -1.0, 0.7],  # strength and
    [0.0, 0.0, 1.1, -2.0],  # axis of anisotropy
    [1.0, 0.0, -0.5, 0.3],  # to the right
    [0.0, -0.8, 0.25, 2.0],  # down
]
PLACES = [(0, 0, 0), (0, 7, 9), (1, 3, 12), (2, 15, 2), (2, 8, 8)]  # channel, row, column

# Made by AugmentPipe of NVlabs/edm (training/augment.py, commit 0a2ff34) with xflip=1e8 and yflip, scale, rotate_frac,
# aniso, translate_frac 1, its random numbers replaced by those that give the parameters above.
EDM_PIXELS = [
    [-0.34826, 0.92728, 0.65738, 0.12809, 0.09999],
    [-0.94332, 0.97648, 0.8629, -0.19004, 0.21572],
    [-0.26255, -0.77316, 0.99495, 0.2827, 0.03414],
    [-0.8353, 0.74437, 0.87218, -0.09526, -0.19385],
]
EDM_LABELS = [
    [1.0, 0.0, 0.5, -0.07894, 0.38942, 0.0, 0.0, 1.0, 0.0],
    [0.0, 1.0, -1.0, 0.0, 0.0, 1.5, 0.0, 0.0, -0.8],
    [0.0, 0.0, 0.0, -1.41615, -0.9093, -0.4536, -0.89121, -0.5, 0.25],
    [1.0, 0.0, 1.5, -1.98999, 0.14112, -0.2913, -0.63651, 0.3, 2.0],
]


def test_images_and_labels_are_those_of_the_authors_pipe():
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    waves = [torch.sin(0.7 * columns + 0.3 * rows), torch.cos(0.2 * columns * rows / 4), (columns - rows) / 16]
    drawn = Drawn(*torch.tensor(PARAMETERS, dtype=torch.float64))
    y = transform(torch.stack(waves).expand(4, 3, 16, 16), drawn)
    found = torch.stack([torch.stack([image[place] for place in PLACES]) for image in y])
    assert (found - torch.tensor(EDM_PIXELS)).abs().max() < 2e-5  # rounded to five places
    assert (drawn.label() - torch.tensor(EDM_LABELS)).abs().max() < 2e-5


def test_an_image_does_not_depend_on_what_else_is_in_the_batch():
    x = torch.rand(64, 3, 16, 16) * 2 - 1
    y, label = augment_images(x, 9, torch.arange(64), 0.5)
    for i in (0, 5, 21, 63):
        alone, its_label = augment_images(x[i : i + 1], 9, torch.tensor([i]), 0.5)
        assert torch.equal(alone[0], y[i])
        assert torch.equal(its_label[0], label[i])


def test_every_transformation_is_drawn_as_often_and_as_strongly_as_published():
    """Karras et al. 2022, appendix F.2: each with probability p, mirroring with 1/2; 5 standard errors."""
    n, p = 20_000, 0.12
    drawn = draw(1, torch.arange(n), p, True)
    expected = {"mirrored": 0.5, "inverted": p / 2, "scale": p, "angle": p, "strength": p, "right": p, "down": p}
    for name, share in expected.items():
        found = (getattr(drawn, name) != 0).float().mean().item()
        assert abs(found - share) < 5 * math.sqrt(share * (1 - share) / n), name
    for name in ("scale", "strength", "right", "down"):
        values = getattr(drawn, name)
        values = values[values != 0]
        assert abs(values.std() - 1) < 5 / math.sqrt(2 * len(values)), name
    turned = drawn.angle[drawn.angle != 0]
    assert abs(turned.std() - math.pi / math.sqrt(3)) < 5 * 0.9 / math.sqrt(len(turned))  # uniform over the circle
    assert torch.equal(drawn.right != 0, drawn.down != 0)


def test_augmentation_with_probability_zero_changes_nothing():
    x = torch.rand(16, 3, 8, 8) * 2 - 1
    y, label = augment_images(x, 0, torch.arange(16), 0.0, flip=False)
    assert torch.equal(x, y)
    assert not label.any()


def test_the_augmentation_label_is_zero_exactly_where_nothing_was_done():
    x = torch.rand(400, 3, 16, 16) * 2 - 1
    y, label = augment_images(x, 0, torch.arange(400), 0.12, flip=True)
    same = (x == y).flatten(1).all(1)
    assert torch.equal(same, ~label.any(1))
    assert label.shape == (400, 9)  # the width of EDM's DDPM++ CIFAR-10 network's augmentation input
    expected = 0.5 * (1 - 0.06) * 0.88**4  # no mirror, no upside down, none of the four others
    assert abs(same.float().mean() - expected) < 4 * (expected * (1 - expected) / 400) ** 0.5


def test_augmentation_moves_a_dot_to_where_its_label_says():
    """The label's translation, rotation and scale predict where the dot goes."""
    side, place = 33, 5.0  # a dot 5 pixels right of the centre
    rows, columns = torch.meshgrid(torch.arange(side) - 16.0, torch.arange(side) - 16.0, indexing="ij")
    dot = torch.exp(-((columns - place) ** 2 + rows**2) / 4)
    x = (dot * 2 - 1).expand(300, 1, side, side)
    y, label = augment_images(x.clone(), 5, torch.arange(300), 0.4, flip=False)
    weight = ((y[:, 0] + 1) / 2).clamp_min(0.2) - 0.2
    cos, sin, scale = label[:, 3] + 1, label[:, 4], 2 ** (0.2 * label[:, 2])
    expected = torch.stack([cos, -sin], 1) * (scale * place)[:, None] + label[:, 7:9] * 0.125 * side
    x_away, y_away = columns - expected[:, :1, None], rows - expected[:, 1:, None]
    weight = weight * (x_away**2 + y_away**2 < 36)  # the edges mirror the image, so there may be another dot
    found = torch.stack([(weight * columns).sum((1, 2)), (weight * rows).sum((1, 2))], 1) / weight.sum((1, 2))[:, None]
    plain = (label[:, 1] == 0) & (label[:, 5:7] == 0).all(1) & (expected.abs() < 10).all(1)
    assert plain.sum() > 40
    assert (found - expected)[plain].abs().max() < 0.25  # of a pixel
