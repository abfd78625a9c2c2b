"""What a notebook shows of a prediction."""

from html.parser import HTMLParser

import numpy as np

from ia_gcn.inference import PredictedRegions, Prediction


class Cells(HTMLParser):
    """The text of each table cell, the widths of bars, and what tags and attributes there are."""

    def __init__(self, html):
        super().__init__()
        self.rows, self.widths, self.tags, self.attributes = [], [], set(), set()
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")
        if tag == "div":
            style = dict(part.split(":") for part in dict(attrs)["style"].split(";"))
            self.widths.append(float(style["width"].rstrip("%")))

    def handle_data(self, data):
        if self.rows:
            self.rows[-1][-1] += data


def test_the_likeliest_labels_are_bars():
    names = [f"label {i}" for i in range(30)]
    scores = np.random.default_rng(0).random(30, np.float32)
    html = Prediction(names, scores, None)._repr_html_()
    cells = Cells(html)
    order = np.argsort(-scores)[:10]
    assert [row[0] for row in cells.rows] == [names[i] for i in order]
    np.testing.assert_allclose(cells.widths, 100 * scores[order], atol=0.051)
    assert [float(row[2].rstrip("%")) for row in cells.rows] == cells.widths
    assert "10 of 30 labels" in html
    assert "regions" not in html


def test_names_are_escaped_and_nothing_is_loaded():
    names = ["<script>alert(1)</script>", 'a"b', "c & d", "<img src=x onerror=alert(1)>"]
    regions = PredictedRegions(np.zeros((3, 4)), np.zeros(3), np.zeros((3, 4)))
    html = Prediction(names, np.array([0.4, 0.3, 0.2, 0.1], np.float32), regions)._repr_html_()
    cells = Cells(html)
    assert [row[0] for row in cells.rows] == names
    assert cells.tags == {"table", "caption", "tr", "td", "div"}
    assert cells.attributes == {"style"}
    assert "url(" not in html
    assert "4 of 4 labels, by 3 regions" in html
