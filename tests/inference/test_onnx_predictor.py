"""ONNX files by others: metadata that can't be used, and data outside of the file."""

import json

import numpy as np
import pytest

from ia_gcn.inference import OnnxPredictor

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

METADATA = {
    "label_names": ["cat", "dog", "sea"],
    "preprocessing": {"size": [4, 6], "interpolation": "bilinear", "format": "RGB"},
    "made_by": {},
}


@pytest.fixture
def write(tmp_path):
    """A function that writes a model whose scores are the means of the channels."""

    def save(metadata, location=None):
        helper = onnx.helper
        weight = helper.make_tensor("weight", onnx.TensorProto.FLOAT, [3], [1, 1, 1])
        if location:
            weight.ClearField("float_data")
            weight.data_location = onnx.TensorProto.EXTERNAL
            weight.external_data.add(key="location", value=location)
        nodes = [
            helper.make_node("Cast", ["images"], ["float"], to=onnx.TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["float", "axes"], ["mean"], keepdims=0),
            helper.make_node("Mul", ["mean", "weight"], ["scores"]),
        ]
        axes = helper.make_tensor("axes", onnx.TensorProto.INT64, [2], [2, 3])
        graph = helper.make_graph(
            nodes,
            "graph",
            [helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, ["n", 3, 4, 6])],
            [helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, ["n", 3])],
            [axes, weight],
        )
        opset = helper.make_opsetid("", 18)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=9)
        for key, value in metadata.items():
            model.metadata_props.add(key=key, value=value)
        path = tmp_path / "models" / "a.onnx"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(model.SerializeToString())
        return str(path)

    return save


def as_json(**changes):
    return {key: json.dumps(value) for key, value in {**METADATA, **changes}.items()}


def test_a_model_by_hand_is_read(write):
    predictor = OnnxPredictor(write(as_json()), device="cpu")
    image = np.full((9, 9, 3), (10, 20, 30), np.uint8)
    assert predictor(image).scores.tolist() == [10, 20, 30]


def size(*sides):
    return as_json(preprocessing={**METADATA["preprocessing"], "size": list(sides)})


def cut(resize=(6, 6), crop=(1, 0)):
    return as_json(preprocessing={**METADATA["preprocessing"], "resize": resize, "crop": crop})


def test_the_input_is_cut_out_where_the_file_says(write):
    predictor = OnnxPredictor(write(cut()), device="cpu")
    image = np.full((6, 6, 3), 255, np.uint8)
    image[1:5] = 10, 20, 30
    assert predictor(image).scores.tolist() == [10, 20, 30]


@pytest.mark.parametrize(
    "metadata",
    [
        *(size(10**9, 10**9), size(0, 6), size(-4, -6), size(4.0, 6), size(4, 7), size(4)),
        *(size(True, 6), size("4", "6"), size([4], [6])),
        as_json(preprocessing=[1]),
        *(cut(crop=crop) for crop in ([3, 0], [-1, 0], [0, 0.5], [True, 0], [1], 1, "ab")),
        *(cut(resize=resize) for resize in ([3, 6], [10**9, 10**9], [6], None, [6.0, 6])),
        as_json(preprocessing={**METADATA["preprocessing"], "interpolation": 5}),
        as_json(preprocessing={**METADATA["preprocessing"], "interpolation": "no such"}),
        as_json(preprocessing={**METADATA["preprocessing"], "format": "L"}),
        *(as_json(label_names=names) for names in (3, ["cat"], "cat", [1, 2, 3], {"a": 1})),
        {**as_json(), "made_by": "[" * 100_000},
        {**as_json(), "preprocessing": '{"size":' * 100_000},
        {**as_json(), "label_names": "no JSON"},
        {**as_json(), "label_names": "9" * 10_000},
        {"label_names": "[]"},
        {},
    ],
)
def test_metadata_that_can_not_be_used_is_one_line(write, error_line, metadata):
    path = write(metadata)
    line = error_line(OnnxPredictor, path)
    assert f"{path} was not written by tools/export_model.py" in line
    assert len(line) < len(path) + 400


@pytest.mark.parametrize("location", ["../secret", "/secret", "secret", "inside/../../secret"])
def test_data_outside_of_the_file_is_refused(write, error_line, tmp_path, location):
    (tmp_path / "secret").write_bytes(np.ones(3, np.float32).tobytes())
    if location == "/secret":
        location = str(tmp_path / "secret")
    path = write(as_json(), location)
    assert path in error_line(OnnxPredictor, path)


@pytest.mark.parametrize("content", [b"", b"text", b"\x08" * 1000, b"\0" * 10**6])
def test_what_is_no_model_is_one_line(tmp_path, error_line, content):
    path = tmp_path / "a.onnx"
    path.write_bytes(content)
    assert str(path) in error_line(OnnxPredictor, str(path))
