"""The trainer: exact resume, its hooks, and what it refuses."""

import json
import re

import pytest
import torch
from detectron2.modeling import build_model

from ia_gcn.data.dataset_mapper import MultiLabelDatasetMapper
from ia_gcn.engine import Trainer
from ia_gcn.engine.hooks import growth_start, remedies
from ia_gcn.errors import InputError, TrainingDiverged
from tests.helpers.training import Cut, assert_same_state, run


def run_cut_and_resumed(cfg, resumed_cfg=None):
    with pytest.raises(Cut):
        run(cfg, cut_at=4)  # the last checkpoint is that of iteration 2, two steps before
    torch.rand(7)  # whatever happens to the generators in between
    return run(resumed_cfg or cfg, resume=True)


@pytest.mark.parametrize("optimizer", ["AdamW", pytest.param("SGD", marks=pytest.mark.slow)])
def test_a_cut_run_resumed_ends_as_an_uncut_one(make_cfg, optimizer):
    opts = ("SOLVER.OPTIMIZER", optimizer, "SOLVER.BASE_LR", 0.001)
    uncut = run(make_cfg("uncut", *opts))
    resumed = run_cut_and_resumed(make_cfg("cut", *opts))
    assert resumed.start_iter == 3
    assert_same_state(uncut, resumed)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["add_gcn", "kggr", "salgl", "tdrg"])
def test_heads_with_graphs_resume_to_the_bit(make_cfg, config):
    uncut = run(make_cfg("uncut", config=config))
    assert_same_state(uncut, run_cut_and_resumed(make_cfg("cut", config=config)))


def test_a_checkpoint_does_not_say_how_a_step_is_computed(make_cfg, tmp_path):
    # As one is that was written on a GPU, or before Adam was fused.
    opts = ("SOLVER.OPTIMIZER", "AdamW", "SOLVER.BASE_LR", 0.001, "TEST.EVAL_PERIOD", 0)
    uncut = run(make_cfg("uncut", *opts))
    cfg = make_cfg("cut", *opts)
    with pytest.raises(Cut):
        run(cfg, cut_at=4)
    path = tmp_path / "cut" / (tmp_path / "cut" / "last_checkpoint").read_text()
    checkpoint = torch.load(path, weights_only=True)
    for group in checkpoint["trainer"]["_trainer"]["optimizer"]["param_groups"]:
        group["fused"] = not group["fused"]
    torch.save(checkpoint, path)
    assert_same_state(uncut, run(cfg, resume=True))


def test_a_run_that_repeats_images_resumes_to_the_bit(make_cfg):
    sampler = ("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler")
    opts = (*sampler, "DATALOADER.REPEAT_THRESHOLD", 0.9, "TEST.EVAL_PERIOD", 0)
    uncut = run(make_cfg("uncut", *opts))
    assert_same_state(uncut, run_cut_and_resumed(make_cfg("cut", *opts)))


@pytest.mark.slow
def test_ia_gcn_draws_after_a_cut_what_it_would_have_drawn(make_cfg):
    uncut = run(make_cfg("uncut", config="ia_gcn"))
    assert_same_state(uncut, run_cut_and_resumed(make_cfg("cut", config="ia_gcn")))


def test_ia_gcn_logs_its_weights_every_step(make_cfg):
    trainer = run(make_cfg("run", config="ia_gcn"))
    for name in ("mean_abs_mu", "mean_sigma", "kl", "mean_presence"):
        values = trainer.storage.history(f"regions/{name}").values()
        assert [iteration for _, iteration in values] == list(range(7))


def rpn_state(model):
    return {n: w.clone() for n, w in model.state_dict().items() if n.startswith("proposal_gen")}


@pytest.mark.slow
def test_a_frozen_rpn_stays_as_it_was_loaded_and_asks_for_no_boxes(make_cfg, tmp_path):
    trained = run(make_cfg("trained", "TEST.EVAL_PERIOD", 0, config="ia_gcn"))
    weights = ("MODEL.WEIGHTS", str(tmp_path / "trained" / "model_final.pth"))
    opts = ("MODEL.RPN.FROZEN", True, "INPUT.WITH_BOXES", False, *weights)
    frozen = run(make_cfg("frozen", *opts, config="ia_gcn"))
    before, after = rpn_state(trained.model), rpn_state(frozen.model)
    assert before
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(
        trained.model.roi_heads.rough_classifier.weight,
        frozen.model.roi_heads.rough_classifier.weight,
    )


def test_an_rpn_frozen_at_random_is_refused(make_cfg, tmp_path):
    with pytest.raises(InputError, match=r"MODEL\.WEIGHTS is empty"):
        run(make_cfg("run", "MODEL.RPN.FROZEN", True, config="ia_gcn"))
    run(make_cfg("ml_gcn", "SOLVER.MAX_ITER", 1))
    weights = ("MODEL.WEIGHTS", str(tmp_path / "ml_gcn" / "model_final.pth"))
    with pytest.raises(InputError, match=r"lacks .* \(proposal_generator"):
        run(make_cfg("run", "MODEL.RPN.FROZEN", True, *weights, config="ia_gcn"))


