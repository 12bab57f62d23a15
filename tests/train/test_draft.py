"""A DSpark draft's training: its loss against numpy, what it reads, what it moves, a whole run."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import v4jax
from tests.model.test_dspark import dspark_config
from tests.support.dspark_numpy import Reference
from tests.support.tiny import drawn
from tests.support.train_models import ragged
from v4jax.checkpoints.load import save_official
from v4jax.config import CSA, WINDOW, DSpark
from v4jax.datasets.config import DataConfig
from v4jax.errors import InputError
from v4jax.model.transformer import Transformer
from v4jax.train import config_file, draft_loss, loop, metrics
from v4jax.train.anchors import with_anchors
from v4jax.train.config import Stage, TrainConfig
from v4jax.train.draft_loss import DraftLoss
from v4jax.train.optimizer import OptimizerConfig
from v4jax.train.schedule import Schedule
from v4jax.train.tree_paths import by_path

GAMMA, W = 3, 8
SIZES = DSpark(block_size=GAMMA, markov_rank=6, noise_token_id=330, target_layer_ids=(0, 1))
OPTIONS = DraftLoss(decay=2.0)
# Rows of two and of three documents, of 64 tokens; in the second row the third is no target.
ANCHORS = np.array([[1, 4, 11, 28, 62], [5, 31, 38, 39, -1]], np.int32)


def small_config(**changes):
    sizes = {"layers": (WINDOW, CSA), "hc_mult": 2, "draft_layers": 2, "dspark": SIZES}
    return dspark_config(**(sizes | changes))


class Case:
    """A model, packed rows with anchors, and what the loss makes of them."""

    def __init__(self):
        self.model = Transformer(small_config())
        self.variables = drawn(self.model)
        batch = ragged([[30], [7, 33]], targets=[(0, 1), (0, 1)], ahead=1)
        self.batch = batch.replace(anchors_BA=ANCHORS)
        self.counts = draft_loss.count(self.batch, GAMMA, OPTIONS)

        def loss(params, batch, counts):
            variables = self.variables | {"params": params}
            return draft_loss.loss(self.model, variables, batch, OPTIONS, counts)

        self.gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (self.loss, self.noted), self.of = self.gradients(
            self.variables["params"], self.batch, self.counts
        )


@pytest.fixture(scope="module")
def case():
    return Case()


def in_numpy(case):
    """The loss once more, block by block and slot by slot."""
    call = functools.partial(
        case.model.apply, aux=("streams",), segment_ids=case.batch.segment_ids_BT
    )
    out = jax.jit(call)(case.variables, case.batch.tokens_BT)
    means = [np.asarray(out.aux["streams"][i]).mean(axis=2) for i in SIZES.target_layer_ids]
    features, logits = np.concatenate(means, axis=-1), np.asarray(out.logits, np.float64)
    reference = Reference(case.model.config, jax.tree.map(np.asarray, case.variables))
    parts, weight, by_slot, taus, off = np.zeros(3), 0.0, [[], [], []], [], []
    for row, anchors in enumerate(ANCHORS):
        for t in anchors[anchors >= 0]:
            document = case.batch.segment_ids_BT[row]
            begin = int(np.argmax(document == document[t]))
            padded = np.append(case.batch.targets_BTJ[row, :, 0], [0] * GAMMA)
            true = iter(padded[t : t + GAMMA])
            _, drafts, sure = reference.propose(
                features[row, begin:t],
                int(case.batch.tokens_BT[row, t]),
                lambda _, true=true: next(true),
            )
            survival, tau = 1.0, 1.0
            for k in range(GAMMA):
                if t + k >= 64 or not case.batch.weights_BTJ[row, t + k, 0]:
                    break
                p, q = softmax(drafts[k]), softmax(logits[row, t + k])
                far = np.abs(p - q).sum()
                accepted, c = 1 - far / 2, 1 / (1 + np.exp(-sure[k]))
                nats = -np.log(p[padded[t + k]])
                entropy = -accepted * np.log(c) - (1 - accepted) * np.log(1 - c)
                w = np.exp(-k / 2.0)
                parts += w * np.array([nats, far, entropy])
                weight += w
                by_slot[k].append(accepted)
                off.append(c - accepted)
                survival *= accepted
                tau += survival
            else:
                taus.append(tau)
    parts /= weight
    named = dict(zip(("cross_entropy", "distance", "confidence"), parts, strict=True))
    named |= {f"acceptance_{k + 1}": np.mean(a) for k, a in enumerate(by_slot)}
    named |= {"expected_tau": np.mean(taus), "loss": parts @ [0.1, 0.9, 1.0]}
    named |= {"confidence_bias": np.mean(off), "confidence_error": np.mean(np.abs(off))}
    return named, [len(a) for a in by_slot], len(taus)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def test_the_loss_is_that_of_numpy(case):
    wanted, slots, blocks = in_numpy(case)
    assert slots == [8, 5, 4] and blocks == 4  # some end with their document, row or mask
    np.testing.assert_array_equal(case.counts.slots_K, slots)
    assert float(case.counts.blocks) == blocks
    assert set(case.noted) == set(wanted)
    for name, value in wanted.items():
        np.testing.assert_allclose(case.noted[name], value, rtol=1e-4, atol=1e-4, err_msg=name)


def test_gradients_reach_all_of_the_draft_and_nothing_else(case):
    for name, leaf in by_path(case.of).items():
        assert bool(jnp.any(leaf != 0)) == name.startswith("draft_"), name
        assert bool(jnp.all(jnp.isfinite(leaf))), name


@pytest.fixture(scope="module")
def blocks(case):
    """The draft's part alone, of features that are given."""

    def run(features, tokens, anchors):
        batch = case.batch.replace(tokens_BT=tokens, anchors_BA=anchors)
        batch = jax.tree.map(jnp.asarray, batch)
        at, _ = draft_loss.slots(batch, GAMMA)
        return draft_loss._blocks(case.model, case.variables, batch, features, at)

    rng = np.random.default_rng(5)
    width = len(SIZES.target_layer_ids) * case.model.config.hidden_size
    features = jnp.asarray(rng.standard_normal((2, 64, width)), jnp.float32)
    return jax.jit(run), features


