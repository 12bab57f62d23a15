"""The tasks as lm-eval takes them: a file a task, documents from a seed, the same scores."""

import json
import re
from pathlib import Path

import pytest

from tests.eval.test_tasks import oracle
from v4jax.errors import InputError
from v4jax.eval.lm_eval_tasks import generators
from v4jax.eval.sample import Prompt, Sample

FOLDER = Path(generators.__file__).parent
NAMES = sorted(generators.tasks())


def test_every_task_has_its_file():
    files = {path.stem.removeprefix("v4jax_"): path.read_text() for path in FOLDER.glob("*.yaml")}
    assert sorted(files) == NAMES
    for name, text in files.items():
        (function,) = re.findall(r"custom_dataset: !function generators\.(\w+)", text)
        assert function == f"of_{name}" and hasattr(generators, function)
        assert f"task: v4jax_{name}\n" in text and "include: base\n" in text
    assert "process_results: !function generators.process_results" in (FOLDER / "base").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_an_oracle_is_right(name):
    (doc,) = generators.documents(name, lengths=(4096,), samples=1)
    expected = json.loads(doc["expected"])
    answer = oracle(generators.tasks()[name], Sample(Prompt(()), expected, 0))
    assert generators.process_results(doc, [answer]) == {"score": 1.0}
    assert generators.process_results(doc, [""]) == {"score": 0.0}
    budget = re.search(r"max_gen_toks: (\d+)", (FOLDER / f"v4jax_{name}.yaml").read_text())[1]
    assert int(budget) >= 30


def test_documents_are_as_asked():
    docs = generators.documents("single_2", lengths=(2048, 3000), samples=2, seed=3)
    assert [doc["length"] for doc in docs] == [2048, 2048, 3000, 3000]
    assert docs == generators.documents("single_2", lengths=(2048, 3000), samples=2, seed=3)
    with pytest.raises(InputError, match="single_2: no sample; .*expected a length of"):
        generators.documents("single_2", lengths=(100,))


def test_lm_eval_runs_them():
    pytest.importorskip("lm_eval")
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    class Oracle(LM):
        loglikelihood = loglikelihood_rolling = None

        def generate_until(self, requests):
            made = [json.loads(each.doc["expected"]) for each in requests]
            return [" " + ", ".join(each) for each in made]

    manager = TaskManager(
        include_path=str(FOLDER), include_defaults=False, metadata={"lengths": [3000], "samples": 1}
    )
    tasks = ["v4jax_needle", "v4jax_variables"]
    found = simple_evaluate(Oracle(), tasks=tasks, task_manager=manager, bootstrap_iters=0)
    assert [found["results"][task]["score,none"] for task in tasks] == [1.0, 1.0]
