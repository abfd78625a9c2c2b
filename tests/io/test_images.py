"""Reading images: turns of threads. What is read is tested with the mapper and the predictors."""

import io
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
from PIL import Image

from ia_gcn.inference import predict_files
from ia_gcn.io import images
from ia_gcn.io.images import PixelBudget, UnreadableImage, decode_image, turn_to_decode
from tests.helpers.images import Meter


def test_threads_stay_within_the_budget_and_a_larger_image_is_alone():
    budget, small, large = PixelBudget(100), Meter(), Meter()

    def work(pixels):
        with budget.take(pixels):
            small.use(pixels)
            if pixels > 100:
                large.use(small.users)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [30, 40, 1000, 30, 90, 10, 20, 1000, 30, 30, 30, 30]))
    assert small.most == 1000
    assert small.most_users > 1
    assert large.most == 0  # nobody else was there


def test_the_budget_is_given_back_after_an_error():
    budget = PixelBudget(10)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), budget.take(10):
            raise ZeroDivisionError


def test_threads_that_predict_files_decode_no_more_than_the_budget(monkeypatch, tmp_path):
    monkeypatch.setattr(images, "_budget", PixelBudget(250))
    for i in range(20):
        Image.new("RGB", (10, 10)).save(tmp_path / f"{i}.png")
    meter = Meter()

    class Predictor:
        label_names = ()

        def view(self, file):
            meter.use(100)
            return {}

        def predict_views(self, samples):
            return samples

        @contextmanager
        def used_by(self, num_threads):
            yield None, nullcontext()

    results = list(predict_files(Predictor(), sorted(tmp_path.iterdir()), num_workers=8))
    assert not any(result.error for result in results)
    assert meter.most == 200


def test_no_turn_is_given_for_what_cannot_be_read(tmp_path):
    path = tmp_path / "text.png"
    path.write_text("no image")
    with pytest.raises(UnreadableImage), turn_to_decode(str(path)):
        raise AssertionError("it was given one")


def test_what_is_no_image_is_named_as_a_user_knows_it(tmp_path):
    path = tmp_path / "text.png"
    path.write_text("no image")
    named = io.BytesIO(b"no image")
    named.name = "-"
    files = {str(path): str(path), named: "-", io.BytesIO(b"no image"): "image"}
    for file, name in files.items():
        with pytest.raises(UnreadableImage) as caught:
            decode_image(file, np.asarray)
        assert caught.value.file_name == name
        # Nothing of the file as Python has it open.
        assert not set("<>") & set(str(caught.value))
