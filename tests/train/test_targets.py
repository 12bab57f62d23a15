"""Data, stages, evaluations and batches in which nothing, or too little, is to be predicted."""

import dataclasses
import json

import numpy as np
import pytest

from tests.support.tiny import tiny_config
from v4jax.datasets.config import DataConfig
from v4jax.datasets.source import open_source
from v4jax.errors import InputError
from v4jax.train import evaluate
from v4jax.train.config import Stage, TrainConfig
from v4jax.train.figures import without_empty_means

MODEL = tiny_config(vocab_size=300)
NONE = "none of its .* tokens is a target; expected some"


def opened(path, **settings):
    settings = {"kind": "text", "path": str(path), "tokenizer": "bytes"} | settings
    return open_source(DataConfig(**settings), MODEL)


def test_data_without_a_target_are_refused(tmp_path):
    (tmp_path / "masked.jsonl").write_text('{"text": [["nothing of this", 0]]}\n' * 3)
    with pytest.raises(InputError, match=f"masked.jsonl: {NONE}"):
        opened(tmp_path / "masked.jsonl")


def test_documents_of_one_token_predict_nothing_unless_rows_are_one_text(tmp_path):
    np.save(tmp_path / "ends.npy", np.full(50, MODEL.eos_token_id, np.int32))
    with pytest.raises(InputError, match=f"ends.npy: {NONE}"):
        opened(tmp_path / "ends.npy", kind="tokens")
    assert opened(tmp_path / "ends.npy", kind="tokens", packed=False).rows is not None


def test_a_stage_whose_documents_have_no_target_is_refused(tmp_path):
    (tmp_path / "named.jsonl").write_text(
        '{"name": "mute", "text": [["abc", 0]]}\n{"name": "says", "text": [["abc", 1]]}\n'
    )
    source = opened(tmp_path / "named.jsonl")
    assert source.rows_of("says") is not None
    with pytest.raises(InputError, match=f"a stage's documents 'mute': {NONE}"):
        source.rows_of("mute")


@pytest.mark.parametrize("held_out", [None, 1, 40])
def test_an_evaluation_without_a_target_is_refused_before_the_run_begins(tmp_path, held_out):
    """Of the training text where nothing is held out, of one token, of a document of masks."""
    text = [["x" * 800, 0], ["y", 1]]
    (tmp_path / "rare.jsonl").write_text(json.dumps({"text": text}) + "\n")
    source = opened(tmp_path / "rare.jsonl")
    if held_out is not None:
        tokens = source.rows.tokens
        kept = tokens._replace(ids=tokens.ids[:held_out], counts=tokens.counts[:held_out])
        source = dataclasses.replace(source, held_out=kept)
    stage = Stage(steps=300, length=16, batch=2)
    config = TrainConfig(MODEL, stages=(stage,), evaluate_rows=2)
    evaluate.check(config, config.stages[0], source)  # asks for none
    config = dataclasses.replace(config, evaluate_every=1)
    with pytest.raises(InputError, match="none of the 2 held-out rows has a target"):
        evaluate.check(config, config.stages[0], source)


def test_means_over_nothing_are_null_in_the_metrics():
    """Not 0.0, which would be the best loss there is; how many there were stands next to it."""
    figures = dict(loss=0.0, mtp=0.0, indexer=0.5, indexer_uniform=0.7, grad_norm=1.0)
    counts = dict(targets=0.0, mtp_targets=0.0, indexer_queries=7.0, learning_rate=0.1)
    noted = figures | counts
    line = without_empty_means({"step": 3} | noted)
    assert [line[name] for name in ("loss", "mtp", "targets")] == [None, None, 0.0]
    assert line["indexer"] == 0.5 and line["step"] == 3
    line = without_empty_means({"step": 4} | noted | {"indexer_queries": 0.0, "targets": 5.0})
    assert [line[name] for name in ("loss", "indexer", "indexer_uniform")] == [0.0, None, None]
