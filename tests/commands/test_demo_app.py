"""tools/demo_app.py: what it says of an image, its page over HTTP and in a browser, refusals."""

import html
import importlib.util
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ia_gcn import MultiLabelPredictor
from ia_gcn.commands import visualize_regions
from ia_gcn.config import read_config
from ia_gcn.data import UnreadableImage
from ia_gcn.demo import build_page, describe_image, describe_model, description, launch
from ia_gcn.demo.description import draw_graph, figure_title, network_name
from ia_gcn.errors import InputError
from ia_gcn.io import images
from ia_gcn.modeling import LabelGraph
from ia_gcn.visualization import plot_label_graph
from tests.helpers.checkpoints import COLOURS, change, save_checkpoint
from tests.helpers.commands import ROOT, run_process
from tests.helpers.images import GREY, UNREADABLE, Meter

COMMAND = "demo"
# Of a file that gradio knows.
META = {"_type": "gradio.FileData"}
CHROMIUM = shutil.which("chromium")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="gradio is not installed"
)


@pytest.fixture
def make_checkpoint(make_cfg):
    """`save_checkpoint` with its first argument."""
    return partial(save_checkpoint, make_cfg)


@pytest.fixture
def photo(tmp_path):
    """An image that its EXIF turns, and whose name is not one for HTML."""
    path = tmp_path / "a photo & <b>.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, exif=exif)
    return str(path)


