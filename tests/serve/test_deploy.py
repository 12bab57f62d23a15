"""The templates: rendered, read as what they are, and held against the flags that there are."""

import json
import re
import subprocess

import pytest
import yaml

from v4jax.cli import main as main_module
from v4jax.errors import InputError
from v4jax.serve import deploy
from v4jax.serve.metrics import Metrics

FLAGS_OF_SERVE = re.compile(r"--([a-z_]+)=?")


def serve_flags(capsys):
    main_module.main(["v4jax", "serve", "--help"])
    return set(re.findall(r"^  --(\w+)", capsys.readouterr().out, re.MULTILINE))


def documents(name, **values):
    return list(yaml.safe_load_all(deploy.render(name, **values)))


def test_every_template_has_its_values_and_flags_that_there_are(capsys):
    known = serve_flags(capsys)
    others = {"job", "nodes", "ntasks", "gpus", "signal", "output", "kill", "create", "name"}
    others |= {"endpoints", "no", "interval", "timeout", "start", "uid", "help"}
    for name in deploy.names():
        text = deploy.render(name)
        assert "${" not in text
        assert set(FLAGS_OF_SERVE.findall(text)) - others <= known, name


def containers(document):
    """The containers of a pod's template, wherever it lies."""
    if isinstance(document, dict):
        for key, value in document.items():
            if key == "containers":
                yield from value
            else:
                yield from containers(value)
    elif isinstance(document, list):
        for each in document:
            yield from containers(each)


KINDS = {"leaderworkerset.yaml": ("LeaderWorkerSet", 2), "jobset.yaml": ("JobSet", 1)}


@pytest.mark.parametrize("name", KINDS)
def test_kubernetes(name):
    kind, pods = KINDS[name]
    workload, service = documents(name, nodes="4", port="9000", keys="/k/keys.json")
    assert workload["kind"] == kind and service["kind"] == "Service"
    found = list(containers(workload))
    assert len(found) == pods
    for container in found:
        assert container["args"][0] == "serve" and "--port=9000" in container["args"]
        mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
        assert mounts["keys"] == "/k"
        assert set(mounts) == {"checkpoint", "keys", "audit"}
    spec = workload["spec"]
    if kind == "LeaderWorkerSet":
        assert spec["leaderWorkerTemplate"]["size"] == 4
        assert found[0]["readinessProbe"]["httpGet"] == {"path": "/health", "port": 9000}
        assert "--process_id=$(LWS_WORKER_INDEX)" in found[1]["args"]
    else:
        job = spec["replicatedJobs"][0]["template"]["spec"]
        assert job["parallelism"] == job["completions"] == 4
        pod = job["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] > 120


def test_slurm(tmp_path):
    text = deploy.render("slurm.sbatch", nodes="3", drain_seconds="30")
    assert "#SBATCH --nodes=3" in text and "--drain_seconds 30" in text
    path = tmp_path / "serve.sbatch"
    path.write_text(text)
    assert subprocess.run(["bash", "-n", path]).returncode == 0


def test_docker():
    text = deploy.render("Dockerfile", accelerator_extra="tpu")
    words = [line.split()[0] for line in text.splitlines() if line and line[0] not in "# "]
    assert words[0] == "FROM" and "USER" in words and words[-2:] == ["ENTRYPOINT", "CMD"]
    assert json.loads(text.splitlines()[-1].removeprefix("CMD ")) == [
        *("serve", "--checkpoint=nano", "--port=8000")
    ]
    assert "[serve,chat,tpu]" in text


def test_compose_and_what_it_mounts():
    (compose,) = documents("compose.yaml")
    services = compose["services"]
    mounted = [each.split(":")[0] for name in services for each in services[name]["volumes"]]
    local = {each.removeprefix("./") for each in mounted if each.startswith("./")}
    assert local - {"metrics_key"} <= set(deploy.names())
    assert set(compose["volumes"]) <= set(mounted)
    (prometheus,) = documents("prometheus.yml", port="9000")
    assert prometheus["scrape_configs"][0]["static_configs"][0]["targets"] == ["v4jax:9000"]
    assert documents("grafana_source.yaml")[0]["datasources"][0]["uid"] == "prometheus"
    assert documents("grafana_folder.yaml")[0]["providers"]


def test_the_dashboard_draws_every_metric_and_no_other():
    stats = {"queue_depth": 0, "slots_busy": 0, "accepted_at": [1], "rounds": 1, "compilations": 0}
    stats |= {"step_seconds": {"read": (1, 0.5)}}
    text = Metrics(lambda: stats).text().decode()
    known = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    known = {name for name in known if not name.endswith("_created")}
    dashboard = json.loads(deploy.render("dashboard.json"))
    queries = " ".join(
        target["expr"] for panel in dashboard["panels"] for target in panel["targets"]
    )
    found = set(re.findall(r"[a-z]+_[a-z_]+", queries)) - {"histogram_quantile", "group_left"}
    found = {re.sub(r"_(bucket|sum|count)$", "", name) for name in found}
    assert found == known
    places = [tuple(panel["gridPos"][key] for key in "xy") for panel in dashboard["panels"]]
    assert len(set(places)) == len(places) == 12


def test_wrong_values_are_refused(capsys):
    for values in ({"colour": "red"}, {"name": "a\nb"}, {"name": ""}, {"image": "$(rm x)"}):
        with pytest.raises(InputError):
            deploy.render("compose.yaml", **values)
    with pytest.raises(InputError, match="whole seconds"):
        deploy.render("compose.yaml", drain_seconds="soon")
    with pytest.raises(InputError, match="no template"):
        deploy.render("../deploy.py")
    assert deploy.main(["prometheus.yml", "port=9000"]) == 0
    assert "v4jax:9000" in capsys.readouterr().out
    assert deploy.main(["prometheus.yml", "port"]) == deploy.main([]) == 2
