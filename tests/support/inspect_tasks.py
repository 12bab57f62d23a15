"""Tasks that `inspect eval` runs against a server; see tests/serve/test_inspect.py."""

import json
import os
from typing import Literal

from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, use_tools
from inspect_ai.tool import ToolFunction, tool

QUESTIONS = ("What is the weather in Paris?", "def area(self, width):")
NO_THINKING = {"thinking": {"type": "disabled"}}


@task
def answers() -> Task:
    """Questions without thinking; the environment has the right answers."""
    samples = zip(QUESTIONS, json.loads(os.environ["V4JAX_ANSWERS"]), strict=True)
    return Task(
        dataset=[Sample(input=each, target=target) for each, target in samples],
        solver=generate(),
        scorer=includes(),
        config=GenerateConfig(
            temperature=0, max_tokens=12, logprobs=True, top_logprobs=2, extra_body=NO_THINKING
        ),
    )


@tool
def look_up():
    async def execute(city: Literal["Paris", "Rome"]) -> str:
        """Looks up the weather of a city.

        Args:
            city: Its name.
        """
        return f"sunny in {city}"

    return execute


@task
def calls() -> Task:
    """A call that has to come; inspect makes it and sends its result back for an answer."""
    return Task(
        dataset=[Sample(input=QUESTIONS[0], target="")],
        solver=[use_tools(look_up(), tool_choice=ToolFunction("look_up")), generate()],
        scorer=includes(),
        config=GenerateConfig(temperature=0, max_tokens=300, extra_body=NO_THINKING, seed=1),
        message_limit=6,
    )


@task
def thoughts() -> Task:
    """With thinking, streamed."""
    return Task(
        dataset=[Sample(input=QUESTIONS[0], target="")],
        solver=generate(),
        scorer=includes(),
        config=GenerateConfig(temperature=0, max_tokens=12),
    )
