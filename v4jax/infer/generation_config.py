"""generation_config.json: where a checkpoint's texts end and how its authors draw tokens."""

from pathlib import Path
from typing import NamedTuple

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
    ends = fields.get("eos_token_id")
    if ends is not None and not isinstance(ends, list):
        ends = [fields.integer("eos_token_id", low=0)]
    elif ends is not None:
        ends = fields.integers("eos_token_id")
    limit = (
        None if fields.get("max_new_tokens") is None else fields.integer("max_new_tokens", low=1)
    )
    sampling = Sampling(temperature=0.0)
    draws = fields.get("do_sample") is not None and fields.boolean("do_sample")
    if draws:
        sampling = sampling._replace(temperature=1.0)
        for name in ("temperature", "top_p", "min_p"):
            if fields.get(name) is not None:
                sampling = sampling._replace(**{name: fields.number(name)})
        if fields.get("top_k") is not None:
            sampling = sampling._replace(top_k=fields.integer("top_k", low=0))
    try:
        check(sampling)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    given = sampling._asdict() if draws else {}
    if not draws and fields.get("do_sample") is not None:
        given = {"temperature": 0.0}
    return GenerationDefaults(None if ends is None else tuple(ends), max_new_tokens=limit, **given)