@pytest.mark.parametrize("block", range(4))
def test_a_block_reads_the_rows_before_its_anchor_and_no_others(case, blocks, block):
    """Not the anchor's own row, none beyond the window, none of another document."""
    run, features = blocks
    t = int(ANCHORS[1, block])
    seen = [s for s in range(t - W, t) if s >= 0]
    document = case.batch.segment_ids_BT[1]
    seen = [s for s in seen if document[s] == document[t]]
    before = run(features, case.batch.tokens_BT, ANCHORS)
    for rows, same in ((seen, False), ([s for s in range(64) if s not in seen], True)):
        changed = features.at[1, np.array(rows)].add(1.0)
        after = run(changed, case.batch.tokens_BT, ANCHORS)
        own = len(ANCHORS[0]) + block
        for a, b in zip(before, after, strict=True):
            assert np.array_equal(a[own], b[own]) == same


def test_blocks_do_not_see_each_other_and_a_slot_sees_the_token_before_it(case, blocks):
    run, features = blocks
    tokens = np.array(case.batch.tokens_BT)
    before = run(features, tokens, ANCHORS)[0]
    t, own = int(ANCHORS[0, 2]), 2
    for k in range(GAMMA):
        changed = tokens.copy()
        changed[0, t + k] = (tokens[0, t + k] + 7) % 330
        after = run(features, changed, ANCHORS)[0]
        moved = [not np.array_equal(before[own, i], after[own, i]) for i in range(GAMMA)]
        assert moved == ([True] * GAMMA if k == 0 else [i == k for i in range(GAMMA)])
        others = np.delete(np.arange(len(before)), own)
        np.testing.assert_array_equal(before[others], after[others])
    alone = np.full_like(ANCHORS, 33)
    alone[0, own] = t
    np.testing.assert_array_equal(run(features, tokens, alone)[0][own], before[own])


def test_anchors_and_the_token_behind_them_are_targets():
    batch = ragged([[30], [7, 33]], targets=[(0, 1), (1,)], ahead=1)
    many = with_anchors(batch, range(4, 6), stage=0, seed=0, most=100).anchors_BA
    assert many.shape == (2, 64)
    # A document's first token is no target, and behind the last two there is one at most.
    np.testing.assert_array_equal(many[0][many[0] >= 0], [*range(1, 29), *range(31, 64)])
    np.testing.assert_array_equal(many[1][many[1] >= 0], np.arange(8, 39))
    few = [with_anchors(batch, r, 0, 0, 5).anchors_BA for r in (range(4, 6), range(5, 7))]
    for row, every in zip(few[0], many, strict=True):
        assert len(set(row)) == 5 and set(row) <= set(every)
    # By the number of the row, however rows are dealt out.
    shifted = batch.replace(**{k: v[::-1] for k, v in vars(batch).items() if v is not None})
    again = with_anchors(shifted, range(5, 7), 0, 0, 5).anchors_BA
    np.testing.assert_array_equal(again[0], few[0][1])
    masked = batch.replace(weights_BTJ=np.zeros_like(batch.weights_BTJ))
    assert (with_anchors(masked, range(2), 0, 0, 5).anchors_BA == -1).all()
    assert float(draft_loss.count(masked.replace(anchors_BA=few[0]), GAMMA, OPTIONS).weight) == 0


RUN_SIZES = {"layers": (WINDOW,), "hc_mult": 1, "hidden_size": 16, "draft_layers": 1}


