"""tools/torture.py images: a small form of it, and holes that it has to find."""

import argparse
import os
import signal

import pytest
from tortures import images as torture

from ia_gcn.inference import onnx_predictor
from ia_gcn.io import images


@pytest.fixture(scope="module", autouse=True)
def _samples():
    """The whole images, made once for all tests."""
    samples = torture.whole_images(torture.random.Random(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torture, "whole_images", lambda rng: samples)
        yield


def trials(output, number, seed=0):
    args = argparse.Namespace(seed=seed, trials=number, output=output)
    done = list(torture.run(args))
    assert len(done) == number
    return done


@pytest.mark.slow
def test_damaged_images_do_no_harm(tmp_path):
    done = trials(tmp_path, 300)
    assert not [trial for trial in done if trial.is_finding]
    assert {trial.outcome for trial in done} == {"read", "refused"}
    assert {trial.kind for trial in done} >= set(images.FORMATS)
    assert not list(tmp_path.iterdir())


def test_a_seed_makes_the_same_files():
    samples = torture.whole_images(None)
    first, second, other = (
        [torture.damaged_image(torture.random.Random(seed), samples) for _ in range(20)]
        for seed in (0, 0, 1)
    )
    assert first == second != other


def bgr(image, image_format):
    return images.convert_image(image, "BGR")


def crash(image, image_format):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize(("hole", "outcome"), [(bgr, "raised"), (crash, "crashed")])
def test_a_hole_in_the_exported_models_reader_is_found(tmp_path, monkeypatch, hole, outcome):
    monkeypatch.setattr(onnx_predictor, "convert_file", hole)
    found = [trial for trial in trials(tmp_path, 12) if trial.is_finding]
    assert found
    assert {trial.outcome for trial in found} == {outcome}
    # The files are kept.
    assert len(list((tmp_path / "images-found").iterdir())) == len(found)


@pytest.mark.slow
def test_a_format_for_which_pillow_runs_a_program_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "FORMATS", ["EPS"])
    found = [trial for trial in trials(tmp_path, 8) if trial.is_finding]
    assert {trial.outcome for trial in found} == {"ran code"}
