"""The tasks of `v4jax eval` for lm-eval: documents made from a seed, and their scores.

lm-eval loads this file by the YAML files beside it. What it makes is set with --metadata:
{"lengths": [4096], "samples": 20, "seed": 0, "tokenizer": "nano", "style": "plain"}.
"""

import json

from v4jax.errors import InputError
from v4jax.eval import graphwalks, mrcr, needle, ruler
from v4jax.eval.fit import TooShort
from v4jax.eval.sample import Prompt, Sample, Task
from v4jax.infer.tokenizer import Tokenizer


def tasks(style: str = "plain") -> dict[str, Task]:
    """All of them by name."""
    found = [needle.task(style), *ruler.tasks(), *(mrcr.task(n) for n in mrcr.NEEDLES)]
    return {task.name: task for task in (*found, *graphwalks.tasks())}


def documents(
    task, lengths=(4096,), samples=20, seed=0, tokenizer="nano", style="plain", **others
) -> list[dict]:
    """Samples of a task as lm-eval's documents.

    Args:
      task: its name. tokenizer: checkpoint whose tokenizer sizes the prompts.

    Raises:
      InputError: no length that the task fits into.
    """
    encode = Tokenizer(tokenizer).encode
    made, refused = [], None
    for length in lengths:
        for number in range(samples):
            try:
                sample = tasks(style)[task].make(
                    seed, number, length, None, lambda prompt: len(encode(_text(prompt)))
                )
            except TooShort as error:
                refused = error
                continue
            made.append(_document(task, style, length, sample))
    if not made:
        raise InputError(f"{task}: no sample; {refused or 'expected lengths and samples'}")
    return made


def _document(task, style, length, sample):
    return {
        "task": task,
        "style": style,
        "input": _text(Prompt(sample.prompt.messages)),
        "gen_prefix": sample.prompt.prefix,
        "expected": json.dumps(sample.expected),
        "length": length,
        "stop": list(sample.stop),
    }


def _text(prompt):
    """The prompt as one text; of a chat with who says what."""
    if len(prompt.messages) == 1:
        return prompt.text
    said = [f"{each['role'].capitalize()}: {each['content']}" for each in prompt.messages]
    return "\n\n".join([*said, "Assistant: "])


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """The score of one answer."""
    answer = results[0]
    for stop in doc["stop"]:
        answer = answer.split(stop)[0]
    sample = Sample(Prompt(()), json.loads(doc["expected"]), 0)
    return {"score": tasks(doc["style"])[doc["task"]].score(sample, answer)["score"]}


def _dataset(task):
    def make(**settings):
        from datasets import Dataset

        return {"test": Dataset.from_list(documents(task, **settings))}

    return make


# lm-eval finds them by name.
of_needle = _dataset("needle")
of_single_1 = _dataset("single_1")
of_single_2 = _dataset("single_2")
of_single_3 = _dataset("single_3")
of_multikey_1 = _dataset("multikey_1")
of_multikey_2 = _dataset("multikey_2")
of_multikey_3 = _dataset("multikey_3")
of_multivalue = _dataset("multivalue")
of_multiquery = _dataset("multiquery")
of_variables = _dataset("variables")
of_common_words = _dataset("common_words")
of_frequent_words = _dataset("frequent_words")
of_documents = _dataset("documents")
of_mrcr_2 = _dataset("mrcr_2")
of_mrcr_4 = _dataset("mrcr_4")
of_mrcr_8 = _dataset("mrcr_8")
of_walk_1 = _dataset("walk_1")
of_walk_2 = _dataset("walk_2")
of_walk_3 = _dataset("walk_3")
of_parents = _dataset("parents")
