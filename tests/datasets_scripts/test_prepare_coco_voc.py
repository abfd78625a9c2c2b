"""datasets/prepare_coco_voc.py on archives of the published layout."""

import io
import json
import tarfile
import zipfile

import pytest
from PIL import Image

from tests.helpers.commands import run_script


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6)).save(file, "JPEG")
    return file.getvalue()


XML = "<annotation><object><name>cat</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>4</xmax>" + (
    "<ymax>4</ymax></bndbox></object></annotation>"
)
COCO = {
    "images": [{"id": 9, "file_name": "COCO_train2014_000000000009.jpg"}],
    "categories": [{"id": 17, "name": "cat"}],
    "annotations": [{"id": 1, "image_id": 9, "category_id": 17, "bbox": [0, 0, 2, 2]}],
}


@pytest.fixture
def prepare(tmp_path):
    """A function that runs the script on tmp_path/archives."""
    (tmp_path / "archives").mkdir()

    def call():
        folders = ["--archives", tmp_path / "archives", "--root", tmp_path / "root"]
        return run_script("datasets/prepare_coco_voc.py", *folders)

    return call


def write_archives(folder, coco_image="train2014/COCO_train2014_000000000009.jpg"):
    with zipfile.ZipFile(folder / "annotations_trainval2014.zip", "w") as archive:
        archive.writestr("annotations/instances_train2014.json", json.dumps(COCO))
    with zipfile.ZipFile(folder / "train2014.zip", "w") as archive:
        archive.writestr("train2014/", "")
        archive.writestr(coco_image, jpeg())
    voc = {
        "VOCdevkit/VOC2007/ImageSets/Main/trainval.txt": b"000005\n",
        "VOCdevkit/VOC2007/Annotations/000005.xml": XML.encode(),
        "VOCdevkit/VOC2007/JPEGImages/000005.jpg": jpeg(),
    }
    with tarfile.open(folder / "VOCtrainval_06-Nov-2007.tar", "w") as archive:
        for name, content in voc.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_archives_become_the_layout_that_the_loaders_read(prepare, tmp_path):
    write_archives(tmp_path / "archives")
    for _ in range(2):  # the second time, everything is there already
        result = prepare()
        assert result.returncode == 0, result.stderr
        assert "coco_2014_train_multilabel: 1 images, whole" in result.stdout
        assert "voc_2007_trainval_multilabel: 1 images, whole" in result.stdout
    root = tmp_path / "root"
    assert (root / "coco/train2014/COCO_train2014_000000000009.jpg").read_bytes() == jpeg()
    assert (root / "VOC2007/JPEGImages/000005.jpg").read_bytes() == jpeg()


def test_a_missing_image_is_said(prepare, tmp_path):
    write_archives(tmp_path / "archives", coco_image="train2014/other.jpg")
    result = prepare()
    assert result.returncode == 1
    assert "coco_2014_train_multilabel: 1 images, 1 missing" in result.stdout


def test_an_archive_does_not_write_outside_the_root(prepare, tmp_path):
    write_archives(tmp_path / "archives", coco_image="../../../escaped.jpg")
    result = prepare()
    assert result.returncode == 1
    assert "leads out of the image root" in result.stderr
    assert not list(tmp_path.rglob("escaped.jpg"))


def test_no_archive_is_one_clear_line(prepare):
    result = prepare()
    assert result.returncode == 1
    assert "train2014.zip" in result.last_line
