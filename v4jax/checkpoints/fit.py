"""Holds the tensors of a checkpoint against its config: what fits, what is read as something else.

Checkpoints that others make differ from the official ones in ways that lose nothing: another float
type that holds the same numbers, an integer table of fewer bits, matrices that were expanded, MTP
blocks left out. They are read, and every such difference is said. Whatever would lose something,
or leaves a doubt, is refused with its cause.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping

from v4jax.checkpoints.foreign import Found, refuse_counts, refuse_foreign, without_buffers
from v4jax.config import WINDOW, ModelConfig
from v4jax.errors import InputError
from v4jax.files.json_reader import quote, word
from v4jax.hf.tensors import TensorSpec, fp8_quantization, scale_key, stored_form, tensor_table

_CARRIED = re.compile(r"mtp\.\d{1,4}(\.\w{1,80}){1,8}", re.ASCII)
_FLOATS = ("F16", "BF16", "F32")
_INTEGERS = ("I8", "I16", "I32", "I64", "U8", "U16", "U32")


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A config and the tensors of its checkpoint, in agreement.

    Attributes:
      config: with the blocks and the stored form that the files have.
      items: item -> its tensors, each with the one dtype as which it is read.
      stored: key -> dtype and shape in the files of the tensors that are read as something else:
        a narrower float, a table of other integers or of more columns.
      notes: a sentence for everything that is not as config.json or the official files have it.
    """

    config: ModelConfig
    items: dict[str, list[TensorSpec]]
    stored: dict[str, tuple[str, tuple[int, ...]]]
    notes: tuple[str, ...]


def fit(
    config: ModelConfig, found: Found, where: str, file_key: Callable[[str], str] = str
) -> Fitted:
    """Holds the tensors that were found against those of the config, by official keys.

    Args:
      config: what config.json says. MTP and DSpark draft blocks are counted by keys.
      found: dtype and shape of each tensor.
      where: the checkpoint's name, for errors; file_key: what it calls a tensor.

    Returns:
      The config with the blocks that are there, and the items. Draft blocks of a config that does
      not say how they run become items `carried_0`, ..., whose tensors are passed on as they are.

    Raises:
      InputError: a missing, extra, misshapen or wrongly typed tensor.
    """
    notes = []
    found = without_buffers(found, notes, file_key)
    refuse_foreign(found, where, file_key)
    config = _count_blocks(config, found, where, notes)
    unknown = config.draft_layers and config.dspark is None
    carried = list(_carried(found, where)) if unknown else []
    refuse_counts(config, found, where)
    config = _as_quantized(config, found, notes)
    table = tensor_table(config, form=stored_form(config, _scale_dtype(found)))
    specs, stored, differing = adapted(table, found)
    notes += differing.sentences(file_key)
    presented = {**found, **{key: (spec.dtypes[0], spec.shape) for key, spec in stored.items()}}
    specs = matched([*specs, *carried], presented, where, file_key)
    return Fitted(config, by_item(specs), {key: found[key] for key in stored}, tuple(notes))


class _Differing:
    """Which tensors are not as they usually are, by what is done with them."""

    def __init__(self):
        self._keys = collections.defaultdict(list)

    def add(self, what, key):
        self._keys[what].append(key)

    def sentences(self, file_key):
        return [
            f"{len(keys)} tensor{'s' * (len(keys) > 1)} (first {word(file_key(keys[0]))}) {what}"
            for what, keys in self._keys.items()
        ]


def adapted(
    table: Iterable[TensorSpec], found: Found
) -> tuple[list[TensorSpec], dict[str, TensorSpec], _Differing]:
    """The table with every tensor in the form in which it can be read without a loss.

    Returns:
      The table; those of its tensors that are read as something else than they are stored; and
      what is unusual.
    """
    specs, stored, differing = [], {}, _Differing()
    expanded = set()
    for spec in table:
        if spec.key in expanded:
            continue
        dtype, shape = found.get(spec.key, (None, ()))
        if spec.part == "values" and dtype in _FLOATS and scale_key(spec.key) not in found:
            expanded.add(scale_key(spec.key))
            differing.add(f"are {dtype} and not quantised, as the others are: kept so", spec.key)
            spec = unquantised(spec)._replace(dtypes=("BF16", "F32"))
        if spec.role == "table" and _is_table(spec, dtype, shape):
            stored[spec.key] = spec
            _say_table(spec, dtype, shape, differing)
        elif _is_other_float(spec, dtype, shape):
            usual, spec = spec.dtypes[0], spec._replace(dtypes=("F32",))
            if dtype != "F32":
                stored[spec.key] = spec
            how = "kept" if dtype == "F32" else "read as F32, which holds the same numbers"
            differing.add(f"are {dtype} where {usual} is usual: {how}", spec.key)
        specs.append(spec)
    return specs, stored, differing


