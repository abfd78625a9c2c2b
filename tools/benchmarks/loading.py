"""Loading of images, beside torchvision's."""

from __future__ import annotations

import argparse
import inspect
import os
from collections import deque
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Callable, Dict, Iterator, List, Mapping, NamedTuple

import numpy as np
import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import pil_loader
from torchvision.io import ImageReadMode
from torchvision.transforms.v2 import functional as vision
from tqdm import tqdm

from ia_gcn.data import MultiLabelDatasetMapper
from ia_gcn.data.build import TrainingSamples
from ia_gcn.data.dataset_mapper import read_image
from ia_gcn.data.samplers import mix_seeds
from ia_gcn.engine import setup_cfg

from .arguments import positive
from .measuring import Table, measure, measure_memory, timed_rows
from .networks import CONFIGS

# Height and width of COCO's commonest images.
PHOTO_SIZES = ((480, 640), (640, 480), (427, 640), (640, 427))
# With it, the photos below have about the bytes of COCO's.
JPEG_QUALITY = 95


class Place(NamedTuple):
    """What is seen of an image: top, left, height and width in pixels, and whether mirrored."""

    box: tuple
    flip: bool


class Images(Dataset):
    """(view, labels) of each file, as torchvision's users write it."""

    def __init__(self, view: Callable, files: List[str], places: List[Place], num_labels: int):
        """
        Args:
            view: file and place to a (3, H, W) tensor.
        """
        self.view, self.files, self.places = view, files, places
        self.labels = torch.zeros(num_labels)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple:
        return self.view(self.files[index], self.places[index]), self.labels


OWN = "ia_gcn"
PEER = "torchvision on Pillow images, uint8"
DECODING = "pil_loader alone: decoding"


def build_loaders(size: int, batch: int, is_train: bool, files: List[str]) -> Dict[str, DataLoader]:
    """From files to batches (B, 3, H, W), without worker processes, by the name of a row."""
    cfg = setup_cfg(str(CONFIGS / "resnet101.yaml"), ["INPUT.IMAGE_SIZE", [size, size]])
    mapper = MultiLabelDatasetMapper(cfg, is_train=is_train)
    records = [{"file_name": file, "image_id": i, "labels": []} for i, file in enumerate(files)]
    samples = TrainingSamples(records, mapper, seed=0)
    places = [find_place(mapper, i, file) for i, file in enumerate(files)]
    loader = partial(DataLoader, batch_size=batch)
    loaders = {
        name: loader(Images(view, files, places, mapper.num_labels))
        for name, view in torchvision_views((size, size), cfg).items()
    }
    # The place in the stream decides over crop and flip; of the test view, over nothing.
    loaders[OWN] = loader(samples, sampler=[(i, i) for i in range(len(files))], collate_fn=stack)
    names = [PEER, OWN, *(name for name in loaders if name not in (PEER, OWN))]
    return {name: loaders[name] for name in names}


def build_calls(loaders: Dict[str, DataLoader], files: List[str]) -> Dict[str, Callable]:
    """What is timed, by the name of a row."""
    # A deque of no length keeps nothing of what it is given.
    calls = {name: partial(deque, loader, 0) for name, loader in loaders.items()}
    calls[DECODING] = lambda: deque(map(pil_loader, files), 0)
    return calls


def prepare_call(name: str, *settings) -> Callable:
    """One of `build_calls`; settings are those of `build_loaders`."""
    return build_calls(build_loaders(*settings), settings[-1])[name]


def compare_loading(is_train: bool, files: List[str], args) -> Table:
    """The times here, the memory in a process each."""
    settings = (args.size, args.batch, is_train, files)
    title = "Training view" if is_train else "Test view"
    loaders = build_loaders(*settings)
    calls = build_calls(loaders, files)
    memory = {
        name: measure_memory(args.threads, prepare_call, name, *settings)
        for name in tqdm(calls, "memory", leave=False, disable=None)
    }
    rows = rate_rows(measure(calls, args.rounds, title), len(files), memory)
    expected = torch.cat([images for images, _ in loaders[PEER]])
    for row in rows[1:]:
        images = [images for images, _ in loaders.get(row["name"], ())]
        if images and images[0].dtype == torch.uint8:
            difference = (torch.cat(images).int() - expected).abs()
            row["level_difference"] = difference.max().item()
            row["differing_share"] = (difference > 0).float().mean().item()
    kilobytes = sum(os.path.getsize(file) for file in files) / len(files) / 1e3
    return Table(
        f"{title}: to {args.size}×{args.size} pixels, in batches of {args.batch}, one process",
        rows,
        f"{len(files)} JPEGs of about 640×480 pixels and {kilobytes:.0f} kB.",
    )


