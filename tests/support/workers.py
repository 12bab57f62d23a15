"""What the processes of `test_processes` do; each prints one JSON line, from process 0."""

import json
import os
import time
from unittest import mock

import jax
import numpy as np

from v4jax.checkpoints import load as checkpoint
from v4jax.files import regions
from v4jax.sharding import processes
from v4jax.sharding.mesh import make_mesh
from v4jax.sharding.rules import STRATEGIES, Layout


def layout_on(strategy: str, sizes: str) -> Layout:
    return Layout(make_mesh(**json.loads(sizes)), STRATEGIES[strategy])


def in_turn(parts: str):
    """One function below after the other, by JSON `{name: [function, *arguments]}`.

    Process 0 says each one's name before. To join takes longer than what most of them do.
    """
    for name, (function, *arguments) in json.loads(parts).items():
        print(PART + name)
        globals()[function](*arguments)


PART = "--- "


def said(stdout: str) -> dict[str, str]:
    """What process 0 printed in each part that it began."""
    return dict(part.split("\n", 1) for part in stdout.split(PART)[1:])


def load(path, strategy, sizes, weights):
    """Loads; prints the bytes that each process read and its devices hold, and what is wrong."""
    read = []
    real = os.preadv

    def preadv(fd, buffers, offset):
        read.append(real(fd, buffers, offset))
        return read[-1]

    with mock.patch.object(regions.os, "preadv", preadv):
        _, variables = checkpoint.load(path, weights=weights, shards=layout_on(strategy, sizes))
    count = sum(read)
    _, expected = checkpoint.load(path, weights=weights)
    held = right = 0
    for ours, theirs in zip(jax.tree.leaves(variables), jax.tree.leaves(expected), strict=True):
        whole = np.asarray(theirs)
        parts = {str(shard.index): shard for shard in ours.addressable_shards}
        # Token tables are twice as wide in the files.
        wide = 2 if ours.dtype == np.int32 else 1
        held += wide * sum(shard.data.nbytes for shard in parts.values())
        right += all(_same(shard.data, whole[shard.index]) for shard in parts.values())
    leaves = len(jax.tree.leaves(expected))
    found = processes.gathered({"read": count, "held": held, "wrong": leaves - right})
    print(json.dumps(found))


def restore(path, strategy, sizes):
    """Loads onto a mesh, saves through Orbax, restores onto another: equal in every part."""
    import orbax.checkpoint as ocp

    _, variables = checkpoint.load(path + "/official", shards=layout_on("prefill", '{"expert": 4}'))
    target = layout_on(strategy, sizes)
    from v4jax.model import sharded
    from v4jax.model.transformer import Transformer

    with checkpoint.open_checkpoint(path + "/official") as source:
        model = Transformer(source.config, sharding=target)
    shardings = sharded.variable_shardings(model)

    def wanted(sharding, leaf):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), leaf
        )

    abstract = jax.tree.map(wanted, shardings, variables)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path + "/saved", variables)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(path + "/saved", abstract)
    _, again = checkpoint.load(path + "/official", shards=target)
    wrong = 0
    for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(again), strict=True):
        assert ours.sharding == theirs.sharding
        pairs = zip(ours.addressable_shards, theirs.addressable_shards, strict=True)
        wrong += not all(_same(a.data, b.data) for a, b in pairs)
    print(json.dumps(processes.gathered({"wrong": wrong, "held": _held(restored)})))


def _held(tree):
    return sum(
        shard.data.nbytes for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards
    )


def _same(ours, theirs):
    ours, theirs = (np.ascontiguousarray(x) for x in (ours, theirs))
    return ours.dtype == theirs.dtype and ours.tobytes() == theirs.tobytes()


def disagree():
    fields = {"config": {"layers": 4, "width": 64 + 2 * (processes.index() == 1)}, "name": "x"}
    processes.agree("the config", fields)


def speak():
    """Every process prints; then a sum over all of their devices."""
    print(f"hello from {processes.index()}")
    mesh = make_mesh(data=-1)
    x = jax.make_array_from_callback(
        (jax.device_count(),),
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")),
        lambda index: np.ones(1, np.float32),
    )
    print("sum", float(jax.jit(lambda x: x.sum())(x)))


def rows(mesh: str):
    """Which rows of a batch of 8 each process takes."""
    from v4jax.train import placement

    own = placement.own_rows(placement.layout_of(mesh), 8)
    print(json.dumps(processes.gathered([own.start, own.stop])))


def fail(process: str):
    """One process meets bad input while the others go on to a collective."""
    from v4jax.errors import InputError

    processes.barrier("all here")
    if processes.index() == int(process):
        raise InputError("the file is bad")
    processes.barrier("never")


def die(process: str, way: str):
    """One dies without a word while the others compute together, wait for its program or sleep."""
    import signal

    processes.barrier("all here")
    if processes.index() == int(process):
        os.kill(os.getpid(), signal.SIGKILL)
    if way == "sleep":
        time.sleep(600)
    if way == "compile":
        processes.compiled()
    for step in range(10**6):
        processes.barrier(f"step {step}")
