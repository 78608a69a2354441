"""Shapes10, a built-in dataset of drawn shapes."""

from plumbing.sources.source import Source

import cv2
import numpy as np


def regular(corners, *radii):
    """Return a polygon's corners as (radii, angles): equal angles, the radii in turn (1 without any)."""
    return np.resize(radii or (1,), corners), np.arange(corners) * 2 * np.pi / corners


SHAPES = "bar circle cross diamond hexagon ring sector square star triangle".split()
POLYGONS = {
    "bar": (np.ones(4), np.array([0.3, np.pi - 0.3, np.pi + 0.3, -0.3])),
    "cross": (np.resize([1, 1, 0.42], 12), np.repeat(np.arange(4) * np.pi / 2, 3) + np.tile([-0.3, 0.3, np.pi / 4], 4)),
    "diamond": regular(4, 1, 0.55),
    "hexagon": regular(6),
    "square": regular(4),
    "star": regular(10, 1, 0.45),
    "triangle": regular(3),
}


def draw_shape(shape, rng):
    """Draw a shape with random position, size, rotation, colours and noise: uint8 32×32×3."""
    back, fore = rng.randint(0, 100, 3), rng.randint(130, 256, 3)
    image = np.full((32, 32, 3), back, np.uint8)
    size, turn = rng.uniform(7, 13), rng.uniform(-0.3, 0.3)
    x, y = rng.uniform(max(size, 11), 32 - max(size, 11), 2)
    colour = fore.tolist()

    centre, radius = (round(x), round(y)), round(size * 0.8)
    if shape == "circle":
        cv2.circle(image, centre, radius, colour, -1, cv2.LINE_AA)
    elif shape == "ring":
        cv2.circle(image, centre, radius, colour, 2, cv2.LINE_AA)
    elif shape == "sector":
        cv2.ellipse(image, centre, (radius, radius), np.degrees(turn), 0, 240, colour, -1, cv2.LINE_AA)
    else:
        radii, angles = POLYGONS[shape]
        points = np.stack([x + size * radii * np.cos(turn + angles), y + size * radii * np.sin(turn + angles)], axis=1)
        cv2.fillPoly(image, [np.round(points * 16).astype(np.int32)], colour, cv2.LINE_AA, shift=4)
    return np.clip(image + rng.normal(0, rng.uniform(5, 25), image.shape), 0, 255).astype(np.uint8)


def draw_shapes(num_train=10000, num_test=2000, seed=0):
    """Draw Shapes10, the same images each time, so that figures of two machines can be compared."""

    def images(count, rng):
        for index in range(count):
            label = index % len(SHAPES)
            yield draw_shape(SHAPES[label], rng), label

    counts = {"train": num_train, "test": num_test}
    rng = np.random.RandomState(seed)
    return Source(SHAPES, [(split, count, images(count, rng)) for split, count in counts.items()], channels=3)
