"""What tools/check_docs.py finds in a page, and that it finds nothing in the documentation."""

from __future__ import annotations

import check_docs
import pytest

GOOD = """
# A page

[Itself](#a-page), [a file](other.md#its-heading); `SOLVER.IMS_PER_BATCH 8`, `configs/COCO/*.yaml`.

```sh
for seed in 1 2; do
    tools/train_net.py --config-file configs/VOC/$config.yaml --num-gpus 2 \\
        SEED $seed SOLVER.BASE_LR 0.1
done
tools/ablate.py run --mode train | tail -n 1
make demo
ia-gcn predict --weights model.pth photos
ia-gcn ablate run --jobs 1
ia-gcn train --config-file DigitScenes/ml_gcn.yaml SOLVER.MAX_EPOCHS 3
```

```python
from ia_gcn import MultiLabelPredictor
```
"""


@pytest.fixture
def findings(tmp_path):
    """A function from the text of a page to what is wrong with it, without running commands."""

    def find(text: str):
        (tmp_path / "other.md").write_text("## Its heading\n")
        (tmp_path / "page.md").write_text(text)
        return [what for _, what in check_docs.check([tmp_path / "page.md"], run_blocks=False)]

    return find


def test_a_page_whose_names_all_exist_passes(findings):
    assert findings(GOOD) == []


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("#a-page", "#another", "link to #another: no such heading"),
        ("other.md", "none.md", "link to none.md#its-heading: no such file"),
        ("#its-heading", "#none", "link to other.md#none: no such heading"),
        ("IMS_PER_BATCH", "IMAGES", "SOLVER.IMAGES: no such config key"),
        ("configs/COCO/*", "configs/None/*", "configs/None/*.yaml: no such file"),
        ("configs/VOC", "configs/None", "configs/None/$config.yaml: no such file"),
        ("--num-gpus", "--gpus", "tools/train_net.py --gpus: no such option"),
        ("--mode", "--modes", "tools/ablate.py --modes: no such option"),
        ("tools/ablate.py", "tools/none.py", "tools/none.py: no such file"),
        ("make demo", "make none", "make none: no such target"),
        ("ia-gcn predict", "ia-gcn none", "ia-gcn none: no such command"),
        ("--weights", "--weight", "ia-gcn predict --weight: no such option"),
        ("--jobs", "--job", "ia-gcn ablate --job: no such option"),
        ("DigitScenes/", "NoScenes/", "NoScenes/ml_gcn.yaml: no such file"),
        ("MultiLabelPredictor", "None_", "ia_gcn has no None_"),
        ("import Multi", "imports Multi", "invalid syntax (<unknown>, line 1)"),
    ],
)
@pytest.mark.slow
def test_each_name_that_does_not_exist_is_found(findings, old, new, expected):
    assert findings(GOOD.replace(old, new)) == [expected]


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        ("SOLVER.BASE_LR 0.1", "SOLVER.BASE_RATE 0.1"),
        ("BASE_LR 0.1", "BASE_LR slow"),
        # It has no effect.
        ("SOLVER.BASE_LR 0.1", "INPUT.MIN_SIZE_TEST 400"),
    ],
)
def test_config_keys_and_values_of_a_command_are_tried(findings, change):
    wrong = findings(GOOD.replace(*change))
    assert wrong
    assert all("configs/VOC/" in what for what in wrong)


def page(tmp_path, comment: str, command: str):
    path = tmp_path / "page.md"
    path.write_text(f"{comment}\n```sh\n{command}\n```\n")
    return next(check_docs.fenced_blocks(path))


def test_a_block_runs_with_the_words_of_its_comment(tmp_path):
    block = page(tmp_path, "<!-- check: run more -->", "touch made")
    assert block.runs
    assert list(check_docs.run_block(block, tmp_path)) == []
    assert (tmp_path / "made").exists()
    assert (tmp_path / "more").exists()


def test_a_command_that_fails_is_found_and_ends_its_block(tmp_path):
    block = page(tmp_path, "<!-- check: run -->", "ls nowhere\ntouch made")
    (failure,) = check_docs.run_block(block, tmp_path)
    assert "nowhere" in failure
    assert not (tmp_path / "made").exists()


def test_a_block_is_not_run_unless_it_is_asked_for(tmp_path):
    assert not page(tmp_path, "", "ls").runs
    assert not page(tmp_path, "<!-- check: parse -->", "ls").runs


@pytest.mark.slow
def test_the_documentation_is_true():
    assert check_docs.main([]) == 0
