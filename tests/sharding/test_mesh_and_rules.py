"""Meshes and tables: what fits, and what is said of what does not."""

import functools
import math
import re

import jax
import pytest
from jax.sharding import PartitionSpec as P

from tests.support import meshes
from v4jax import get_config
from v4jax.errors import InputError
from v4jax.model import sharded
from v4jax.model.transformer import Transformer
from v4jax.sharding.mesh import AXES, make_mesh, parse_sizes
from v4jax.sharding.rules import ONE_DEVICE, PREFILL, STRATEGIES, TRAIN, Layout, Strategy


def test_all_axes_are_always_there():
    mesh = make_mesh(expert=2, sequence=-1)
    assert mesh.shape == dict(zip(AXES, (1, 1, 2, 4, 1), strict=True))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"expert": 16}, "the mesh expert 16 needs 16 devices and there are 8"),
        ({"expert": 3, "data": -1}, "and there are 8"),
        ({"pipeline": 2}, "mesh axis 'pipeline' is unknown; expected some of data, fsdp"),
        ({"data": -1, "expert": -1}, "-1 (what remains) at most once"),
        ({"data": 0}, "expected sizes of 1 or more"),
    ],
)
def test_wrong_meshes(sizes, message):
    with pytest.raises(InputError, match=re.escape(message)):
        make_mesh(**sizes)


def test_sizes_as_text():
    assert parse_sizes("data=2,fsdp=4") == {"data": 2, "fsdp": 4}
    with pytest.raises(InputError, match=r"mesh has 'fsdp'; expected AXIS=N"):
        parse_sizes("data=2,fsdp")


def test_one_device_has_no_axes():
    assert ONE_DEVICE.axes("batch") == ()
    assert ONE_DEVICE.size("expert") == 1
    assert ONE_DEVICE.index("sequence") == 0


def test_specs():
    layout = Layout(make_mesh(fsdp=2, expert=2, tensor=2), TRAIN)
    assert layout.spec("expert", "mlp", "embed") == P(("expert",), ("tensor",), ("fsdp",))
    assert layout.gathered("embed") == ("fsdp",)
    assert layout.kept("expert") == ("expert",)


def test_axes_that_collide():
    table = (("batch", ("data",)), ("embed", ("data",)))
    layout = Layout(make_mesh(data=8), Strategy("mine", table))
    with pytest.raises(InputError, match="'batch' and 'embed' of one array both lie on mesh axis"):
        layout.spec("batch", "embed")


def test_sizes_that_do_not_divide():
    layout = Layout(make_mesh(fsdp=4, tensor=2), TRAIN)
    with pytest.raises(InputError, match=r"expert has size 6, .*expert=4 .*do not divide"):
        Layout(make_mesh(data=2, expert=4), PREFILL).check_divides({"expert": 6})
    model = Transformer(meshes.config(), sharding=layout)
    with pytest.raises(InputError, match=r"batch has size 3, which mesh axes fsdp=4 .*do not"):
        jax.eval_shape(model.apply, model.abstract_variables(), jax.numpy.zeros((3, 8), int))


@functools.cache
def abstract(name):
    return Transformer(get_config(name)).abstract_variables()


@pytest.mark.parametrize("name", ["flash", "pro"])
@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_released_models_lie_on_a_mesh(name, strategy):
    """No axes of a weight collide, and every part is a whole number."""
    config = get_config(name)
    layout = Layout(make_mesh(fsdp=2, expert=2, tensor=2), strategy)
    model = Transformer(config, sharding=layout)
    sharded.check(config, layout)
    shapes = abstract(name)
    places = sharded.variable_shardings(model)
    parts = jax.tree.map(lambda x, place: place.shard_shape(x.shape), shapes, places)
    total = sum(x.size for x in jax.tree.leaves(shapes["params"]))
    held = sum(
        math.prod(shape)
        for shape in jax.tree.leaves(parts["params"], is_leaf=lambda x: isinstance(x, tuple))
    )
    # Experts, nearly all of the parameters, are cut along every axis that is longer than 1.
    assert held < (0.14 if "train" in strategy.name else 0.17) * total
