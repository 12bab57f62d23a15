"""generation_config.json: where a checkpoint's texts end and how its authors draw tokens."""

from pathlib import Path
from typing import NamedTuple

from v4jax.config import ModelConfig
from v4jax.errors import InputError
from v4jax.files.json_reader import read_fields
from v4jax.infer.sampling import Sampling, check

NAME = "generation_config.json"
MAX_BYTES = 1 << 20


class GenerationDefaults(NamedTuple):
    """What counts where nobody says otherwise; None where the file says nothing.

    eos_token_id: ids that end a text. temperature is 0 where `do_sample` is false.
    """

    eos_token_id: tuple[int, ...] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    max_new_tokens: int | None = None


def read_generation_config(directory: str | Path) -> GenerationDefaults:
    """Reads the file that may lie beside a checkpoint; keys that are null say nothing.

    As in transformers, temperature and filters count only with `do_sample`, which is false unless
    it is there, and a temperature that is not there is 1.

    Raises:
      InputError: a damaged file, or values that generation cannot have.
    """
    path = Path(directory) / NAME
    if not path.exists():
        return GenerationDefaults()
    fields = read_fields(path, MAX_BYTES)
    several = isinstance(fields.get("eos_token_id"), list)
    ends = (fields.integers if several else fields.integer)("eos_token_id", None, low=0)
    ends = (ends,) if isinstance(ends, int) else ends
    limit = fields.integer("max_new_tokens", None, low=1)
    draws = fields.boolean("do_sample", None)
    given = _sampling(fields, path)._asdict() if draws else {}
    if draws is False:
        given = {"temperature": 0.0}
    return GenerationDefaults(None if ends is None else tuple(ends), max_new_tokens=limit, **given)


def end_ids(directory: str | Path | None, config: ModelConfig | None) -> tuple[int, ...]:
    """The ids that end an answer: generation_config.json's, else config.json's.

    Args:
      directory: of the checkpoint; None for a model that came from no files.
      config: None where there is no config.json.
    """
    ends = None if directory is None else read_generation_config(directory).eos_token_id
    if ends is None and config is not None:
        own = config.eos_token_id
        ends = (own,) if isinstance(own, int) else own
    return ends or ()


def _sampling(fields, path):
    """What a file that draws says of it, checked."""
    sampling = Sampling(
        temperature=fields.number("temperature", 1.0),
        top_k=fields.integer("top_k", 0, low=0),
        top_p=fields.number("top_p", 1.0),
        min_p=fields.number("min_p", 0.0),
    )
    try:
        check(sampling)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return sampling
