"""Compile a step for a slice that is not here: memory, exchanges and time of each device.

Nothing runs on an accelerator and none is needed. Meshes that --search compiles are told on stderr;
the exit status is 1 where the step does not fit.
"""

import dataclasses
import json
import os
import sys

from absl import flags

from v4jax import extras
from v4jax.chips import CHIPS
from v4jax.cli import compilation_cache
from v4jax.errors import InputError
from v4jax.files.writing import writable_file, writing
from v4jax.hf.config import read_config
from v4jax.hf.tensors import WEIGHTS
from v4jax.named_configs import config_names, get_config
from v4jax.plan import environment

FLAGS = flags.FLAGS
DOES_NOT_FIT = 1


def define_flags():
    """Declares the flags of this subcommand."""
    flags.DEFINE_string("config", "flash", "A config's name, or a checkpoint's directory")
    flags.DEFINE_enum("mode", "decode", ["train", "prefill", "decode"], "What the step does")
    flags.DEFINE_integer("context", 131072, "Tokens of a row, or of its cache", lower_bound=1)
    flags.DEFINE_integer("batch", 1, "Rows", lower_bound=1)
    flags.DEFINE_string("topology", None, "CHIP:SHAPE, such as v5p:4x4x4; CHIP with --search")
    flags.DEFINE_string("mesh", None, "Sizes, such as data=1,fsdp=4; default: the best by hand")
    flags.DEFINE_bool("search", False, "Find the smallest slice, up to TOPOLOGY, and its best mesh")
    flags.DEFINE_integer("meshes", 3, "Meshes of a slice that --search compiles", lower_bound=1)
    flags.DEFINE_enum(
        "weights", None, WEIGHTS, "Their form (default: float32 to train, else stored)"
    )
    flags.DEFINE_enum(
        "numerics", None, ["native"], "native: the released rounding, and the cache as stored"
    )
    flags.DEFINE_integer("parts", None, "Microbatches of a training step", lower_bound=1)
    flags.DEFINE_integer("waves", 1, "Parts in which tokens go to their experts", lower_bound=1)
    compilation_cache.define_flag()
    flags.DEFINE_enum("format", "text", ["text", "json"], "json: one object on stdout")
    flags.DEFINE_string("picture", None, "PNG file to draw the plan into")


def run() -> int:
    """Plans, and prints the plan; the exit status."""
    if not FLAGS.topology:
        raise InputError("--topology is missing; expected CHIP:SHAPE, such as v5p:4x4x4")
    if FLAGS.search and FLAGS.mesh:
        raise InputError("--search and --mesh are both given; --search finds the mesh, drop one")
    if FLAGS.picture:  # before minutes of compiling
        extras.require("matplotlib", "plot", "--picture")
        writable_file(FLAGS.picture, "--picture", ".png")
    compilation_cache.begin()
    environment.prepare()
    from v4jax.plan import report  # imports jax, which reads the environment

    plan = _plan(_job())
    if FLAGS.picture:
        with writing(FLAGS.picture):
            report.draw(plan, FLAGS.config, FLAGS.picture)
    if FLAGS.format == "json":
        print(json.dumps({"config": FLAGS.config} | report.as_json(plan), indent=2))
    else:
        print(report.as_text(plan, FLAGS.config))
    return 0 if plan.fits else DOES_NOT_FIT


def _job():
    from v4jax.plan.job import Job

    weights = FLAGS.weights or ("float32" if FLAGS.mode == "train" else "stored")
    parts = FLAGS.parts or 1
    return Job(
        _config(),
        FLAGS.mode,
        FLAGS.context,
        FLAGS.batch,
        weights,
        parts,
        FLAGS.waves,
        FLAGS.numerics,
    )


def _config():
    if os.path.exists(FLAGS.config):
        return read_config(FLAGS.config)
    if FLAGS.config not in config_names():
        raise InputError(
            f"--config is {FLAGS.config[:200]!r}; expected a checkpoint's directory or one of "
            f"{', '.join(config_names())}"
        )
    return get_config(FLAGS.config)


def _plan(job):
    from v4jax.plan import plan, search, topology
    from v4jax.sharding.mesh import complete, parse_sizes

    if FLAGS.search:
        return search.search(job, _slices(), FLAGS.meshes, _tell)
    where = topology.parse(FLAGS.topology)
    if FLAGS.mesh is not None:
        sizes = complete(parse_sizes(FLAGS.mesh), where.count)
        parts = FLAGS.parts or search.microbatches(job, sizes)
        return plan.make_plan(dataclasses.replace(job, parts=parts), where, sizes)
    best = search.candidates(job, where)
    if not best:
        raise InputError(
            f"no mesh of {where.name} holds this by a count of bytes; choose a larger slice"
        )
    return plan.make_plan(best[0].job, where, best[0].sizes)


def _slices():
    """Slices of the kind of chip, the smallest first, up to the one that was named."""
    from v4jax.plan import topology

    kind, colon, _ = FLAGS.topology.partition(":")
    if kind in CHIPS and not colon:
        return topology.slices(kind)
    largest = topology.parse(FLAGS.topology)
    return [found for found in topology.slices(kind) if found.count <= largest.count]


def _tell(plan):
    from v4jax.plan import report

    seconds = plan.time.floor
    print(
        f"{plan.topology.name} {report.shown(plan.mesh)}: {report.verdict(plan)[:90]}; "
        f"{seconds:.4g} s a step",
        file=sys.stderr,
    )