@pytest.fixture
def broken(tmp_path):
    """An image that begins well and ends too soon."""
    path = tmp_path / "broken.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 50), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-300])
    return str(path)


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """A function that serves the page of a predictor, with examples: its address."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    # `launch` sets these.
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "")
    pages = []

    def start(predictor, examples=()):
        pages.append(build_page(predictor, examples))
        return launch(pages[-1], "127.0.0.1", free_port())

    yield start
    for page in pages:
        page.close(verbose=False)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def ask(address, image, threshold, folder, *known):
    """What a program gets of the page: ({label: probability} or text, path of the figure).

    `known` are the lists of labels that are known to be in the image, and not to be in it.
    """
    from gradio_client import Client, handle_file

    client = Client(address, verbose=False, analytics_enabled=False, download_files=folder)
    try:
        labels, figure = client.predict(handle_file(image), threshold, *known, api_name="/describe")
    finally:
        client.close()
    bars = labels["confidences"]
    if bars is None:
        return labels["label"], figure
    return {bar["label"]: bar["confidence"] for bar in bars}, figure


def post(address, **file):
    """The page's answer to a request that gradio's client has not made."""
    data = json.dumps({"data": [file, 0.0]}).encode()
    request = urllib.request.Request(
        f"{address}gradio_api/call/describe", data, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as reply:
        event = json.load(reply)["event_id"]
    with urllib.request.urlopen(f"{request.full_url}/{event}") as reply:
        return reply.read().decode()


def pixels_of(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


# ------------------------------------------------------------------------ what it says of an image


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        "ml_gcn",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("asl", "csra", "ml_agcn", "ia_gcn_plus")
        ),
    ],
)
def test_the_labels_are_the_predictors(make_checkpoint, photo, config, monkeypatch):
    embeddings = ("MODEL.LABEL_EMBEDDINGS.SOURCE", "names", "MODEL.LABEL_EMBEDDINGS.DIM", 7)
    opts = embeddings if config == "ml_agcn" else ()
    predictor = MultiLabelPredictor(make_checkpoint(*opts, config=config)[0], device="cpu")
    prediction = predictor(photo)
    scores = sorted(prediction.scores.astype(float), reverse=True)
    for threshold in (0, *scores, 1):
        labels, figure = describe_image(predictor, photo, threshold)
        assert len(labels) == sum(score >= threshold for score in scores)
        assert labels == prediction.above(threshold)
        assert (figure is None) == (config == "asl") == (not figure_title(predictor))
    # Of thousands, the likeliest.
    monkeypatch.setattr(description, "MAX_SHOWN_LABELS", 2)
    assert describe_image(predictor, photo, 0).labels == prediction.above(0)[:2]


@pytest.mark.slow
def test_the_figure_of_an_ia_gcn_is_that_of_visualize_regions(make_checkpoint, photo, tmp_path):
    weights, cfg, _ = make_checkpoint(config="ia_gcn_plus")
    (tmp_path / "run" / "config.yaml").write_text(cfg.dump())
    run = str(tmp_path / "run")
    assert visualize_regions.main([run, "MODEL.WEIGHTS", weights, "--images", photo]) == 0
    expected = pixels_of(tmp_path / "run" / "regions" / f"{Path(photo).stem}.png")

    predictor = MultiLabelPredictor(weights, device="cpu")
    figure = describe_image(predictor, photo, cfg.TEST.THRESHOLD).figure
    np.testing.assert_array_equal(np.asarray(figure), expected)
    other = describe_image(predictor, photo, 0.9).figure
    assert (np.asarray(other) != expected).any()


@pytest.mark.slow
def test_a_label_graph_is_of_the_likeliest_labels(tmp_path):
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, 20, (30, 30))
    pairs = pairs + pairs.T
    # A label that no image has.
    pairs[3], pairs[:, 3] = 0, 0
    counts = pairs.max(axis=0) + rng.integers(1, 9, 30)
    counts[3] = 0
    graph = LabelGraph(30, 4, threshold=0.4, reweight=0.25)
    graph.fill(counts, pairs, rng.normal(size=(30, 4)))
    scores = rng.random(30).astype(np.float32)
    scores[3] = 1.0
    names = [f"label {i}" for i in range(30)]
    figure = draw_graph(graph, scores, names)

    shown = sorted(range(30), key=lambda i: -scores[i])[:20]
    conditional = [[pairs[i][j] / counts[i] if counts[i] else 0.0 for j in shown] for i in shown]
    lcm = [[float(graph.lcm[i, j]) for j in shown] for i in shown]
    path = str(tmp_path / "expected.png")
    plot_label_graph(np.array(conditional), np.array(lcm), [names[i] for i in shown], path)
    np.testing.assert_array_equal(np.asarray(figure), pixels_of(path))


@pytest.mark.parametrize("config", ["ml_gcn", "ia_gcn_plus"])
def test_what_is_no_image_is_refused(make_checkpoint, broken, tmp_path, config):
    predictor = MultiLabelPredictor(make_checkpoint(config=config)[0], device="cpu")
    files = [broken]
    for name, write in UNREADABLE.items():
        write(tmp_path / name)
        files.append(str(tmp_path / name))
    for file in files:
        with pytest.raises(UnreadableImage):
            describe_image(predictor, file, 0.5)


@pytest.mark.parametrize("config", ["ml_gcn", "ia_gcn_plus"])
def test_images_are_decoded_in_turns(make_checkpoint, photo, monkeypatch, config):
    """Several people may drop images of many pixels at once."""
    predictor = MultiLabelPredictor(make_checkpoint(config=config)[0], device="cpu")
    expected = describe_image(predictor, photo, 0).labels
    meter = Meter()

    def metered(read):
        def call(*args):
            meter.use(40 * 60)
            return read(*args)

        return call

    # matplotlib is not made for threads, and the page draws one figure at a time.
    monkeypatch.setattr(description, "draw_graph", lambda *args: None)
    monkeypatch.setattr(description, "draw_recognition", lambda *args: GREY.save(args[-1], "PNG"))
    monkeypatch.setattr(images, "_budget", images.PixelBudget(2 * 40 * 60))
    monkeypatch.setattr(predictor, "view", metered(predictor.view))
    monkeypatch.setattr(description, "read_image", metered(description.read_image))
    with ThreadPoolExecutor(6) as pool:
        found = pool.map(lambda _: describe_image(predictor, photo, 0).labels, range(6))
        assert list(found) == [expected] * 6
    assert meter.most == 2 * 40 * 60


@pytest.mark.parametrize("config", ["ml_gcn", "ia_gcn_plus"])
def test_scores_that_are_not_finite_are_refused(make_checkpoint, photo, config):
    weights, _, model = make_checkpoint(config=config)
    with torch.no_grad():
        model.label_head.layers[1].weight[0, 0] = torch.nan
    change(weights, model=model.state_dict())
    with pytest.raises(InputError, match="not finite"):
        describe_image(MultiLabelPredictor(weights, device="cpu"), photo, 0.5)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("ml_gcn", "MultiLabelRecognizer with GCNHead on resnet10"),
        ("ia_gcn_plus", "InstanceAwareRecognizer with GCNHead on resnet10"),
        ("com_sco_only", "InstanceAwareRecognizer on resnet10"),
    ],
)
def test_what_the_model_is_and_its_data(make_checkpoint, config, expected):
    predictor = MultiLabelPredictor(make_checkpoint(config=config)[0], device="cpu")
    # Of the file that it was trained on, no more than the name.
    data = "Data: annotations.json, 3 labels (red, green, blue)"
    assert describe_model(predictor) == [f"Model: {expected}", data]


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("resnet50", ["MODEL.BACKBONE.NAME", "build_resnet_backbone"]),
        ("resnet50_fpn", ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"]),
        ("tresnet_l", ["MODEL.TIMM.NAME", "tresnet_l"]),
        ("my", ["MODEL.BACKBONE.NAME", "my_backbone"]),
    ],
)
def test_the_network_has_a_name(name, keys):
    cfg = read_config("", keys)
    cfg.MODEL.RESNETS.DEPTH = 50
    assert network_name(cfg) == name


@pytest.mark.parametrize("config", ["c_tran", "ml_decoder"])
def test_what_is_known_of_an_image(make_checkpoint, photo, config):
    """Of a model without a figure; and of one with attention, to which nothing can be told."""
    predictor = MultiLabelPredictor(make_checkpoint(config=config)[0], device="cpu")
    known = {"red": False, "blue": True}
    if config == "ml_decoder":
        with pytest.raises(InputError, match="makes no use of known labels"):
            describe_image(predictor, photo, 0, known)
        return
    assert describe_image(predictor, photo, 0, known).labels == predictor(photo, known).above(0)
    # On the page, a label that is known can be clicked again.
    labels = dict(describe_image(predictor, photo, 0.5, known).labels)
    assert (labels["red"], labels["blue"]) == (0, 1)
    assert labels.get("green", 1) >= 0.5
    with pytest.raises(InputError, match="no label 'violet'"):
        describe_image(predictor, photo, 0, {"violet": True})


# ----------------------------------------------------------------------------------------- the page


@needs_gradio
@pytest.mark.slow
def test_known_labels_on_the_page(make_checkpoint, serve, photo, tmp_path):
    from gradio_client.exceptions import AppError

    predictor = MultiLabelPredictor(make_checkpoint(config="c_tran")[0], device="cpu")
    address = serve(predictor)
    for known in ((), (["green"],), (["green"], ["red"]), ([], ["red", "blue"])):
        present, absent = (*known, [], [])[:2]
        told = {**dict.fromkeys(present, True), **dict.fromkeys(absent, False)}
        expected = dict(zip(COLOURS, predictor(photo, told).scores))
        labels, _ = ask(address, photo, 0, tmp_path, *known)
        assert labels == pytest.approx(expected, abs=1e-6)
    for known, message in [
        ((["red"], ["red"]), "red: known to be in the image, or not in it?"),
        ((["violet"],), "known: the model has no label &#x27;violet&#x27;"),
    ]:
        with pytest.raises(AppError, match=message):
            ask(address, photo, 0, tmp_path, *known)


@needs_gradio
def test_a_click_on_a_label_changes_what_is_known(make_checkpoint):
    import gradio

    predictor = MultiLabelPredictor(make_checkpoint(config="c_tran")[0], device="cpu")
    page = build_page(predictor)
    (click,) = (f.fn for f in page.fns.values() if ("select" in [name for _, name in f.targets]))
    event = gradio.SelectData(None, {"index": 0, "value": "green"})
    # In the image, not in it, unknown again.
    steps = [([], ["red"]), (["green"], ["red"]), ([], ["red", "green"]), ([], ["red"])]
    for before, after in zip(steps, steps[1:]):
        assert click(*before, event) == after


@needs_gradio
@pytest.mark.parametrize("config", ["ml_gcn", "c_tran"])
def test_only_a_model_that_takes_them_has_lists_of_known_labels(make_checkpoint, config):
    page = build_page(MultiLabelPredictor(make_checkpoint(config=config)[0], device="cpu"))
    lists = [part for part in page.blocks.values() if part.get_block_name() == "dropdown"]
    assert [part.label for part in lists] == (
        ["Known in the image", "Known not in the image"] if config == "c_tran" else []
    )
    assert all([name for name, _ in part.choices] == COLOURS for part in lists)


@pytest.mark.slow
@needs_gradio
@pytest.mark.parametrize(
    "config", ["ml_gcn", *(pytest.param(n, marks=pytest.mark.slow) for n in ("asl", "ia_gcn_plus"))]
)
def test_the_page_over_http(make_checkpoint, serve, photo, tmp_path, config):
    predictor = MultiLabelPredictor(make_checkpoint(config=config)[0], device="cpu")
    address = serve(predictor)
    assert address.startswith("http://127.0.0.1:")
    expected = predictor(photo)
    labels, figure = ask(address, photo, 0, tmp_path)
    assert labels == pytest.approx(dict(zip(COLOURS, expected.scores)), abs=1e-6)
    assert list(labels.items()) == sorted(labels.items(), key=lambda item: -item[1])
    if config == "asl":
        assert figure is None
    else:
        drawn = np.asarray(describe_image(predictor, photo, 0).figure)
        assert pixels_of(figure).shape == drawn.shape
        # But for the name of the image, which gradio keeps without its signs.
        assert (pixels_of(figure) != drawn).mean() < 0.01
    second = sorted(expected.scores.astype(float))[1]
    assert len(ask(address, photo, second, tmp_path)[0]) == 2
    assert ask(address, photo, 1, tmp_path)[0] == "none of 3 at 100%"


@needs_gradio
@pytest.mark.slow
def test_a_bad_file_is_a_message(make_checkpoint, serve, photo, broken, tmp_path, capfd):
    from gradio_client.exceptions import AppError

    predictor = MultiLabelPredictor(make_checkpoint()[0], device="cpu")
    address = serve(predictor)
    text = tmp_path / "text <i>.jpg"
    text.write_text("no image")
    for file in (broken, str(text)):
        with pytest.raises(AppError) as caught:
            ask(address, file, 0.5, tmp_path)
        message = caught.value.message
        # gradio's client leaves out these two signs of a name.
        assert message.startswith(f"{Path(file).name.translate(dict.fromkeys(b'<>'))}: ")
        # A name, and not where the server keeps it; of HTML, nothing.
        assert not {"/", "<"} & set(message)
    kept = next((tmp_path / "gradio").rglob("text*"))
    answer = post(address, path=str(kept), meta=META, orig_name=text.name)
    assert f"{html.escape(text.name)}: UnidentifiedImageError: none of JPEG" in answer
    assert "Traceback" not in "".join(capfd.readouterr())
    assert len(ask(address, photo, 0, tmp_path)[0]) == 3


@needs_gradio
def test_only_what_was_dropped_is_read(make_checkpoint, serve, photo, tmp_path):
    address = serve(MultiLabelPredictor(make_checkpoint()[0], device="cpu"))
    ask(address, photo, 0, tmp_path)
    dropped = next((tmp_path / "gradio").rglob("a photo*"))
    assert "event: complete" in post(address, path=str(dropped), meta=META)
    around = f"{dropped.parent}/../../../{Path(photo).name}"
    for file in (photo, around):
        assert "event: error" in post(address, path=file, meta=META)
        assert "not uploaded" in post(address, path=file)


@needs_gradio
@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
def test_the_command(make_checkpoint, photo, tmp_path, number):
    """With examples and behind a proxy that is not there; what was dropped is not left behind."""
    weights, *_ = make_checkpoint()
    expected = MultiLabelPredictor(weights, device="cpu")(photo)
    port, kept = free_port(), tmp_path / "gradio"
    (tmp_path / "examples").mkdir()
    shutil.copy(photo, tmp_path / "examples" / "x.jpg")
    proxy = f"http://127.0.0.1:{free_port()}"
    environment = {"HTTP_PROXY": proxy, "http_proxy": proxy, "GRADIO_TEMP_DIR": str(kept)}
    environment["PYTHONPATH"] = str(ROOT)
    process = subprocess.Popen(
        [
            *(sys.executable, ROOT / "tools/demo_app.py"),
            *("--weights", weights, "--port", str(port)),
            *("--device", "cpu", "--examples", tmp_path / "examples"),
        ],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # What runs the tests in the background has them ignore Ctrl+C, and so their children.
        preexec_fn=lambda: [signal.signal(n, signal.SIG_DFL) for n in SIGNALS],
    )
    try:
        assert process.stdout.readline() == (
            f"demo_app: http://127.0.0.1:{port}/ (Ctrl+C ends it)\n"
        )
        # Another address of this machine stands for all others.
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.2", port))
        labels, _ = ask(f"http://127.0.0.1:{port}/", photo, 0, tmp_path)
        assert labels == pytest.approx(dict(zip(COLOURS, expected.scores)), abs=1e-6)
        assert any(path.is_file() for path in kept.rglob("a photo*"))
        # Of others, nobody can go there.
        assert [path.stat().st_mode & 0o777 for path in kept.iterdir()] == [0o700]
    finally:
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert not list(kept.iterdir())


# Serves a page, asks it for an image, and lets no part of it look for another machine.
WATCHED = """
import sys, threading

