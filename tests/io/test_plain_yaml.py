"""YAML of others: what is read, and what is refused in one line, without long work."""

import pytest
import yaml

from ia_gcn.io.plain_yaml import load_plain_yaml


def laughs(kind):
    """Nine levels, each ten times the one below it."""
    parts = {"list": "[{}]", "mapping": "{{a: {}}}", "merge": "{{<<: [{}]}}"}
    lines = ["l0: &l0 {x: 1}"]
    for level in range(1, 10):
        names = ", ".join([f"*l{level - 1}"] * 10)
        if kind == "mapping":
            names = ", ".join(f"k{i}: *l{level - 1}" for i in range(10))
            lines.append(f"l{level}: &l{level} {{{names}}}")
        else:
            lines.append(f"l{level}: &l{level} {parts[kind].format(names)}")
    return "\n".join(lines)


HOSTILE = {
    "lists of lists": laughs("list"),
    "mappings of mappings": laughs("mapping"),
    "merges of merges": laughs("merge"),
    "itself": "a: &a [*a]",
    "deep": "a: " + "[" * 2000,
    "deep, and closed": "a: " + "[" * 200 + "]" * 200,
    "code": "a: !!python/object/apply:os.mkdir [witness]",
    "a class": "a: !!python/name:os.system",
    "a date that is none": "a: 2020-99-99",
    "a number of many digits": "a: " + "9" * 5000,
    "numbers of the same hash": "\n".join(f"{i * (2**61 - 1)}: 1" for i in range(1000, 3000)),
    "too long": "a: " + "x" * 2**21,
    "a list": "[1, 2]",
    "nothing": "",
    "a text": "a",
    "two documents": "a: 1\n---\nb: 2",
    "no YAML": "a: [",
    "control characters": "a: \0",
    "bytes": b"a: 1",
    "a key that is a list": "[1]: 2",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_texts_are_refused(tmp_path, monkeypatch, error_line, what):
    monkeypatch.chdir(tmp_path)
    assert "a.yaml: " in error_line(load_plain_yaml, HOSTILE[what], "a.yaml")
    assert not any(tmp_path.iterdir())


def test_the_rest_is_as_yaml_reads_it():
    text = """
    base: &base {a: 1, b: [1.5, "x", null, yes]}
    more: {<<: *base, a: 2}
    again: [*base, *base]
    2020: 2020-01-02
    """
    assert load_plain_yaml(text, "a.yaml") == yaml.safe_load(text)