def unquantised(spec: TensorSpec) -> TensorSpec:
    """The spec of an FP8 or FP4 matrix stored as plain numbers, its dtype still that of before."""
    columns = spec.shape[1] * (2 if spec.dtypes == ("I8",) else 1)
    return spec._replace(part="array", shape=(spec.shape[0], columns))


def _is_table(spec, dtype, shape):
    """Whether a table has other integers or more columns than it is read with."""
    fits = len(shape) == 2 and shape[0] == spec.shape[0] and shape[1] >= spec.shape[1]
    return fits and dtype in _INTEGERS and (dtype, shape) != ("I64", spec.shape)


def _is_other_float(spec, dtype, shape):
    """Whether float32 holds a tensor's numbers, and its own type is not one that is usual."""
    usual = spec.part == "array" and spec.role != "table" and shape == spec.shape
    return usual and dtype in _FLOATS and dtype not in spec.dtypes


def _say_table(spec, dtype, shape, differing):
    if dtype != "I64":
        differing.add(f"are {dtype} where I64 is usual: read as I64", spec.key)
    if shape != spec.shape:
        differing.add(
            f"name {shape[1]} experts per token and num_experts_per_tok is {spec.shape[1]}: the "
            f"first {spec.shape[1]} are read",
            spec.key,
        )


def _as_quantized(config, found, notes):
    """The config with the quantisation that the files show."""
    weights = {key: dtype for key, (dtype, _) in found.items() if key.endswith(".weight")}
    experts = {dtype for key, dtype in weights.items() if ".experts." in key}
    if not {"F8_E4M3", "I8"} & set(weights.values()):
        if config.quantization is not None:
            notes.append(
                "config.json has a quantization_config and no matrix is quantised: it was left "
                "behind and is not used"
            )
        return dataclasses.replace(config, quantization=None, expert_dtype=None)
    if config.quantization is None:
        e8m0 = _scale_dtype(found) == "F8_E8M0"
        quantization = fp8_quantization("ue8m0" if e8m0 else None)
        config = dataclasses.replace(config, quantization=quantization)
        notes.append("matrices are quantised and config.json has no quantization_config: added")
    packed = "fp4" if "I8" in experts else None if "F8_E4M3" in experts else config.expert_dtype
    if config.expert_dtype != packed:
        notes.append(
            f"config.json has expert_dtype {config.expert_dtype!r} and the experts are "
            f"{'FP4' if packed else 'FP8'}: read as that"
        )
    return dataclasses.replace(config, expert_dtype=packed)


def _scale_dtype(found):
    """The dtype of the scales of the model's FP8 matrices; None where nothing has any."""
    names = (key for key in found if key.endswith(".scale") and ".experts." not in key)
    first = "layers.0.attn.wq_a.scale"
    first = first if first in found else next(names, None)
    return None if first is None else found[first][0]


def matched(
    table: Iterable[TensorSpec], found: Found, where: str, file_key: Callable[[str], str] = str
) -> list[TensorSpec]:
    """The table with the dtypes that were found; an error unless all of it fits."""
    specs, problems = [], []
    table = list(table)
    for spec in table:
        dtype, shape = found.get(spec.key, (None, None))
        key = file_key(spec.key)
        expected = f"expected {' or '.join(spec.dtypes)} {list(spec.shape)}"
        if dtype is None:
            problems.append(f"{key} is missing ({expected})")
        elif dtype not in spec.dtypes or shape != spec.shape:
            problems.append(f"{key} is {dtype} {quote(shape)} ({expected})")
        elif spec.dtypes != (dtype,):
            spec = spec._replace(dtypes=(dtype,))
        specs.append(spec)
    known = {spec.key for spec in table}
    for key in found:
        if key not in known:
            dtype, shape = found[key]
            found_as = f"{word(file_key(key))}, {dtype} {quote(shape)}"
            problems.append(f"{found_as}, is not a tensor of this model")
    if problems:
        shown = "; ".join(problems[:4]) + ("; ..." if len(problems) > 4 else "")
        raise InputError(
            f"{where}: {len(problems)} tensors do not fit config.json: {shown}. Check that config "
            "and weights are of the same checkpoint and that all of it is there"
        )
    return specs


