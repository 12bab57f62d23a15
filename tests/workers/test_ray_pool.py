"""A Ray cluster of two nodes on this machine, one of which is killed in the middle."""

import os

import pytest

from tests.eval.descriptions import OfFake
from tests.eval.test_assignments import assigned, whole
from tests.eval.test_suite import RUN, told
from tests.workers.tasks import Doer
from v4jax.errors import InputError
from v4jax.eval import assignments, suites
from v4jax.eval.records import Records
from v4jax.workers.crew import Crew

ray = pytest.importorskip("ray", reason="the extra ray is not installed")
cluster_utils = pytest.importorskip("ray.cluster_utils")
pytestmark = [
    pytest.mark.slow,  # a cluster takes half a minute to start
    pytest.mark.filterwarnings("ignore"),  # ray's own
]
# A machine that is silent for two seconds is gone, and not after half a minute.
QUICK = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 4,
}
STORE = 80 << 20  # bytes of a node's object store


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    head = {"num_cpus": 2, "object_store_memory": STORE, "_system_config": QUICK}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
    cluster.second = cluster.add_node(num_cpus=2, object_store_memory=STORE, resources={"far": 1})
    cluster.wait_for_nodes()
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_actors_on_two_machines_of_which_one_is_killed(cluster):
    from v4jax.workers.ray_pool import RayPool

    said, found, killed = [], {}, []
    with pytest.raises(InputError, match="to have 64 GPU, and the whole Ray cluster has 0"):
        RayPool(Doer, 1, resources={"GPU": 64.0})
    with Crew(RayPool(Doer, 4), said.append) as crew:

        def done(task, value):
            assert task not in found
            found[task] = value
            if len(crew.alive) == 4 and len(found) >= 12 and not killed:
                killed.append(len(found))
                cluster.remove_node(cluster.second, allow_graceful=False)

        tasks = [("slow", 0.1 + i / 10_000) for i in range(150)]
        assert crew.run(tasks, done) == 0
        assert found.keys() == set(tasks)
        assert (
            killed[0] < 100 and len(said) == 2 and len(crew.alive) == 2
        )  # Ray spreads four actors over two nodes
        assert any("is done again by others" in each for each in said)
        with pytest.raises(InputError, match="^this is not to be done$"):
            crew.run([("refuse", "this")], done)
        with pytest.raises(RuntimeError, match="KeyError"):
            crew.run([("fail", "x")], done)
        with pytest.raises(InputError, match="no worker is left: of 4 .* process was killed"):
            crew.run([("die", 0)], done)


def test_a_suite_on_two_machines_of_which_one_is_killed(cluster, tmp_path):
    """The records of one process, none twice; and two workers that are killed besides."""
    from v4jax.workers.ray_pool import RayPool

    said, killed = [], []
    described = OfFake(str(tmp_path / "killed"), after=3, seconds=0.05)
    with (
        Records(tmp_path / "run", RUN) as records,
        Crew(RayPool(assignments.Evaluator, 4), said.append) as crew,
    ):

        def progress(record):
            if len(crew.alive) >= 3 and len(records.done) >= 6 and not killed:
                killed.append(len(records.done))
                cluster.remove_node(cluster.second, allow_graceful=False)

        settings = suites.Settings(lengths=(3000, 4000), samples=60, style="plain")
        assert assignments.run(assigned(described, settings), crew, records, progress) == 0
    assert killed and killed[0] < 120 and 2 <= len(said) <= 3
    assert (tmp_path / "run" / "records.jsonl").read_bytes().count(b"\n") == 120
    assert told(tmp_path / "run") == whole(tmp_path / "whole", settings)


def test_a_cluster_that_is_not_there_is_one_sentence(monkeypatch):
    from v4jax.workers.ray_pool import RayPool

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(InputError, match="Ray cluster .127.0.0.1:9. cannot be reached"):
        RayPool(Doer, 1)
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
