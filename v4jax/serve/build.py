"""From a checkpoint's directory to a server's parts."""

import os
from pathlib import Path
from typing import Any

from v4jax.chat.format import ChatFormat
from v4jax.checkpoints import load as checkpoint
from v4jax.engine.engine import Engine
from v4jax.engine.prefix_cache import PrefixCache
from v4jax.errors import InputError
from v4jax.infer.generation_config import end_ids
from v4jax.infer.tokenizer import Tokenizer
from v4jax.serve.lens import Lens
from v4jax.serve.serving import Serving
from v4jax.serve.settings import Settings

DEFAULT_LENGTH = 4096


def build(
    path: str | os.PathLike,
    settings: Settings,
    *,
    loading: dict[str, Any] | None = None,
    prefix_cache: PrefixCache | None = None,
    max_length: int | None = None,
    lens: bool = False,
    **options: Any,
) -> Serving:
    """Loads a checkpoint and makes the server of it; nothing is compiled yet.

    Args:
      path: a checkpoint's directory, or "nano". loading: options of `v4jax.load`.
      prefix_cache: where prefixes are kept; None: in memory.
      max_length: tokens of prompt and answer; None: 4,096, or what the model holds.
      lens: whether `/lens` can look into requests that have ended.
      options: of `Engine`.

    Raises:
      InputError: no such checkpoint, one without a tokenizer, or settings that cannot be used.
    """
    directory = Path(checkpoint.locate(path))
    if not directory.is_dir():
        raise InputError(
            f"there is no directory {str(directory)[:200]}; expected a checkpoint's directory, or "
            "nano"
        )
    tokenizer = Tokenizer(directory)
    model, params = checkpoint.load(directory, **(loading or {}))
    if max_length is None:
        max_length = min(DEFAULT_LENGTH, model.config.max_position_embeddings)
    prefix_cache = PrefixCache() if prefix_cache is None else prefix_cache
    engine = Engine(
        model,
        params,
        tokenizer=tokenizer,
        prefix_cache=prefix_cache,
        max_length=max_length,
        **options,
    )
    chat, why_not = chat_format(directory, settings, engine.max_length)
    config = model.config
    return Serving(
        settings,
        engine,
        tokenizer,
        bos=config.bos_token_id,
        eos=config.eos_token_id,
        stop_ids=frozenset(end_ids(directory, config)),
        chat=chat,
        no_chat=why_not,
        prefix_cache=prefix_cache,
        figures=Lens(model, params).figures if lens else None,
    )


def chat_format(
    directory: str | os.PathLike, settings: Settings, max_length: int
) -> tuple[Any, str]:
    """How the checkpoint is talked to; or None, and why it cannot chat."""
    try:
        return ChatFormat(directory, settings.name, settings.profile, max_length), ""
    except InputError as error:
        return None, f"{error}".removeprefix(f"{directory}/")
