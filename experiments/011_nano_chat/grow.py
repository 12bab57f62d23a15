"""nano with room for a chat: the special tokens of the V4 format, and positions up to 8,192.

    python experiments/011_nano_chat/grow.py

Writes runs/grown, from which config.py starts. The weights are nano's as they are stored.
"""

import dataclasses
import shutil
from pathlib import Path

import config

import v4jax
from v4jax.checkpoints import load as checkpoint
from v4jax.checkpoints.grow import with_more_ids
from v4jax.datasets import chat_tokens, tokenize
from v4jax.files.tokenizer_json import read_tokenizer

HERE = Path(__file__).parent
OUT = HERE / "runs" / "grown"


def main():
    nano, sizes = checkpoint.locate("nano"), config.model()
    found, variables = checkpoint.load_variables(nano)
    found, variables = with_more_ids(found, variables, sizes.vocab_size)
    found = dataclasses.replace(
        found,
        max_position_embeddings=sizes.max_position_embeddings,
        rope_scaling=sizes.rope_scaling,
    )
    shutil.rmtree(OUT, ignore_errors=True)
    v4jax.save_official(OUT, found, variables)
    old = read_tokenizer(f"{nano}/tokenizer.json", "install v4jax again")
    renamed = {tokenize.BOS: chat_tokens.BOS, tokenize.EOS: chat_tokens.EOS}
    new = chat_tokens.with_chat_tokens(old, sizes.vocab_size, renamed)
    (OUT / "tokenizer.json").write_text(new.to_str(), encoding="utf-8")


if __name__ == "__main__":
    main()
