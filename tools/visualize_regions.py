#!/usr/bin/env python3
"""Draw what a trained IA-GCN sees in images: regions, their weights, scores and label graph.

Takes the output folder of a run of tools/train_net.py, and of its test set a few images, always
the same ones, or any others. Writes into OUTPUT/regions
  NAME.png     of each image: its regions, the same by their learned weight, the scores of both
               branches and of their fusion, and statistical, individual and fused label graph
  NAME.json    the same in numbers
  regions.png  a sheet with a row per image

Examples:
  of the test set:
    tools/visualize_regions.py output/demo
  of your own images:
    tools/visualize_regions.py output/demo --output seen --images a.jpg b.png
  of another checkpoint (keys and values of the config come before --images):
    tools/visualize_regions.py output/demo MODEL.WEIGHTS output/demo/model_final.pth
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Dict, Iterable, List, Sequence

import numpy as np
import torch
from tqdm import tqdm

from ia_gcn.checkpoint import load_model
from ia_gcn.data import MultiLabelDatasetMapper, UnreadableImage, get_test_dicts
from ia_gcn.data.dataset_mapper import read_image
from ia_gcn.engine import check_labels, setup_cfg
from ia_gcn.errors import InputError
from ia_gcn.modeling import InstanceAwareRecognizer
from ia_gcn.visualization import (
    Recognition,
    draw_recognition,
    draw_region_sheet,
    labels_to_show,
    thumbnail,
)

SHEET = "regions"
# A PNG of many more rows is too high for matplotlib.
MAX_SHEET_ROWS = 50
# Of each region, in the JSON.
TOP_LABELS = 3


def visualize(cfg, records: Sequence[Dict], max_regions: int, output: Path) -> None:
    """Draw and describe images.

    Args:
        cfg: of the model, with its MODEL.WEIGHTS.
        records: a data set dict for each image; one without `labels` has no ground truth.
        max_regions: draw no more of them.
        output: the folder to write into.
    """
    label_names = check_labels(cfg)
    paths = [output / name for name in unique_names([record["file_name"] for record in records])]
    check_overwrites_none(paths, records)
    model = load_recognizer(cfg, label_names)
    mapper = MultiLabelDatasetMapper(cfg, is_train=False)
    output.mkdir(parents=True, exist_ok=True)
    rows = []
    # Without a terminal, no bar.
    for path, record in tqdm(list(zip(paths, records)), leave=False, disable=None):
        recognition = recognize(model, mapper, record)
        write_json(f"{path}.json", describe(recognition, record["file_name"], label_names))
        draw_recognition(recognition, label_names, cfg.TEST.THRESHOLD, max_regions, f"{path}.png")
        tqdm.write(f"{path}.json\n{path}.png")
        if len(rows) < MAX_SHEET_ROWS:
            rows.append(recognition)
    sheet = str(output / f"{SHEET}.png")
    draw_region_sheet(rows, label_names, cfg.TEST.THRESHOLD, max_regions, sheet)
    print(sheet)


def load_recognizer(cfg, label_names: Sequence[str]) -> InstanceAwareRecognizer:
    """The model of MODEL.WEIGHTS, in evaluation mode."""
    model = load_model(cfg, label_names)
    if not model.has_regions:
        raise InputError(
            f"MODEL.META_ARCHITECTURE: {cfg.MODEL.META_ARCHITECTURE} has no region branch"
        )
    return model


def sample_records(cfg, count: int) -> List[Dict]:
    """Some of the first test set, always the same ones, which are in its predictions.png too."""
    if not cfg.DATASETS.TEST:
        raise InputError("DATASETS.TEST is empty; --images takes images without a data set")
    records = get_test_dicts(cfg, cfg.DATASETS.TEST[0])
    # The order in which visualize_results has them.
    records = sorted(records, key=lambda record: record["image_id"])
    chosen = np.random.default_rng(0).permutation(len(records))[:count]
    return [records[i] for i in chosen]


def unique_names(file_names: Iterable[str]) -> List[str]:
    """A name without suffix for each file; a number makes it another than those before it."""
    names = [SHEET]
    for file_name in file_names:
        stem = name = Path(file_name).stem
        number = 1
        while name in names:
            number += 1
            name = f"{stem}_{number}"
        names.append(name)
    return names[1:]


def check_overwrites_none(paths: Sequence[Path], records: Sequence[Dict]) -> None:
    sources = {os.path.realpath(record["file_name"]) for record in records}
    for path in [*paths, paths[0].parent / SHEET]:
        if os.path.realpath(f"{path}.png") in sources:
            raise InputError(f"--output: {path}.png is one of the images, and would be lost")


@torch.no_grad()
def recognize(
    model: InstanceAwareRecognizer, mapper: MultiLabelDatasetMapper, record: Dict
) -> Recognition:
    """What the model says of an image.

    Args:
        model: in evaluation mode.
        mapper: for evaluation.
        record: a data set dict; without `labels`, nothing is known of them.
    Raises:
        InputError: the image can't be read.
    """
    try:
        image = read_image(record["file_name"])
        sample = mapper({"labels": [], **record})
    except UnreadableImage as error:
        raise InputError(str(error)) from None
    result = model([sample])[0]
    regions = result["regions"].to("cpu")
    # From pixels of the model's input to the image's.
    boxes = regions.proposal_boxes.clone()
    boxes.scale(sample["width"] / regions.image_size[1], sample["height"] / regions.image_size[0])
    logits = {"fused": "logits", "global": "logits_global", "region": "logits_region"}
    targets = sample["labels"] if "labels" in record else torch.full_like(sample["labels"], -1)
    return Recognition(
        name=os.path.basename(record["file_name"]),
        image=thumbnail(image),
        width=sample["width"],
        height=sample["height"],
        targets=targets.numpy(),
        scores={
            name: to_numpy(result[key].sigmoid()) for name, key in logits.items() if key in result
        },
        presence=to_numpy(result["presence"]),
        label_graph=label_graph(model, result["presence"]),
        boxes=to_numpy(boxes.tensor),
        objectness=to_numpy(regions.objectness_logits.sigmoid()),
        weights=to_numpy(regions.weights),
        region_scores=to_numpy(regions.scores),
    )


def label_graph(model: InstanceAwareRecognizer, presence: torch.Tensor) -> Dict[str, np.ndarray]:
    """A_S and A_F, where the model works with them, and A_I, (C, C) each, of a (C,).

    With several draws of z, a is their mean.
    """
    individual = presence[:, None] * presence
    graph = {"individual": individual}
    if model.label_graph is not None:
        graph["statistical"] = model.label_graph.lcm
        if model.has_image_dependent_graph:
            graph["fused"] = graph["statistical"] * individual
    return {name: to_numpy(lcm) for name, lcm in graph.items()}


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().cpu().numpy()


def describe(recognition: Recognition, file_name: str, label_names: Sequence[str]) -> Dict:
    """What NAME.json holds; what there is not is null."""
    scores = {name: rounded(values) for name, values in recognition.scores.items()}
    unknown = [None] * len(label_names)
    shown = labels_to_show(recognition)
    graph = {
        name: rounded(lcm[np.ix_(shown, shown)]) for name, lcm in recognition.label_graph.items()
    }
    return {
        "file_name": file_name,
        "width": recognition.width,
        "height": recognition.height,
        "labels": [
            {
                "name": name,
                "score": score,
                "score_global": score_global,
                "score_region": score_region,
                "presence": presence,
                "present": {1: True, 0: False}.get(target),
            }
            for name, score, score_global, score_region, presence, target in zip(
                label_names,
                scores["fused"],
                scores.get("global", unknown),
                scores.get("region", unknown),
                rounded(recognition.presence),
                recognition.targets.tolist(),
            )
        ],
        "regions": [
            {
                "box": box,
                "objectness": objectness,
                "weight": weight,
                "labels": [
                    {"name": label_names[i], "score": rounded(region_scores[i])}
                    for i in np.argsort(-region_scores, kind="stable")[:TOP_LABELS]
                ],
            }
            for box, objectness, weight, region_scores in zip(
                recognition.boxes.round(2).tolist(),
                rounded(recognition.objectness),
                rounded(recognition.weights),
                recognition.region_scores,
            )
        ],
        "label_graph": {
            "labels": [label_names[i] for i in shown],
            "statistical": graph.get("statistical"),
            "individual": graph["individual"],
            "fused": graph.get("fused"),
        },
    }


def rounded(values: np.ndarray):
    """As plain numbers, or lists of such, of 4 decimals."""
    return values.round(4).tolist()


def write_json(path: str, content: Dict) -> None:
    try:
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise InputError(
            f"MODEL.WEIGHTS: what the model says of {content['file_name']} is not finite"
        ) from None
    Path(path).write_text(text + "\n", encoding="utf-8")


def weights_of(output_dir: str) -> str:
    """The best checkpoint of a run, or its last one; "" without either."""
    for name in ("model_best.pth", "model_final.pth"):
        path = os.path.join(output_dir, name)
        if os.path.exists(path):
            return path
    return ""


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def main() -> int:
    """Returns the exit status; what the user can put right is said in one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output_dir", metavar="OUTPUT", help="OUTPUT_DIR of the run")
    parser.add_argument("--output", metavar="DIR", help="write there and not to OUTPUT/regions")
    parser.add_argument(
        "--num-images", type=positive, default=4, metavar="N", help="of the test set (4)"
    )
    parser.add_argument("--images", nargs="+", metavar="FILE", help="these instead")
    parser.add_argument(
        "--regions", type=positive, default=10, metavar="N", help="draw no more of them (10)"
    )
    parser.add_argument("opts", metavar="KEY VALUE", nargs="*", help="config keys and values")
    # Intermixed, so that options may stand between the folder and the keys.
    args = parser.parse_intermixed_args()
    try:
        config_file = os.path.join(args.output_dir, "config.yaml")
        # A run's own MODEL.WEIGHTS is where its training began.
        cfg = setup_cfg(config_file, ["MODEL.WEIGHTS", weights_of(args.output_dir), *args.opts])
        if not cfg.MODEL.WEIGHTS:
            raise InputError(
                f"{args.output_dir} has no model_best.pth and no model_final.pth; "
                "MODEL.WEIGHTS takes another checkpoint"
            )
        if args.images:
            records = [{"file_name": file_name} for file_name in args.images]
        else:
            records = sample_records(cfg, args.num_images)
        output = Path(args.output or os.path.join(args.output_dir, "regions"))
        visualize(cfg, records, args.regions, output)
    except (InputError, OSError) as error:
        print(f"visualize_regions: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
