"""Data sets in tar shards."""

import json
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from ia_gcn.data.datasets.coco import load_multilabel_coco
from ia_gcn.data.datasets.shard_writing import write_shards


def tiny_shards(data, folder, shard_size=300):
    """Shards of a `TinyCoco`, whose images have some 110 bytes each; the path of their index."""
    dicts = load_multilabel_coco(data.json_file, data.image_root, data.label_names)
    return Path(write_shards(dicts, data.label_names, str(folder), shard_size))


def read_lines(index):
    return [json.loads(line) for line in index.read_text().splitlines()]


class Quiet(SimpleHTTPRequestHandler):
    """Counts what is asked for, by name."""

    def __init__(self, *args, asked, **kwargs):
        self.asked = asked
        super().__init__(*args, **kwargs)

    def do_GET(self):
        self.asked[self.path.lstrip("/")] += 1
        super().do_GET()

    def log_message(self, *args):
        pass


@contextmanager
def served(folder, asked, handler=Quiet):
    """A folder as http://..., whose requests are counted in a Counter."""
    make = partial(handler, directory=str(folder), asked=asked)
    with ThreadingHTTPServer(("127.0.0.1", 0), make) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