@pytest.mark.slow
def test_the_number_of_workers_makes_no_difference_even_midway(make_cfg):
    uncut = run(make_cfg("uncut"))
    with_workers = make_cfg("cut", "DATALOADER.NUM_WORKERS", 2)
    resumed = run_cut_and_resumed(make_cfg("cut"), with_workers)
    assert_same_state(uncut, resumed)


def test_a_run_without_a_seed_keeps_the_one_it_drew(make_cfg):
    cfg = make_cfg("run", "SEED", -1)
    with pytest.raises(Cut):
        run(cfg, cut_at=4)
    first = Trainer(cfg)
    first.resume_or_load(True)
    second = Trainer(cfg)
    second.resume_or_load(True)
    assert first.seed == second.seed
    batches = [next(iter(trainer.data_loader)) for trainer in (first, second)]
    for a, b in zip(*batches):
        assert a["image_id"] == b["image_id"]
        assert torch.equal(a["image"], b["image"])


@pytest.mark.slow
def test_other_seeds_give_other_runs(make_cfg):
    runs = [run(make_cfg(f"seed{seed}", "SEED", seed)) for seed in (1, 2)]
    weights = [trainer.model.label_head.layers[0].weight for trainer in runs]
    assert not torch.equal(*weights)


def test_the_best_checkpoint_is_kept_and_is_not_the_one_to_resume_from(make_cfg, tmp_path):
    run(make_cfg("run"))
    folder = tmp_path / "run"
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"
    log = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    measured = [r["multi_label/mAP"] for r in log if "multi_label/mAP" in r]
    assert measured
    checkpoint = torch.load(folder / "model_final.pth", weights_only=True)
    best = torch.load(folder / "model_best.pth", weights_only=True)
    assert "trainer" not in best
    assert best["label_names"] == checkpoint["label_names"] == ["red", "green", "blue"]
    assert checkpoint["trainer"]["hooks"]["BestCheckpointer"]["best_metric"] is not None


def test_only_the_last_checkpoints_are_kept(make_cfg, tmp_path):
    run(make_cfg("run", "SOLVER.CHECKPOINT_PERIOD", 1, "TEST.EVAL_PERIOD", 0))
    kept = sorted(path.name for path in (tmp_path / "run").glob("*.pth"))
    assert kept == [f"model_000000{i}.pth" for i in (4, 5, 6)] + ["model_final.pth"]


def test_a_resumed_run_does_not_forget_its_best(make_cfg, tmp_path):
    with pytest.raises(Cut):
        run(make_cfg("run", "SOLVER.CHECKPOINT_PERIOD", 5), cut_at=5)
    trainer = Trainer(make_cfg("run", "SOLVER.CHECKPOINT_PERIOD", 5))
    trainer.resume_or_load(True)
    hooks = {type(hook).__name__: hook for hook in trainer._hooks}
    best = torch.load(tmp_path / "run" / "model_best.pth", weights_only=True)
    assert hooks["BestCheckpointer"].best_metric > 0
    assert hooks["BestCheckpointer"].best_iter == best["iteration"]


NO_CUSTOM = ("DATASETS.CUSTOM.TRAIN", "", "DATASETS.CUSTOM.TEST", "")


class SpoiledMapper(MultiLabelDatasetMapper):
    def __call__(self, dataset_dict):
        sample = super().__call__(dataset_dict)
        if sample["image_id"] == 5:
            sample["image"] = sample["image"].float() * float("nan")
        return sample


def test_a_bad_loss_stops_the_run_and_says_where(make_cfg, monkeypatch, tmp_path):
    monkeypatch.setattr("ia_gcn.data.build.MultiLabelDatasetMapper", SpoiledMapper)
    with pytest.raises(TrainingDiverged) as caught:
        run(make_cfg("run", "TEST.EVAL_PERIOD", 0))
    message = str(caught.value)
    assert "loss_multi_label is nan" in message
    # It came at once: the images may be to blame.
    assert "000005.png" in message
    assert "growing" not in message
    assert message.endswith("SOLVER.CLIP_GRADIENTS.ENABLED True.")


def test_a_run_that_diverges_says_since_when_and_what_to_try(make_cfg):
    rate = ("SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", 1e4, "SOLVER.MAX_ITER", 100)
    trainer = Trainer(make_cfg("run", *rate, "TEST.EVAL_PERIOD", 0))
    with pytest.raises(TrainingDiverged) as caught:
        trainer.train()
    found = re.search(
        r"diverged in iteration (\d+): loss_multi_label is (?:nan|inf) "
        r"\(growing since iteration (\d+), from (\S+) to (\S+)\)",
        str(caught.value),
    )
    last, first = int(found[1]), int(found[2])
    losses = [value for value, _ in trainer.storage.history("total_loss").values()]
    # The storage has those that were finite.
    assert (last, trainer.iter) == (len(losses) + 1, len(losses))
    assert float(found[3]) == pytest.approx(losses[first - 1], rel=0.01)
    assert float(found[4]) == pytest.approx(losses[-1], rel=0.01)
    assert "a lower SOLVER.BASE_LR (it is 10000)" in str(caught.value)
    assert "000" not in str(caught.value).replace("10000", "")