def says_the_same(announced: ModelConfig, config: ModelConfig) -> bool:
    """Whether a config.json says what was found: it may call MTP blocks drafts, or the reverse."""
    blocks = (announced, config)
    counts = {len(each.mtp_layers) + each.draft_layers for each in blocks}
    alike = dataclasses.replace(
        announced,
        mtp_layers=config.mtp_layers,
        draft_layers=config.draft_layers,
        dspark=config.dspark,
    )
    return len(counts) == 1 and alike == config


def by_item(specs: Iterable[TensorSpec]) -> dict[str, list[TensorSpec]]:
    """The tensors of each item, in their order."""
    items = {}
    for spec in specs:
        items.setdefault(spec.item, []).append(spec)
    return items


def refuse_mixed(leaves: Mapping[tuple[str, ...], list[TensorSpec]], where: str, cure: str) -> None:
    """Raises where tensors that become one array are quantised in part.

    Args:
      leaves: the tensors of each array by its path; of quantised ones that ends in "values".
    """
    for path, specs in leaves.items():
        quantized = leaves.get((*path, "values"))
        if quantized:
            plain, other = specs[0], quantized[0]
            raise InputError(
                f"{where}: {plain.key} is {plain.dtypes[0]} and {other.key} {other.dtypes[0]}, and "
                f"they become one array; {cure}"
            )


def _count_blocks(config, found, where, notes):
    """The config with as many MTP or draft blocks as there are keys of them."""
    numbers = {int(m[1]) for key in found if (m := re.match(r"mtp\.(\d{1,9})\.", key))}
    count = len(numbers)
    if not count and config.draft_layers:
        raise InputError(
            f"{where}: config.json announces {config.draft_layers} draft blocks and the files hold "
            "no mtp.* tensors; get the missing files, or end compress_ratios with the last layer"
        )
    if numbers != set(range(count)):
        raise InputError(
            f"{where}: has blocks mtp.{quote(sorted(numbers))}; expected them to count from 0 "
            "without gaps"
        )
    drafts = any(re.match(r"mtp\.\d+\.main_(proj|norm)\.", key) for key in found)
    if drafts:
        announced = config.draft_layers or len(config.mtp_layers)
        if announced not in (count, 1):
            raise InputError(
                f"{where}: config.json announces {announced} blocks after the layers and the files "
                f"hold {count} draft blocks (mtp.0 to mtp.{count - 1}); get the missing files"
            )
        return dataclasses.replace(config, mtp_layers=(), draft_layers=count)
    if config.draft_layers:
        as_mtp = {"mtp_layers": (WINDOW,) * count, "draft_layers": 0, "dspark": None}
        return dataclasses.replace(config, **as_mtp)
    if len(config.mtp_layers) != count:
        notes.append(
            f"config.json announces {len(config.mtp_layers)} MTP blocks and the files hold "
            f"{count or 'none'}: the model has as many"
        )
        return dataclasses.replace(config, mtp_layers=(WINDOW,) * count)
    return config


def _carried(found, where):
    for key, (dtype, shape) in found.items():
        if key.startswith("mtp."):
            # Carried tensors are files by that name in our Orbax format.
            if not _CARRIED.fullmatch(key):
                raise InputError(
                    f"{where}: holds the tensor {quote(key)}; expected a name such as "
                    "mtp.0.attn.wq_a.weight, of letters, digits and _ between dots"
                )
            item = f"carried_{key.split('.')[1]}"
            yield TensorSpec(key, shape, (dtype,), item, ("carried", key), role="carried")