def watch(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    elif event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    else:
        return
    if host not in ("127.0.0.1", "localhost", "::1"):
        print(f"{threading.current_thread().name}: {event} {host}", flush=True)
        raise OSError("no network")

sys.addaudithook(watch)
from ia_gcn import MultiLabelPredictor
from ia_gcn.demo import build_page, launch, own_uploads
from gradio_client import Client, handle_file
with own_uploads():
    page = build_page(MultiLabelPredictor(sys.argv[1], device="cpu"), [sys.argv[2]])
    client = Client(launch(page, port=int(sys.argv[3])), verbose=False, download_files=False)
    client.predict(handle_file(sys.argv[2]), 0, api_name="/describe")
    client.close()
    page.close(verbose=False)
# Those that send usage figures may take a moment.
for thread in threading.enumerate():
    if thread is not threading.current_thread():
        thread.join(2)
"""


@needs_gradio
@pytest.mark.slow
def test_nothing_is_sent_to_other_machines(make_checkpoint, photo, tmp_path):
    weights, *_ = make_checkpoint()
    variables = ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK", "HF_HUB_OFFLINE")
    # What this process has may be of ia_gcn itself.
    unset = dict.fromkeys((*variables, "GRADIO_ANALYTICS_ENABLED"))
    arguments = (weights, photo, free_port())
    outcome = run_process("-c", WATCHED, *arguments, **unset, GRADIO_TEMP_DIR=tmp_path)
    assert (outcome.returncode, outcome.stdout) == (0, ""), outcome.stderr


# ---------------------------------------------------------------------------------------- a browser


class Browser:
    """Chromium without a window, for which there is no network but this machine.

    It is spoken to by its DevTools protocol, through pipes: JSON that ends with a zero.

    Attributes:
        requests: the addresses that a page asked for.
        exceptions: of a page's own code.
    """

    def __init__(self, profile):
        options = [
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--no-first-run", "--disable-background-networking", "--remote-debugging-pipe"),
            *(f"--user-data-dir={profile}", "--window-size=1200,1400"),
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        ]
        # It takes commands at 3 and answers at 4.
        shell = 'exec "$0" "$@" 3<&0 4>&1 0</dev/null 1>/dev/null'
        self._process = subprocess.Popen(
            ["sh", "-c", shell, CHROMIUM, *options],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._buffer, self._count, self._session = b"", 0, {}
        self.requests, self.exceptions = [], []

    def close(self):
        self._process.terminate()
        self._process.communicate(timeout=60)

    def open(self, address, width=1200):
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Network", "Runtime", "DOM", "Page"):
            self.send(f"{domain}.enable")
        screen = {"width": width, "height": 1400, "deviceScaleFactor": 1, "mobile": width < 800}
        self.send("Emulation.setDeviceMetricsOverride", **screen)
        self.send("Page.navigate", url=address)

    def send(self, method, **parameters):
        self._count += 1
        command = {"id": self._count, "method": method, "params": parameters, **self._session}
        self._process.stdin.write(json.dumps(command).encode() + b"\0")
        while True:
            reply = self._receive()
            if reply.get("id") == self._count:
                assert "result" in reply, reply
                return reply["result"]
            if reply.get("method") == "Network.requestWillBeSent":
                self.requests.append(reply["params"]["request"]["url"])
            elif reply.get("method") == "Runtime.exceptionThrown":
                self.exceptions.append(reply["params"])

    def _receive(self):
        answers = self._process.stdout
        while b"\0" not in self._buffer:
            assert select.select([answers], [], [], 60)[0], "Chromium does not answer"
            part = answers.read(2**16)
            assert part, "Chromium has ended"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def evaluate(self, expression):
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        return result["result"].get("value")

    def wait_for(self, expression):
        """Until it is true; what the page shows says why it never is."""
        for _ in range(300):
            if self.evaluate(expression):
                return
            time.sleep(0.1)
        raise AssertionError(f"{expression}: {self.evaluate('document.body.innerText')}")

    def drop(self, file):
        document = self.send("DOM.getDocument")["root"]["nodeId"]
        found = self.send("DOM.querySelector", nodeId=document, selector="input[type=file]")
        self.send("DOM.setFileInputFiles", nodeId=found["nodeId"], files=[file])


@pytest.fixture
def browser(tmp_path):
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.close()


def shows(text):
    return f"document.body.innerText.includes({json.dumps(text)})"


def has_image(width):
    return f"[...document.images].some(image => image.naturalWidth === {width})"


@needs_gradio
def test_the_page_in_a_browser(make_checkpoint, serve, browser, photo, broken, tmp_path):
    weights, *_ = make_checkpoint(config="ia_gcn_plus", saved=("TEST.THRESHOLD", 0.01))
    predictor = MultiLabelPredictor(weights, device="cpu")
    Image.new("RGB", (123, 45)).save(tmp_path / "example.png")
    address = serve(predictor, [str(tmp_path / "example.png")])
    browser.open(address)
    browser.wait_for(shows("Least probability"))
    browser.wait_for(shows("label graph of this image"))
    browser.wait_for(has_image(123))
    browser.evaluate("[...document.images].find(image => image.naturalWidth === 123).click()")
    browser.wait_for(has_image(1500))

    browser.open(address)
    browser.wait_for(shows("Least probability"))
    browser.drop(broken)
    browser.wait_for(shows("broken.png: "))
    assert not browser.evaluate(has_image(1500))

    browser.open(address)
    browser.wait_for(shows("Least probability"))
    browser.drop(photo)
    labels = predictor(photo).above(0.01)
    assert len(labels) == 3
    for name, score in labels:
        browser.wait_for(shows(name))
        browser.wait_for(shows(f"{score:.0%}"))
    browser.wait_for(has_image(1500))

    here = (address, "data:", "blob:", "about:blank")
    assert any(url.startswith(address) for url in browser.requests)
    assert not [url for url in browser.requests if not url.startswith(here)]
    assert not browser.exceptions


def box_of(browser, selector):
    """left, top, right and bottom of an element on the page."""
    box = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
    return [browser.evaluate(f"{box}.{side}") for side in ("left", "top", "right", "bottom")]


@needs_gradio
@pytest.mark.parametrize("width", [1200, 390])
def test_where_things_stand(make_checkpoint, serve, browser, tmp_path, width):
    """On a phone the result is above the examples; on a wide screen, beside them."""
    weights, *_ = make_checkpoint(config="ml_gcn")
    Image.new("RGB", (123, 45)).save(tmp_path / "example.png")
    predictor = MultiLabelPredictor(weights, device="cpu")
    browser.open(serve(predictor, [str(tmp_path / "example.png")]), width)
    browser.wait_for(has_image(123))
    browser.wait_for(shows("MultiLabelRecognizer with GCNHead on resnet10"))
    assert browser.evaluate("document.title") == "model.pth: Labels in an image"
    assert browser.evaluate("document.querySelector('h1').innerText") == "Labels in an image"
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    names = ("image", "result", "figure", "examples")
    image, result, figure, examples = (box_of(browser, f"#{name}") for name in names)
    if width < 640:
        for above, below in zip((image, result, figure), (result, figure, examples)):
            assert above[3] <= below[1]
    else:
        assert image[2] <= result[0]
        assert image[3] <= examples[1]
        assert examples[2] <= result[0]
        assert examples[3] <= figure[1]


# ----------------------------------------------------------------------------------------- refusals


def fails(result):
    """The one line that a failed command says."""
    status, out, err = result
    assert status == 1
    assert not out
    assert len(err.splitlines()) == 1
    assert err.startswith("demo_app: ")
    return err


def test_without_gradio(main, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    line = fails(main("--weights", "model.pth"))
    assert 'pip install "ia_gcn[demo]" or pip install gradio' in line


@needs_gradio
def test_refusals_are_one_line(main, make_checkpoint, tmp_path):
    weights, *_ = make_checkpoint()
    missing, empty = tmp_path / "missing", tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").write_text("no image")
    assert "missing: no such folder" in fails(main("--weights", weights, "--examples", missing))
    assert "empty: there is no image" in fails(main("--weights", weights, "--examples", empty))
    assert "none.pth" in fails(main("--weights", tmp_path / "none.pth"))
    assert "none.yaml" in fails(main("--weights", weights, "--config-file", "none.yaml"))
    assert "abacus" in fails(main("--weights", weights, "--device", "abacus"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        line = fails(main("--weights", weights, "--device", "cpu", "--port", taken))
        assert f"--port {taken}: " in line
    line = fails(main("--weights", weights, "--device", "cpu", "--host", "no.such.host.invalid"))
    assert "--host no.such.host.invalid" in line


def test_unreadable_examples_are_left_out(tool, photo, broken, tmp_path, capsys):
    assert tool.find_examples(str(tmp_path)) == [photo]
    err = capsys.readouterr().err
    assert err.startswith(f"demo_app: --examples: {broken}: ")
    assert err.count("\n") == 1
    Path(photo).unlink()
    with pytest.raises(InputError, match="there is no image in this folder"):
        tool.find_examples(str(tmp_path))


@pytest.mark.parametrize("port", ["0", "65536", "-1", "http"])
def test_a_port_is_a_number(main, port):
    with pytest.raises(SystemExit):
        main("--weights", "model.pth", "--port", port)
