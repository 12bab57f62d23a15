"""What a checkpoint names: tensors that would become files, items that were never begun."""

import json

import pytest

from tests.support.checkpoints import small_config, synthetic
from v4jax.checkpoints.convert import _Conversion, _Task, convert
from v4jax.checkpoints.load import open_checkpoint
from v4jax.checkpoints.source import fit
from v4jax.config import WINDOW
from v4jax.errors import InputError

# A model's tensors, so that the odd ones are not all there are.
OTHERS = {"layers.0.attn.wq_a.weight": ("F32", (1,)), "head.weight": ("F32", (1,))}
OTHERS |= {f"layers.0.ffn.experts.{i}.w1.weight": ("F32", (1,)) for i in range(8)}


@pytest.mark.parametrize(
    "name", ["a\0b", "../../../x", "a/b", "", ".", "a..b", "é", "a" * 300, "a b", "a\nb"]
)
def test_names_of_carried_tensors_that_are_no_names_of_files(name):
    config = small_config(layers=(WINDOW,), mtp_layers=(), draft_layers=1)
    found = {f"mtp.0.{name}": ("F32", (1,)), "mtp.0.main_norm.weight": ("F32", (1,))} | OTHERS
    with pytest.raises(InputError, match="model: holds the tensor .*; expected a name") as caught:
        fit(config, found, "model")
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def test_a_block_whose_number_has_no_end():
    found = {f"mtp.{'9' * 5000}.norm.weight": ("F32", (1,))} | OTHERS
    with pytest.raises(InputError, match="do not fit config.json") as caught:
        fit(small_config(layers=(WINDOW,), mtp_layers=()), found, "model")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "line", [{"item": "../x", "crc32": {}}, {"item": "embed", "crc32": {"a": 1}}]
)
def test_a_journal_of_what_was_never_written(tmp_path, line):
    source = synthetic(tmp_path / "model", small_config(layers=(WINDOW,)))

    (tmp_path / "other").mkdir()
    task = _Task(source, str(tmp_path / "other"), "official", "stored", False)
    with open_checkpoint(source) as opened:
        purpose = _Conversion(opened, task).purpose
    text = json.dumps(purpose) + "\n" + json.dumps(line) + "\n"
    (tmp_path / "other" / ".incomplete").write_text(text)
    with pytest.raises(InputError, match=".incomplete names other tensors of .*; remove the"):
        convert(source, tmp_path / "other", "official", progress=False)
