#!/usr/bin/env python
"""
Make DigitScenes: small colour scenes of real handwritten digits, with their boxes.

The digits are scikit-learn's ``load_digits`` (1797 images of 8×8 pixels, shipped inside the
package, so nothing is downloaded). Every scene holds one to five of them, in a size, slant, ink
and place of their own, over a background that is rarely plain. Scenes have themes, so that some
digits keep each other's company and others hardly ever meet: there is a label graph to be learned.
No handwritten digit occurs in both splits.

With --evidence and --correlation, the labels are drawn from a distribution that is known exactly,
and two numbers say how much an image tells of its labels, and the labels of each other.

Scene ``k`` of a split is a function of the seed, the split and ``k`` alone: the same command makes
the same bytes with any number of processes, and a smaller set is the beginning of a larger one.

The file reads top to bottom: the constants that shape the scenes, what a scene is about, how it is
painted, and how a set of scenes is written down.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

# Noise hardly repeats itself: looking for repeats costs time, and makes larger files.
PNG_SETTINGS = [
    *(cv2.IMWRITE_PNG_COMPRESSION, 1),
    *(cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_HUFFMAN_ONLY),
]

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPLITS = ("train", "val")

# What a scene is about. Digits that belong to two themes keep the label graph from falling apart
# into blocks, and the unequal chances make the rarest label about a third as frequent as the most
# frequent one. With ML-GCN's threshold of 0.4 on P(j|i), each label keeps two or three edges.
THEMES = ((0, 2, 8), (3, 4, 6), (5, 6, 7, 8), (0, 1, 9))
THEME_CHANCES = (0.37, 0.30, 0.17, 0.16)
THEME_BREAK_CHANCE = 0.15  # the share of scenes that draw from all ten digits
COUNT_CHANCES = (0.15, 0.25, 0.25, 0.20, 0.15)  # of 1, 2, 3, 4 and 5 digits in a scene
TRAIN_SHARE = 0.7  # of the source digits of each class

# How hard a scene is to read. Lengths are shares of the scene's side and brightness runs from 0 to
# 1; a pair is the range that a uniform draw is made from.
DIGIT_SIDE = (0.28, 0.46)  # side of the square that the 8×8 source fills
ROTATION = 15.0  # degrees, to either side
SHEAR = 0.25  # sideways shift of a digit's top over its bottom per height, to either side
INK_CONTRAST = (0.3, 0.7)  # difference in brightness between a digit and what lies around it
INK_OPACITY = 1.0  # how much of what lies under its ink a digit hides
BACKGROUND_CONTRAST = 0.3  # the most that the background's two colours differ in each channel
DISTRACTORS = (0, 2)  # the fewest and the most strokes and blobs
COVER_CHANCE = 0.15  # of a patch of background that lies over part of a digit
COVERED_SHARE = (0.1, 0.35)  # of the digit's ink, when there is such a patch
MAX_BOX_OVERLAP = 0.25  # of two digits, as a share of the smaller box
MIN_VISIBLE = 0.5  # the share of its ink that every digit keeps, whatever is drawn over it
BLUR = (0.0, 0.012)  # standard deviation
NOISE = (0.0, 0.03)  # standard deviation, in brightness

# What --hard has in their place: more digits, smaller, fainter and half hidden, labels a sixth as
# frequent as the most frequent one, and themes that tell more of what can't be read.
HARD = {
    "THEME_CHANCES": (0.45, 0.30, 0.18, 0.07),
    "THEME_BREAK_CHANCE": 0.08,
    "COUNT_CHANCES": (0.05, 0.15, 0.20, 0.20, 0.20, 0.20),
    "DIGIT_SIDE": (0.20, 0.34),
    "ROTATION": 30.0,
    "SHEAR": 0.35,
    "INK_CONTRAST": (0.12, 0.45),
    "DISTRACTORS": (2, 5),
    "COVER_CHANCE": 0.5,
    "COVERED_SHARE": (0.2, 0.5),
    "MAX_BOX_OVERLAP": 0.4,
    "MIN_VISIBLE": 0.4,
    "BLUR": (0.0, 0.018),
    "NOISE": (0.01, 0.07),
}

# What --evidence goes to: these in place of the constants above at 0, where the ink is as clear as
# glass and an image says nothing of its labels, and what lies between them at 0 < evidence < 1.
UNREADABLE = {
    "DIGIT_SIDE": (0.16, 0.26),
    "ROTATION": 40.0,
    "SHEAR": 0.45,
    "INK_OPACITY": 0.0,
    "DISTRACTORS": (4, 8),
    "COVER_CHANCE": 0.8,
    "COVERED_SHARE": (0.3, 0.6),
    "MAX_BOX_OVERLAP": 0.5,
    "MIN_VISIBLE": 0.3,
    "BLUR": (0.0, 0.024),
    "NOISE": (0.02, 0.08),
}

# What a scene is about with --evidence and --correlation, see label_prior(). The frequencies are
# close to those that themes lead to, and below 0.4, so that independent labels have no edges.
LABEL_FREQUENCIES = (0.35, 0.15, 0.30, 0.25, 0.25, 0.15, 0.35, 0.15, 0.35, 0.15)
COUPLING = 4.0  # log-odds, at correlation 1, that two digits of one theme add to each other's
LABEL_SETS = np.array(list(itertools.product((False, True), repeat=len(NAMES))))  # (1024, 10)

PLACEMENT_TRIES = 50  # after these a digit that finds no room is left out of its scene
BRIGHTNESS = np.array([0.299, 0.587, 0.114], np.float32)  # of red, green and blue, to the eye


# ------------------------------------------------------------------------ what a scene is about


def split_sources(targets, seed):
    """
    Deal the source digits out to the splits, class by class.

    Args:
        targets (ndarray): (N,) ints in 0..9, the class of every source digit.
        seed (int): >= 0.

    Returns:
        dict[str, ndarray]: for "train" and "val" the sorted indices of their source digits. No
        index is in both, and each is in one.
    """
    rng = np.random.default_rng(seed)
    parts = {split: [] for split in SPLITS}
    for digit in range(len(NAMES)):
        members = rng.permutation(np.flatnonzero(targets == digit))
        cut = round(TRAIN_SHARE * len(members))
        parts["train"].append(members[:cut])
        parts["val"].append(members[cut:])
    return {split: np.sort(np.concatenate(part)) for split, part in parts.items()}


def draw_labels(rng):
    """
    Draw what a scene is to show.

    Returns:
        list[int]: one to five digits in 0..9. None comes twice unless the theme has fewer digits
        than the scene.
    """
    if rng.random() < THEME_BREAK_CHANCE:
        theme = range(len(NAMES))
    else:
        theme = THEMES[rng.choice(len(THEMES), p=THEME_CHANCES)]
    count = 1 + rng.choice(len(COUNT_CHANCES), p=COUNT_CHANCES)
    return rng.choice(theme, count, replace=count > len(theme)).tolist()


def label_prior(correlation):
    """
    The chance of each set of labels, exactly: correlation varies, and nothing else does.

    At 0, labels are independent of each other. Above it, the chance of a set s of labels is

        P(s) = exp(correlation · COUPLING · pairs(s) + Σ_{i in s} b_i + c_|s|)

    where pairs(s) is how many pairs in s share a theme. The numbers b_i and c_n are such that each
    label is as frequent, and each number of labels has the same chance, as at 0. They are found by
    iterative proportional fitting (Deming and Stephan 1940): the chances are scaled in turn to
    each label's frequency and to those of the numbers of labels, until nothing changes.

    Args:
        correlation (float): 0 to 1.

    Returns:
        ndarray: float64 (1024,), the chance of each row of LABEL_SETS. They sum to 1.
    """
    frequencies = np.array(LABEL_FREQUENCIES)
    independent = np.where(LABEL_SETS, frequencies, 1 - frequencies).prod(1)
    companions = {pair for theme in THEMES for pair in itertools.combinations(theme, 2)}
    pairs = sum(LABEL_SETS[:, i] & LABEL_SETS[:, j] for i, j in companions)
    # The group that each set belongs to: with a label or without it; of how many labels.
    groupings = [*LABEL_SETS.T.astype(int), LABEL_SETS.sum(1)]

    prior, before = independent * np.exp(correlation * COUPLING * pairs), 0
    while np.abs(prior - before).max() > 1e-15:
        before = prior
        for group in groupings:
            wanted, found = np.bincount(group, independent), np.bincount(group, prior)
            prior = prior * (wanted / found)[group]
    return prior


def draw_label_set(rng, prior):
    """
    Draw what a scene is to show from the chances of LABEL_SETS.

    Returns:
        list[int]: digits in 0..9, none of them twice, in random order, so that none is always
        painted over the others. There may be none.
    """
    return rng.permutation(np.flatnonzero(LABEL_SETS[rng.choice(len(prior), p=prior)])).tolist()


# ----------------------------------------------------------------------- how a scene is painted


def fade(evidence):
    """
    The constants of how hard a scene is to read, for some evidence.

    Args:
        evidence (float): 1 has the constants as they are, 0 those of UNREADABLE; in between, they
            change linearly, the two of a pair each, and whole numbers are rounded.

    Returns:
        dict: by the names of UNREADABLE.
    """

    def between(easy, unreadable):
        if isinstance(easy, tuple):
            return tuple(map(between, easy, unreadable))
        value = easy + (1 - evidence) * (unreadable - easy)
        return round(value) if isinstance(easy, int) else value

    return {name: between(globals()[name], value) for name, value in UNREADABLE.items()}


def compose_scene(rng, digits, targets, size, prior=None):
    """
    Make one scene: background, distractors, digits, and a camera that blurs and adds noise.

    Args:
        rng (np.random.Generator): all that the scene depends on besides the arguments below.
        digits (ndarray): (N, 8, 8) source digits, 0 (paper) to 16 (ink), with some of every class.
        targets (ndarray): (N,) ints in 0..9, their classes.
        size (int): the scene's side in pixels.
        prior (ndarray): of :func:`label_prior`, to draw the labels from it; None draws a theme's.

    Returns:
        image (ndarray): uint8 (size, size, 3), RGB.
        labels (list[int]): digits in 0..9.
        boxes (ndarray): float64 (n, 4) as XYWH, in pixels: tight around each digit's whole ink, be
            some of it hidden or not, and inside the image.
    """
    wanted = draw_labels(rng) if prior is None else draw_label_set(rng, prior)
    ground = paint_background(rng, size)
    for _ in range(rng.integers(*DISTRACTORS, endpoint=True)):
        paint(ground, draw_distractor(rng, size), rng.random(3))

    canvas, labels, boxes = add_digits(rng, ground, wanted, digits, targets)
    scale = 1.0
    # The prior is that of the labels shown only if none of those drawn is left out.
    while prior is not None and len(labels) < len(wanted):
        scale *= 0.9
        canvas, labels, boxes = add_digits(rng, ground, wanted, digits, targets, scale)
    return photograph(rng, canvas), labels, np.array(boxes, np.float64).reshape(-1, 4)


def add_digits(rng, ground, wanted, digits, targets, scale=1.0):
    """
    Write digits on a copy of the ground, one after the other; one that finds no room is left out.

    Args:
        ground (ndarray): float32 (size, size, 3), RGB in 0..1.
        wanted (list[int]): digits in 0..9.
        digits (ndarray), targets (ndarray): see :func:`compose_scene`.
        scale (float): of all digits' sides.

    Returns:
        canvas (ndarray): as ``ground``.
        labels (list[int]), boxes (list): the digits there was room for, and their (x, y, w, h).
    """
    canvas, size = ground.copy(), len(ground)
    labels, boxes, inks = [], [], []
    visible = []  # what is still to be seen of each ink
    for label in wanted:
        source = digits[rng.choice(np.flatnonzero(targets == label))]
        placed = place_digit(rng, source, size, boxes, inks, visible, scale)
        if placed is None:
            continue
        ink, box = placed
        shown = cover_part(rng, ink) if rng.random() < COVER_CHANCE else ink
        x, y, w, h = box
        paint(canvas, INK_OPACITY * shown, choose_ink(rng, canvas[y : y + h, x : x + w]))
        visible = [before * (1 - shown) for before in visible] + [shown]
        labels.append(label)
        boxes.append(box)
        inks.append(ink)
    return canvas, labels, boxes


def paint_background(rng, size):
    """
    Mix two colours: evenly (a plain ground), along a direction (a gradient) or in soft patches.

    Returns:
        ndarray: float32 (size, size, 3), RGB in 0..1.
    """
    kind = rng.choice(("plain", "gradient", "patches"))
    if kind == "plain":
        mix = np.zeros((size, size), np.float32)
    elif kind == "gradient":
        angle = rng.uniform(0, 2 * np.pi)
        ys, xs = np.mgrid[:size, :size] / (size - 1) - 0.5
        mix = (0.5 + 0.7 * (xs * np.cos(angle) + ys * np.sin(angle))).astype(np.float32)
    else:
        cells = int(rng.integers(3, 13))
        coarse = rng.random((cells, cells), np.float32)
        mix = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
    one = rng.random(3, np.float32)
    other = one + rng.uniform(-BACKGROUND_CONTRAST, BACKGROUND_CONTRAST, 3).astype(np.float32)
    return (one + (other - one) * mix[..., None]).clip(0, 1)


def draw_distractor(rng, size):
    """
    Draw a curved stroke about as wide as a digit's, or a blob about as large as a digit.

    Returns:
        ndarray: float32 (size, size), how much of each pixel it covers, in 0..1.
    """
    mask = np.zeros((size, size), np.uint8)
    middle = rng.uniform(0, size, 2)
    if rng.random() < 0.7:
        # A Bézier curve that bends clearly: a straight stroke might as well be a one.
        angle, reach = rng.uniform(0, 2 * np.pi), rng.uniform(0.08, 0.25) * size
        along = reach * np.array([np.cos(angle), np.sin(angle)])
        aside = rng.uniform(0.8, 1.6) * np.array([-along[1], along[0]])
        start, bend, end = middle - along, middle + aside, middle + along
        t = np.linspace(0, 1, 20)[:, None]
        curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end
        width = max(1, round(rng.uniform(0.01, 0.05) * size))
        cv2.polylines(mask, [curve.round().astype(np.int32)], False, 255, width, cv2.LINE_AA)
    else:
        axes = rng.uniform(0.03, 0.15, 2) * size
        blob = (middle.tolist(), (2 * axes).tolist(), rng.uniform(0, 180))
        cv2.ellipse(mask, blob, 255, cv2.FILLED, cv2.LINE_AA)
    return mask.astype(np.float32) / 255


def write_digit(rng, source, side):
    """
    Write a source digit larger, turned and slanted at random.

    Args:
        source (ndarray): (8, 8), 0 (paper) to 16 (ink).
        side (float): the side, in pixels, that the 8×8 source is to have.

    Returns:
        ndarray: float32 (h, w), how much ink each pixel has, in 0..1; no margin, so that h and w
        are the digit's own height and width.
    """
    # A margin of paper lets the strokes at the source's edge end softly. Going through a larger
    # image first makes the cubic curve finer than the steps of warpAffine's own interpolation.
    source = np.pad(source.astype(np.float32) / 16, 2)
    finer = 8
    large = cv2.resize(source, None, fx=finer, fy=finer, interpolation=cv2.INTER_CUBIC)

    angle = np.deg2rad(rng.uniform(-ROTATION, ROTATION))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    slant = np.array([[1, rng.uniform(-SHEAR, SHEAR)], [0, 1]])
    matrix = turn @ slant * (side / (8 * finer))
    room = int(np.ceil(2 * side))
    shift = (room - 1) / 2 - matrix @ np.full(2, (len(large) - 1) / 2)
    ink = cv2.warpAffine(large, np.column_stack([matrix, shift]), (room, room))

    # Interpolated strokes are blurry hills: a steeper slope gives them the edges that a pen leaves.
    ink = ((ink - 0.25) / 0.35).clip(0, 1)
    rows, columns = np.flatnonzero((ink > 0.5).any(1)), np.flatnonzero((ink > 0.5).any(0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def place_digit(rng, source, size, boxes, inks, visible, scale):
    """
    Write a digit where it disturbs none of those already in the scene too much.

    Args:
        boxes (list): their boxes, (x, y, w, h) in pixels.
        inks, visible (list[ndarray]): their whole and their still visible inks, (size, size).
        scale (float): of the digit's side.

    Returns:
        The digit's ink, float32 (size, size) in 0..1, and its box (x, y, w, h) of ints; None when
        there seems to be no room.
    """
    for _ in range(PLACEMENT_TRIES):
        small = write_digit(rng, source, rng.uniform(*DIGIT_SIDE) * scale * size)
        h, w = small.shape
        x, y = int(rng.integers(size - w + 1)), int(rng.integers(size - h + 1))
        box = (x, y, w, h)
        ink = np.zeros((size, size), np.float32)
        ink[y : y + h, x : x + w] = small
        apart = all(box_overlap(box, other) <= MAX_BOX_OVERLAP for other in boxes)
        if apart and all(
            (seen * (1 - ink)).sum() >= MIN_VISIBLE * whole.sum()
            for seen, whole in zip(visible, inks)
        ):
            return ink, box
    return None


def box_overlap(one, other):
    """
    The area that two boxes (x, y, w, h) share, as a part (0..1) of the smaller box.
    """
    width = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    height = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    return max(width, 0) * max(height, 0) / min(one[2] * one[3], other[2] * other[3])


def cover_part(rng, ink):
    """
    Lay a strip of background across a digit, at any angle.

    Args:
        ink (ndarray): float32 (H, W) in 0..1.

    Returns:
        ndarray: the same, 0 under the strip. It hides a share of the ink and not of the box, so
        that thin and stout digits lose alike.
    """
    share = rng.uniform(*COVERED_SHARE)
    begin = rng.uniform(0, 1 - share)
    angle = rng.uniform(0, np.pi)
    ys, xs = np.nonzero(ink)
    across = np.argsort(xs * np.cos(angle) + ys * np.sin(angle), kind="stable")
    ys, xs = ys[across], xs[across]
    passed = np.cumsum(ink[ys, xs]) / ink.sum()
    hidden = (passed > begin) & (passed <= begin + share)
    rest = ink.copy()
    rest[ys[hidden], xs[hidden]] = 0
    return rest


def choose_ink(rng, surroundings):
    """
    Choose a colour that stands out, by a random contrast, from where it will be seen.

    Args:
        surroundings (ndarray): float32 (h, w, 3), RGB in 0..1.

    Returns:
        ndarray: float32 (3,), RGB in 0..1.
    """
    contrast = rng.uniform(*INK_CONTRAST)
    inks = rng.random((64, 3), np.float32)
    # Among pixels of many colours what counts is the quarter that is closest to the ink: the mean
    # of a black and a white half is grey, which no pixel is.
    gaps = nearest_quartile(inks @ BRIGHTNESS, (surroundings @ BRIGHTNESS).reshape(-1))
    return inks[np.abs(gaps - contrast).argmin()]


def nearest_quartile(points, values):
    """
    What a quarter of ``values`` is not further away than, for each of some points.

    It is ``np.percentile(np.abs(points[:, None] - values), 25, axis=1)`` to the bit, in a third of
    its time. The k values nearest to a point are neighbours in sorted order, so the k-th smallest
    distance is the least, over all k neighbours, of their larger distance.

    Args:
        points (ndarray), values (ndarray): float32, one-dimensional.
    """
    values = np.sort(values)
    rank = (len(values) - 1) / 4

    def distance(k):
        last = values[k:] - points[:, None]
        return np.maximum(points[:, None] - values[: len(values) - k], last).min(1)

    low = int(rank)
    if low == rank:
        return distance(low)
    near, far = distance(low), distance(low + 1)
    return near + (far - near) * np.float32(rank - low)


def paint(canvas, mask, colour):
    """
    Paint a colour (RGB in 0..1) on the canvas, in place, as much as the mask (H, W) says.
    """
    canvas += mask[..., None] * (np.asarray(colour, np.float32) - canvas)


def photograph(rng, canvas):
    """
    See the canvas through a poor camera: blur it, add noise, and round to bytes.

    Returns:
        ndarray: uint8, of the canvas's shape.
    """
    blur = rng.uniform(*BLUR) * len(canvas)
    if blur > 0.1:  # less than that is nothing to see, and 0 would mean something else to OpenCV
        canvas = cv2.GaussianBlur(canvas, (0, 0), blur)
    noise = rng.standard_normal(canvas.shape, np.float32) * rng.uniform(*NOISE)
    return ((canvas + noise).clip(0, 1) * 255).round().astype(np.uint8)


# --------------------------------------------------------------- how a set of scenes is written


def scene_rng(seed, split, number):
    """
    The generator that scene ``number`` of a split is made with, and nothing else is.
    """
    return np.random.default_rng([seed, SPLITS.index(split), number])


def write_scene(number, folder, split, seed, size, digits, targets, prior):
    """
    Make a scene and write its image; the arguments are those of :func:`compose_scene`.

    Returns:
        The image's record as COCO has it, the scene's labels and its boxes.
    """
    rng = scene_rng(seed, split, number)
    image, labels, boxes = compose_scene(rng, digits, targets, size, prior)
    name = f"{number:06d}.png"
    png = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    if not cv2.imwrite(str(folder / name), png, PNG_SETTINGS):
        raise OSError(f"cannot write {folder / name}")
    return {"id": number, "file_name": name, "width": size, "height": size}, labels, boxes.tolist()


def start_worker(constants):
    """
    Set up a process that writes scenes, with the main process's constants.
    """
    globals().update(constants)
    cv2.setNumThreads(1)  # the processes keep the cores busy already
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is answered once, by the main process


def write_split(root, split, count, seed, size, digits, targets, prior):
    """
    Write ``count`` scenes to ``root/split/`` and their boxes to ``root/annotations/split.json``.

    Args:
        digits (ndarray), targets (ndarray): the split's own source digits and their classes.
        prior (ndarray | None): see :func:`compose_scene`.
    """
    folder = root / split
    folder.mkdir(parents=True)
    images, annotations = [], []
    job = partial(
        write_scene,
        folder=folder,
        split=split,
        seed=seed,
        size=size,
        digits=digits,
        targets=targets,
        prior=prior,
    )
    constants = {name: globals()[name] for name in {*HARD, *UNREADABLE}}
    with multiprocessing.Pool(min(os.cpu_count() or 1, 8), start_worker, [constants]) as pool:
        scenes = pool.imap(job, range(1, count + 1), chunksize=16)
        for image, labels, boxes in tqdm(scenes, split, count, unit=" scenes"):
            images.append(image)
            for label, (x, y, w, h) in zip(labels, boxes):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image["id"],
                        "category_id": label + 1,
                        "bbox": [x, y, w, h],
                        "area": w * h,
                        "iscrowd": 0,
                    }
                )
    coco = {
        "info": {"description": f"DigitScenes, {split}"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": digit + 1, "name": name} for digit, name in enumerate(NAMES)],
    }
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"{split}.json").write_text(json.dumps(coco, sort_keys=True) + "\n")


def describe_settings(counts, seed, size, knobs=None):
    """
    Everything that a set depends on, as the JSON text that is kept beside it.

    The constants are part of it: a set made before one of them was tuned is another set.

    Args:
        knobs (dict | None): the values of --evidence and --correlation, if given.
    """
    settings = {
        "scenes": counts,
        "seed": seed,
        "size": size,
        "themes": [THEMES, THEME_CHANCES, THEME_BREAK_CHANCE],
        "count_chances": COUNT_CHANCES,
        "train_share": TRAIN_SHARE,
        "digit_side": DIGIT_SIDE,
        "rotation": ROTATION,
        "shear": SHEAR,
        "ink_contrast": INK_CONTRAST,
        "background_contrast": BACKGROUND_CONTRAST,
        "distractors": DISTRACTORS,
        "cover": [COVER_CHANCE, COVERED_SHARE],
        "max_box_overlap": MAX_BOX_OVERLAP,
        "min_visible": MIN_VISIBLE,
        "blur": BLUR,
        "noise": NOISE,
        "placement_tries": PLACEMENT_TRIES,
    }
    if knobs:
        settings.update(
            knobs,
            ink_opacity=INK_OPACITY,
            label_frequencies=LABEL_FREQUENCIES,
            coupling=COUPLING,
        )
    return json.dumps(settings, indent=2, sort_keys=True) + "\n"


def make_set(target, counts, seed, size, settings, prior):
    """
    Make the whole set in a temporary folder beside ``target`` and move it there when it is whole.

    Args:
        target (Path): the set's folder; what is there already is replaced.
        counts (dict[str, int]): the number of scenes in each split.
        settings (str): of :func:`describe_settings`.
        prior (ndarray | None): see :func:`compose_scene`; it is written beside the scenes.
    """
    target.parent.mkdir(parents=True, exist_ok=True)

    # Imported here because it takes longer than everything that a refusal or --help needs.
    from sklearn.datasets import load_digits

    source = load_digits()
    digits, targets = source.images.astype(np.uint8), source.target
    with tempfile.TemporaryDirectory(prefix=".digit_scenes_", dir=target.parent) as temporary:
        made = Path(temporary) / "made"
        for split, members in split_sources(targets, seed).items():
            sources = digits[members], targets[members]
            write_split(made, split, counts[split], seed, size, *sources, prior)
        if prior is not None:
            np.savez(made / "prior.npz", label_sets=LABEL_SETS, probabilities=prior)
        (made / "settings.json").write_text(settings)
        # After a crash of the machine, a set that is there is complete.
        os.sync()
        if target.exists():
            target.rename(Path(temporary) / "replaced")
        made.rename(target)


# ----------------------------------------------------------------------------- the command line


def parse_arguments():
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="""\
Make DigitScenes, a small data set for multi-label recognition and detection: colour scenes of one
to five real handwritten digits (scikit-learn's load_digits; nothing is downloaded) in ten labels,
zero to nine. Scenes have themes, so labels depend on each other; no handwritten digit is in both
splits. The same seed makes the same bytes.""",
        epilog="""\
What the command leaves behind:
  ROOT/digit_scenes/train/000001.png ...    the training scenes
  ROOT/digit_scenes/val/000001.png ...      the validation scenes
  ROOT/digit_scenes/annotations/train.json  their boxes, in COCO's detection format
  ROOT/digit_scenes/annotations/val.json
  ROOT/digit_scenes/settings.json           what the set was made with

With --evidence E, --correlation R or both (the other is 1), it is ROOT/digit_scenes_eE_cR, such as
digit_scenes_e0.5_c1.0, and the chance of every set of labels is known:
  ROOT/digit_scenes_eE_cR/prior.npz         label_sets, bool (1024, 10), and their probabilities
Labels are as frequent, and as many in a scene (none to ten), whatever R is; at R = 0 they are
independent. At E = 1 digits are as easy to read as without the option, at 0 they can't be seen.

The folder appears when the set is whole. If it is already there and was made with the same
settings, nothing is done; if it was made with others, the command refuses unless --force is given.
""",
    )
    for name, default, meaning in (
        ("--train", 8000, "training scenes"),
        ("--val", 1000, "validation scenes"),
        ("--seed", 0, "seed of all chance"),
        ("--size", 96, "side of a scene in pixels, at least 32"),
    ):
        text = f"{meaning} (default {default})"
        parser.add_argument(name, type=int, default=default, metavar="N", help=text)
    parser.add_argument(
        "--root",
        type=Path,
        default=os.environ.get("DETECTRON2_DATASETS", "datasets"),
        help="where data sets live (default $DETECTRON2_DATASETS or else ./datasets)",
    )
    parser.add_argument(
        "--hard",
        action="store_true",
        help="make ROOT/digit_scenes_hard instead, which tells models apart: up to six digits, "
        "smaller, fainter and half hidden, and rarer labels",
    )
    for name, meaning in (
        ("--evidence", "how much an image says of its labels, 0 (nothing) to 1 (as without)"),
        ("--correlation", "how much labels say of each other, 0 (nothing) to 1 (as themes do)"),
    ):
        parser.add_argument(name, type=float, metavar="SHARE", help=meaning)
    parser.add_argument("--force", action="store_true", help="replace a set made differently")
    return parser.parse_args()


def refuse(reason):
    """
    End the command with one line.
    """
    sys.exit(f"prepare_digit_scenes: {reason}")


def main():
    args = parse_arguments()
    for name, least in (("train", 1), ("val", 1), ("seed", 0), ("size", 32)):
        value = getattr(args, name)
        if value < least:
            refuse(f"--{name} must be at least {least}, not {value}")
    for name in ("evidence", "correlation"):
        value = getattr(args, name)
        if value is not None and not 0 <= value <= 1:
            refuse(f"--{name} must be from 0 to 1, not {value}")
        if value is not None and args.hard:
            refuse(f"--hard and --{name} make sets of different kinds: give one of them")

    counts = {"train": args.train, "val": args.val}
    name, knobs, prior = "digit_scenes", None, None
    if args.hard:
        name += "_hard"
        globals().update(HARD)
    if args.evidence is not None or args.correlation is not None:
        knobs = {
            "evidence": 1.0 if args.evidence is None else args.evidence,
            "correlation": 1.0 if args.correlation is None else args.correlation,
        }
        name += "_e{evidence}_c{correlation}".format(**knobs)
        globals().update(fade(knobs["evidence"]))
        prior = label_prior(knobs["correlation"])
    target = args.root / name
    wanted = describe_settings(counts, args.seed, args.size, knobs)
    settings = target / "settings.json"
    try:
        if target.exists():
            if settings.is_file() and settings.read_text() == wanted:
                print(f"{target} is already there, made with the same settings: nothing to do")
                return
            if not args.force:
                refuse(f"{target} was made with other settings: give --force to replace it")
        make_set(target, counts, args.seed, args.size, wanted, prior)
    except OSError as error:
        refuse(error)
    except KeyboardInterrupt:
        refuse("interrupted: the set was not made")
    print(f"{target}: {args.train} training and {args.val} validation scenes")


if __name__ == "__main__":
    main()
