"""Small checkpoints on disk, for tests."""

import dataclasses
import importlib.util
import json
import struct
from pathlib import Path

import jax
import numpy as np
import pytest

from v4jax.config import CSA, HCA, WINDOW, ModelConfig, with_hash_routing
from v4jax.files.safetensors import INDEX_NAME, NUMPY_DTYPES, NewTensor, write_safetensors
from v4jax.named_configs import get_config
from v4jax.quant import QTensor

_TOOL = Path(__file__).resolve().parents[2] / "tools" / "make_synthetic_checkpoint.py"


def small_config(name: str = "flash_tiny", **changes) -> ModelConfig:
    """Every layer kind, six layers and an MTP block, in the stored form of a named config."""
    layers = with_hash_routing((WINDOW,) + (CSA, HCA) * 2 + (CSA,), 1)
    return dataclasses.replace(get_config(name), **({"layers": layers} | changes))


def synthetic(directory, config: ModelConfig | None = None, seed: int = 0) -> str:
    """Writes random weights in the official layout with the repository's own tool."""
    spec = importlib.util.spec_from_file_location("make_synthetic_checkpoint", _TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    tool.write_checkpoint(config or small_config(), str(directory), seed)
    return str(directory)


def tensors(directory) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Key -> dtype, shape and bytes of every safetensors tensor, read without v4jax."""
    found = {}
    for path in sorted(Path(directory).glob("model*.safetensors")):
        raw = path.read_bytes()
        size = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + size])
        header.pop("__metadata__", None)
        for key, field in header.items():
            start, stop = (8 + size + offset for offset in field["data_offsets"])
            found[key] = (field["dtype"], tuple(field["shape"]), raw[start:stop])
    return found


def files(directory) -> dict[str, bytes]:
    """Relative path -> content of every file of a directory."""
    root = Path(directory)
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def add_tensors(directory, new: dict[str, tuple[str, np.ndarray]], file: str) -> None:
    """Adds a safetensors file to a checkpoint and names its tensors in the index."""
    specs = [NewTensor(key, dtype, array.shape) for key, (dtype, array) in new.items()]

    def fill(key, out):
        out[...] = new[key][1].astype(NUMPY_DTYPES[new[key][0]])

    write_safetensors(Path(directory) / file, specs, fill)
    change_index(directory, lambda weight_map: weight_map.update(dict.fromkeys(new, file)))


def rewrite(directory, change) -> None:
    """Lets `change(key, dtype, array)` give new (dtype, array) pairs, or None to drop a tensor."""
    index = json.loads((Path(directory) / INDEX_NAME).read_text())["weight_map"]
    stored = tensors(directory)
    for file in sorted(set(index.values())):
        new = {}
        for key, name in index.items():
            dtype, shape, raw = stored[key]
            if name == file:
                array = np.frombuffer(raw, NUMPY_DTYPES[dtype]).reshape(shape)
                new[key] = change(key, dtype, array)
        kept = {key: pair for key, pair in new.items() if pair is not None}
        gone = new.keys() - kept.keys()
        change_index(directory, lambda weight_map, gone=gone: [weight_map.pop(k) for k in gone])
        add_tensors(directory, kept, file)


def change_index(directory, change) -> None:
    """Applies a function to the index's weight_map, in place."""
    path = Path(directory) / INDEX_NAME
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def change_config(directory, **changes) -> None:
    """Sets keys of config.json; None removes one."""
    path = Path(directory) / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def add_drafts(directory, blocks: int = 3, announced: int = 3) -> dict[str, tuple[str, np.ndarray]]:
    """Makes a checkpoint without MTP one with DSpark draft blocks, as the 0731 release has them."""
    rng = np.random.default_rng(7)
    new = {}
    for k in range(blocks):
        stem = f"mtp.{k}."
        new[stem + "main_proj.weight"] = ("F8_E4M3", rng.uniform(-2, 2, (64, 192)))
        new[stem + "main_proj.scale"] = ("F8_E8M0", 2.0 ** rng.integers(-9, 0, (1, 2)))
        new[stem + "main_norm.weight"] = ("BF16", rng.standard_normal(64))
        new[stem + "attn.attn_sink"] = ("F32", rng.standard_normal(4))
        new[stem + "ffn.experts.0.w1.weight"] = ("I8", rng.integers(-128, 128, (32, 32)))
        new[stem + "ffn.experts.0.w1.scale"] = ("F8_E8M0", 2.0 ** rng.integers(-9, 0, (32, 2)))
    last = f"mtp.{blocks - 1}."
    new[last + "markov_head.markov_w1.weight"] = ("BF16", rng.standard_normal((16, 512)))
    new[last + "hc_head_fn"] = ("F32", rng.standard_normal((4, 256)))
    add_tensors(directory, new, "model-drafts.safetensors")
    config = json.loads((Path(directory) / "config.json").read_text())
    ratios = config["compress_ratios"][: config["num_hidden_layers"]] + [0] * announced
    change_config(directory, compress_ratios=ratios, num_nextn_predict_layers=1)
    return new


def is_quantized(leaf):
    return isinstance(leaf, QTensor)


def shapes(tree):
    """Logical shapes by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_quantized)
    return {jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in leaves}


def transformers_model(seed=0, **changes):
    """A random `DeepseekV4ForCausalLM` with every kind of layer; skips where there is no torch."""
    torch = pytest.importorskip("torch")
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 96, "hidden_size": 32, "moe_intermediate_size": 24, "num_hidden_layers": 4,
        "num_attention_heads": 4, "head_dim": 16, "q_lora_rank": 12, "num_experts_per_tok": 2,
        "n_routed_experts": 5, "partial_rotary_factor": 0.5, "o_groups": 2, "o_lora_rank": 6,
        "index_n_heads": 3, "index_head_dim": 8, "index_topk": 4, "sliding_window": 8,
        "max_position_embeddings": 256,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "layer_types": [
            "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention",
            "compressed_sparse_attention",
        ],
        "mlp_layer_types": ["hash_moe", "hash_moe", "moe", "moe"],
    }  # fmt: skip
    model = DeepseekV4ForCausalLM(DeepseekV4Config(**(sizes | changes)))
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape) * 0.1)
    return model