def torchvision_views(size: tuple, cfg: CfgNode) -> Dict[str, Callable]:
    """By the name of a row: from a file and a `Place` to a tensor of this height and width."""
    crop = partial(vision.resized_crop, size=size, antialias=True)
    mean = [value / 255 for value in cfg.MODEL.PIXEL_MEAN]
    deviation = [value / 255 for value in cfg.MODEL.PIXEL_STD]

    def view(image, place: Place):
        image = crop(image, *place.box)
        return vision.horizontal_flip(image) if place.flip else image

    def of_pillow(file: str, place: Place) -> torch.Tensor:
        return vision.pil_to_tensor(view(pil_loader(file), place))

    def of_floats(file: str, place: Place) -> torch.Tensor:
        image = vision.to_dtype(of_pillow(file, place), torch.float32, scale=True)
        return vision.normalize(image, mean, deviation)

    def of_tensors(file: str, place: Place) -> torch.Tensor:
        content = torchvision.io.read_file(file)
        return view(torchvision.io.decode_jpeg(content, ImageReadMode.RGB), place)

    return {
        PEER: of_pillow,
        "torchvision on Pillow images, float32 and normalised": of_floats,
        "torchvision on tensors, uint8": of_tensors,
    }


def find_place(mapper: MultiLabelDatasetMapper, index: int, file: str) -> Place:
    """What `mapper` shows of the image that is number `index` in the stream of seed 0."""
    image = read_image(file)
    np.random.seed(mix_seeds(0, index))
    transforms = mapper.augmentations(T.AugInput(image)).transforms
    box = (0, 0, *image.shape[:2])
    for transform in transforms:
        if isinstance(transform, T.CropTransform):
            box = (transform.y0, transform.x0, transform.h, transform.w)
    return Place(box, any(isinstance(t, T.HFlipTransform) for t in transforms))


def stack(samples: List[Dict]) -> tuple:
    """(B, 3, H, W) and (B, C); the model does it itself, after it has normalised the images."""
    return tuple(torch.stack([sample[key] for sample in samples]) for key in ("image", "labels"))


def rate_rows(
    seconds: Dict[str, List[float]], images: int, memory: Mapping[str, Dict] | None = None
) -> List[Dict]:
    """The rows of a table of images per second, compared with the first's.

    Args:
        seconds: that each takes for so many images, by name.
        memory: what `measure_memory` returned, by name.
    """
    memory = memory or {}
    rows = timed_rows(seconds)
    return [
        {
            "name": row["name"],
            "per_second": images / row["median_s"],
            "min_per_second": images / row["max_s"],
            "max_per_second": images / row["min_s"],
            "speed": 1 / row["ratio"],
            **memory.get(row["name"], {}),
        }
        for row in rows
    ]


def write_photos(folder: Path, number: int) -> List[str]:
    """Write JPEGs of COCO's sizes, mixed of pieces of scikit-learn's two photos; their paths."""
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    files = []
    for i in range(number):
        height, width = PHOTO_SIZES[i % len(PHOTO_SIZES)]
        pieces = []
        for photo in photos:
            share = rng.uniform(0.7, 1)
            w, h = round(share * photo.width), round(share * photo.height)
            left, top = rng.integers(photo.width - w + 1), rng.integers(photo.height - h + 1)
            piece = photo.crop((left, top, left + w, top + h))
            pieces.append(piece.resize((width, height), Image.BICUBIC))
        files.append(str(folder / f"{i:05}.jpg"))
        Image.blend(*pieces, rng.uniform(0, 0.5)).save(files[-1], quality=JPEG_QUALITY)
    return files


def run_loading(args) -> Iterator[Table]:
    """Count the images per second and core that are decoded, cropped and collated to batches.

    ia_gcn's data loading, and torchvision's of the same pieces of the same JPEGs:
    on Pillow images, to uint8 and to normalised floats, and on tensors. Training view, which is
    cropped and mirrored, and test view, which is not. What is counted are images of one process;
    pixels are compared with the first row's.
    """
    with TemporaryDirectory() as folder:
        files = write_photos(Path(folder), args.num_images)
        for is_train in (True, False):
            yield compare_loading(is_train, files, args)


def add_loading(subcommands, common: argparse.ArgumentParser) -> None:
    parser = subcommands.add_parser(
        "loading",
        help="decoding, cropping and collating of images",
        description=inspect.getdoc(run_loading),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    # Images per core are those of one thread.
    parser.set_defaults(run=run_loading, threads=1)
    parser.add_argument(
        "--num-images", type=positive, default=64, help="how many each round loads (default 64)"
    )
    parser.add_argument("--batch", type=positive, default=16, help="images in a batch (default 16)")
    parser.add_argument(
        "--size", type=positive, default=448, help="a view's height and width (default 448)"
    )