@functools.cache
def _text():
    return "".join(f"{i} times {i} is {i * i}.\n" for i in range(200))


def run_config(folder, **changes):
    """A draft for a checkpoint with an MTP block, which is written to `folder`."""
    draft = dataclasses.replace(SIZES, target_layer_ids=(0,))
    config = small_config(**RUN_SIZES, dspark=draft)
    plain = dataclasses.replace(config, dspark=None, draft_layers=0, mtp_layers=(WINDOW,))
    start = folder / "target"
    if not start.exists():
        (folder / "text.txt").write_text(_text())
        save_official(start, plain, drawn(Transformer(plain)))
    fields = {
        "model": config,
        "draft": DraftLoss(anchors=8),
        "start": str(start),
        "stages": (Stage(steps=30, length=32, batch=4),),
        "data": DataConfig(kind="text", path=str(folder / "text.txt"), tokenizer="bytes"),
        "optimizer": OptimizerConfig(matrices="adamw", weight_decay=0.0),
        "schedule": Schedule(2e-2, 2e-2, warm_up=0, decay=0),
        "evaluate_every": 15,
        "checkpoint_every": 12,
        "evaluate_rows": 6,
    }
    return TrainConfig(**(fields | changes))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("draft")
    loop.train(run_config(folder), folder / "run")
    return folder


def test_a_run_lowers_the_loss(trained):
    lines = metrics.read(trained / "run")
    assert lines[-1]["step"] == 30 and lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    wanted = {
        "acceptance_1",
        "acceptance_3",
        "expected_tau",
        "confidence_bias",
        "targets",
        "blocks",
    }
    assert all(wanted <= set(line) for line in lines)
    first, last = [line for line in lines if "held_out" in line]
    assert last["held_out"] < first["held_out"] and 1 <= last["held_out_expected_tau"] <= 1 + GAMMA


def test_a_run_leaves_the_model_and_gives_it_a_draft(trained):
    before = v4jax.load(trained / "target")[1]
    model, after = v4jax.load(trained / "run" / "model")
    assert model.config.dspark is not None and model.config.draft_layers == 1
    kept = {k: v for k, v in by_path(before).items() if "/mtp_" not in k}
    found = by_path(after)
    assert {k for k in found if "/draft_" not in k} == set(kept)
    for name, leaf in kept.items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)
    assert any("/draft_0/" in name for name in found)


@pytest.mark.slow
def test_a_run_goes_on_as_if_it_had_not_stopped(trained):
    config = run_config(trained)
    loop.train(config, trained / "again", steps=7)
    loop.train(config, trained / "again")
    pair = [by_path(v4jax.load(trained / name / "model")[1]) for name in ("run", "again")]
    for name, leaf in pair[0].items():
        np.testing.assert_array_equal(pair[1][name], leaf, err_msg=name)


@pytest.mark.slow
def test_a_draft_that_the_checkpoint_has_is_trained_on(trained):
    config = run_config(trained, start=str(trained / "run" / "model"))
    loop.train(config, trained / "further", steps=1)
    last, first = metrics.read(trained / "run")[-1], metrics.read(trained / "further")[0]
    assert first["loss"] < 1.2 * last["loss"]


@pytest.mark.slow
def test_parts_add_up_to_the_batch(case):
    total = 0.0
    for row in range(2):
        part = jax.tree.map(lambda x, row=row: x[row : row + 1], case.batch)
        total += float(case.gradients(case.variables["params"], part, case.counts)[0][0])
    np.testing.assert_allclose(total, case.loss, rtol=1e-5)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"start": None}, "start is None; a draft is trained for a checkpoint"),
        ({"mesh": "data=2"}, "a draft is trained alone and on one device"),
        ({"model": small_config(dspark=None)}, "model.dspark is None; give the model dspark"),
    ],
)
def test_a_draft_that_cannot_be_trained_is_refused(tmp_path, changes, sentence):
    with pytest.raises(InputError, match=sentence):
        TrainConfig(**({"model": small_config(), "draft": DraftLoss(), "start": "x"} | changes))


@pytest.mark.parametrize(
    "fields", [{"anchors": 0}, {"decay": 0.0}, {"decay": float("inf")}, {"distance": -1.0}]
)
def test_losses_that_make_no_sense_are_refused(fields):
    with pytest.raises(InputError, match=f"draft.{next(iter(fields))} is "):
        DraftLoss(**fields)


@pytest.mark.parametrize("name", ["draft_tiny", "draft_nano"])
def test_shipped_drafts_are_valid(name):
    config = config_file.read(f"configs/{name}.py", {"draft.anchors": "3"})
    assert config.draft.anchors == 3 and config.model.dspark is not None
    assert config_file.read(name, {"start": "elsewhere"}).start == "elsewhere"
