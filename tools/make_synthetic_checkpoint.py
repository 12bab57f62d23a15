"""Writes a checkpoint of random weights in the official format, of any size, a tensor at a time.

python tools/make_synthetic_checkpoint.py --config flash --layers 1 --target flash-1

Bytes are random in their valid ranges and scales are chosen so that each matrix keeps the size of
its input: activations stay finite through any number of layers. The same seed gives the same bytes.
"""

import dataclasses
import os
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from absl import app, flags

from v4jax.checkpoints.source import by_item
from v4jax.checkpoints.target import FolderTarget, config_json
from v4jax.config import ModelConfig
from v4jax.errors import InputError
from v4jax.files.safetensors import bytes_of
from v4jax.hf.tensors import TensorSpec, tensor_table
from v4jax.named_configs import get_config

# Root mean squares of the codes drawn below.
_FP4_RMS = 2.93  # all 16 codes alike
_FP8_RMS = 1.28  # magnitudes of 0.5 to 1.875
_FLOAT_RMS = 1.53  # magnitudes of 1 to 2


def write_checkpoint(config: ModelConfig, target: str, seed: int = 0, threads: int = 4) -> int:
    """Writes the checkpoint and returns its bytes.

    Args:
      config: sizes, layers and stored form.
      target: a directory without a checkpoint.
    """
    items = by_item(tensor_table(config))
    specs = {spec.key: spec for specs in items.values() for spec in specs}
    writer = FolderTarget(target, items)
    if os.path.isdir(target) and os.listdir(target):
        raise InputError(f"{target}: is not empty; choose a new directory")
    os.makedirs(target, exist_ok=True)

    def fill(key, out):
        draw(specs[key], config, seed, out)

    checksums = {}
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            checksums |= writer.write_item(item, fill, pool)
    writer.finish(config_json(config), "stored", checksums)
    return sum(spec.nbytes for spec in specs.values())


def draw(spec: TensorSpec, config: ModelConfig, seed: int, out: np.ndarray) -> None:
    """Fills `out` with the random content of one tensor."""
    rng = np.random.default_rng([seed, zlib.crc32(spec.key.encode())])
    dtype = spec.dtypes[0]
    if spec.role == "table":
        out[...] = _distinct_experts(rng, spec.shape, config.n_routed_experts)
    elif spec.role == "scale":
        out[...] = _scales(rng, spec, config)
    elif dtype == "I8":
        bytes_of(out)[...] = _random_bytes(rng, out.nbytes)
    elif dtype == "F8_E4M3":
        # Sign, exponent 6 or 7 of a bias of 7, any mantissa.
        bytes_of(out)[...] = (_random_bytes(rng, out.nbytes) & 0x8F) | 0x30
    elif spec.role == "norm":
        out[...] = 1
    elif spec.role == "control":
        out[...] = 0.02 * rng.standard_normal(spec.shape, np.float32)
    else:
        _floats(rng, spec, out)


def _random_bytes(rng, count):
    return np.frombuffer(rng.bytes(count), np.uint8)


def _scales(rng, spec, config):
    """Powers of two, half of them twice the others, for matrices that keep their input's size."""
    packed = spec.expert is not None and config.expert_dtype == "fp4"
    channels = spec.shape[1] * (32 if packed else 128)
    exponent = round(np.log2(1 / ((_FP4_RMS if packed else _FP8_RMS) * channels**0.5)))
    exponents = exponent - rng.integers(0, 2, spec.shape)
    if spec.dtypes[0] == "F8_E8M0":
        return (exponents + 127).astype(np.uint8)
    return np.ldexp(np.float32(1), exponents)


def _floats(rng, spec, out):
    """Random bits with a fixed exponent: as good as normal numbers and much faster."""
    exponent = round(np.log2(1 / (_FLOAT_RMS * spec.shape[-1] ** 0.5))) + 127
    high = np.frombuffer(rng.bytes(2 * out.size), np.uint16).reshape(out.shape)
    high = (high & 0x807F) | (exponent << 7)
    if out.dtype.itemsize == 2:
        out.view(np.uint16)[...] = high
    else:
        out.view(np.uint32)[...] = high.astype(np.uint32) << 16


def _distinct_experts(rng, shape, experts):
    tokens, choices = shape
    first = rng.integers(0, experts, (tokens, 1))
    step = rng.integers(1, max(2, experts // choices + 1), (tokens, 1))
    return (first + step * np.arange(choices)) % experts


def main(_):
    config = get_config(FLAGS.config)
    layers = config.layers[: FLAGS.layers] if FLAGS.layers else config.layers
    mtp_layers = config.mtp_layers if FLAGS.mtp else ()
    config = dataclasses.replace(config, layers=layers, mtp_layers=mtp_layers)
    started = time.monotonic()
    try:
        nbytes = write_checkpoint(config, FLAGS.target, FLAGS.seed)
    except (InputError, OSError) as error:
        print(f"make_synthetic_checkpoint: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {nbytes:,} bytes in {time.monotonic() - started:.1f} s: {FLAGS.target}")


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_string("config", "flash", "Name of a config")
    flags.DEFINE_string("target", None, "New directory", required=True)
    flags.DEFINE_integer("layers", 0, "Keep only so many layers; 0: all")
    flags.DEFINE_boolean("mtp", False, "Write the MTP blocks too")
    flags.DEFINE_integer("seed", 0, "The same seed gives the same bytes")
    app.run(main)