def test_what_the_rpn_finds_first_is_explained_too(make_cfg):
    keys = ("SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", 1e9, "SOLVER.MAX_ITER", 100)
    trainer = Trainer(make_cfg("run", *keys, "TEST.EVAL_PERIOD", 0, config="ia_gcn_plus"))
    with pytest.raises(TrainingDiverged) as caught:
        trainer.train()
    assert f"in iteration {trainer.iter + 1}: " in str(caught.value)
    assert re.search(r"loss_\w+ (is \S+ )?\(growing since iteration \d+, ", str(caught.value))
    assert "a lower SOLVER.BASE_LR" in str(caught.value)


@pytest.mark.parametrize(
    ("values", "start"),
    [
        ([], None),
        ([0.7], None),
        ([0.7, 0.6, 0.7, 0.5], None),
        ([0.7, 0.6, 0.5, 1.3, 4.0, 80.0], 2),
        ([0.1] * 50 + [0.15, 0.3, 5.0], 50),
        # A loss that has doubled and come back has not grown.
        ([0.5] * 30 + [3.0] * 10 + [0.6], None),
        ([0.5] * 30 + [3.0] * 10 + [0.6, 2.0, 9.0], 40),
    ],
)
def test_since_when_a_loss_grows(values, start):
    assert growth_start(values) == start


def test_only_what_is_left_to_try_is_named(make_cfg):
    amp, clipped = ("SOLVER.AMP.ENABLED", True), ("SOLVER.CLIP_GRADIENTS.ENABLED", True)
    lower = "a lower SOLVER.BASE_LR (it is 0.002)"
    assert remedies(make_cfg("a", *clipped)) == [lower]
    assert remedies(make_cfg("b", *clipped, *amp)) == [lower, "SOLVER.AMP.ENABLED False"]


def test_a_training_without_resume_or_load_starts_from_the_weights(make_cfg, tmp_path):
    trained = run(make_cfg("first"))
    weights = ("MODEL.WEIGHTS", str(tmp_path / "first/model_final.pth"))
    cfg = make_cfg("second", *weights, "SOLVER.MAX_ITER", 1, "SOLVER.BASE_LR", 0.0)
    trainer = Trainer(cfg)
    results = trainer.train()
    # A rate of 0 leaves the weights as they were; the norms' statistics move.
    for name, value in trained.model.named_parameters():
        assert torch.equal(value, trainer.model.get_parameter(name)), name
    assert results["multi_label"].keys() >= {"mAP", "CF1", "OF1_top3"}


def test_the_model_is_filled_from_the_training_set(make_cfg, tmp_path):
    trainer = Trainer(make_cfg("run"))
    graph = trainer.model.label_graph
    # Over 7 images, every combination of the three labels occurs once.
    assert graph.label_counts.tolist() == [8, 8, 8]
    assert graph.pair_counts.tolist() == [[8, 4, 4], [4, 8, 4], [4, 4, 8]]
    assert (tmp_path / "run" / "label_statistics.npz").exists()


def test_a_bare_model_does_not_train(make_cfg):
    model = build_model(make_cfg("run")).train()
    batch = [{"image": torch.zeros(3, 32, 32), "labels": torch.zeros(3)}] * 2
    with pytest.raises(RuntimeError, match="label graph is bare"):
        model(batch)


def test_an_rpn_is_not_trained_on_images_without_boxes(make_cfg, tmp_path):
    csv = tmp_path / "train.csv"
    csv.write_text("file,labels\n000001.png,red\n000002.png,green;blue\n")
    cfg = make_cfg("run", "DATASETS.CUSTOM.TRAIN", str(csv), config="ia_gcn")
    with pytest.raises(InputError, match=r"INPUT\.WITH_BOXES: .*MODEL\.RPN\.FROZEN"):
        Trainer(cfg)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("SOLVER.IMS_PER_BATCH", 0), "SOLVER.IMS_PER_BATCH"),
        ((*NO_CUSTOM, "DATASETS.TRAIN", ("no_such",)), "'no_such' is not registered"),
        (("MODEL.LABEL_EMBEDDINGS.SOURCE", "no/such/file"), "MODEL.LABEL_EMBEDDINGS.SOURCE"),
        (("MODEL.WEIGHTS", "no/such/weights.pth"), "no/such/weights.pth"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(make_cfg, opts, message):
    with pytest.raises(InputError) as caught:
        run(make_cfg("run", *opts))
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
