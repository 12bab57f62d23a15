"""Which rows an evaluation reads."""

import dataclasses

import numpy as np

from tests.support.tiny import tiny_config
from v4jax.datasets.config import DataConfig
from v4jax.datasets.source import open_source
from v4jax.train import evaluate
from v4jax.train.config import Stage, TrainConfig
from v4jax.train.schedule import Schedule


def test_rows_beyond_the_last_fill_a_batch_and_do_not_count(tmp_path):
    """A mesh divides a stage's batch, and nothing else that the user gives."""
    path = tmp_path / "text.txt"
    path.write_text(" ".join(map(str, range(300))))
    config = TrainConfig(
        model=tiny_config(vocab_size=300),
        stages=(Stage(steps=2, length=16, batch=4),),
        data=DataConfig(kind="text", path=str(path), tokenizer="bytes"),
        schedule=Schedule(1e-3, 1e-4, warm_up=1, decay=1),
        evaluate_every=1,
        evaluate_rows=6,
    )
    batches = evaluate._rows(config, config.stages[0], open_source(config.data, config.model))
    assert [batch.tokens_BT.shape for batch in batches] == [(4, 16), (4, 16)]
    counted = [(batch.weights_BTJ.sum((1, 2)) > 0).tolist() for batch in batches]
    assert counted == [[True] * 4, [True, True, False, False]]
    rows = np.concatenate([batch.tokens_BT for batch in batches])[:6]
    assert len(np.unique(rows, axis=0)) == 6


def test_bits_per_byte_are_of_text_whose_tokens_all_count(tmp_path):
    """Not of ids, whose bytes nobody knows, nor of text with targets here and there."""
    np.save(tmp_path / "ids.npy", np.arange(2, 200, dtype=np.int32))
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "masked.jsonl").write_text('{"text": [["ab", 0], ["cdef", 1]]}')

    def per_byte(kind, name):
        path = str(tmp_path / name)
        config = DataConfig(kind, path, tokenizer="bytes", held_out=0.0)
        source = open_source(config, tiny_config(vocab_size=300))
        kept = dataclasses.replace(source, held_out=source.rows.tokens)
        nbytes = 0 if kind == "tokens" else 4
        return evaluate._targets_per_byte(dataclasses.replace(kept, held_out_bytes=nbytes))

    assert per_byte("text", "a.txt") == 1.0  # three bytes and the end
    assert per_byte("tokens", "ids.npy") is None
    assert per_byte("text", "masked.jsonl") is None
