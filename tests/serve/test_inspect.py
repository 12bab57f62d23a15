"""The real inspect_ai against the server on loopback, through its OpenAI provider."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from tests.support import servers

if importlib.util.find_spec("inspect_ai") is None:
    pytest.skip("inspect_ai is not installed: the extra serve-test has it", allow_module_level=True)

# Of tests/support/inspect_tasks.py, which only inspect_ai's own process imports.
QUESTIONS = ("What is the weather in Paris?", "def area(self, width):")


@pytest.fixture(scope="module")
def address(chat_engine, chat_directory):
    with servers.on_loopback(servers.serving(chat_engine, chat_directory)) as address:
        yield address


@pytest.fixture(scope="module")
def expected(address):
    """What the server answers to the questions by another client."""
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        return [
            client.chat.completions.create(
                model="nano", messages=[{"role": "user", "content": question}], max_tokens=12,
                temperature=0, extra_body={"thinking": {"type": "disabled"}},
            ).choices[0].message.content
            for question in QUESTIONS
        ]  # fmt: skip


@pytest.fixture(scope="module")
def logs(address, expected, tmp_path_factory):
    """All tasks, run as the command runs them; their logs by name."""
    folder = tmp_path_factory.mktemp("inspect")
    command = [sys.executable, "-m", "inspect_ai", "eval", "tests/support/inspect_tasks.py"]
    command += ["--model=openai-api/v4jax/nano", f"--log-dir={folder}", "--log-format=json"]
    names = {"V4JAX_BASE_URL": f"{address}/v1", "V4JAX_API_KEY": "none"}
    names |= {"V4JAX_ANSWERS": json.dumps(expected)}
    names |= {"INSPECT_CACHE_DIR": str(folder), "XDG_DATA_HOME": str(folder)}
    done = subprocess.run(
        [*command, "--display=none"], cwd=Path(__file__).parents[2], env=os.environ | names,
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    assert all(log["status"] == "success" for log in found), found
    return {log["eval"]["task"]: log for log in found}


def test_answers_are_those_of_the_server(logs, expected):
    log = logs["answers"]
    (score,) = log["results"]["scores"]
    assert score["metrics"]["accuracy"]["value"] == 1.0
    said = [sample["output"]["choices"][0] for sample in log["samples"]]
    assert [each["message"]["content"] for each in said] == expected
    assert all(each["stop_reason"] == "max_tokens" for each in said)
    assert all(len(each["logprobs"]["content"]) == 12 for each in said)
    (usage,) = log["stats"]["model_usage"].values()
    assert usage["output_tokens"] == 24 and usage["total_tokens"] == usage["input_tokens"] + 24


def test_a_tool_is_called_and_its_result_goes_back(logs):
    (sample,) = logs["calls"]["samples"]
    user, call, result, answer = sample["messages"][:4]
    assert [user["role"], call["role"], result["role"]] == ["user", "assistant", "tool"]
    (asked,) = call["tool_calls"]
    assert asked["function"] == "look_up" and asked["arguments"]["city"] in ("Paris", "Rome")
    assert result["tool_call_id"] == asked["id"]
    assert result["content"] == f"sunny in {asked['arguments']['city']}"
    assert answer["role"] == "assistant"


def test_thinking_comes_as_reasoning(logs):
    (sample,) = logs["thoughts"]["samples"]
    reasoning, text = sample["output"]["choices"][0]["message"]["content"]
    assert reasoning["type"] == "reasoning" and reasoning["reasoning"]
    assert text["text"] == ""
    (usage,) = sample["model_usage"].values()
    assert usage["reasoning_tokens"] == usage["output_tokens"] == 12
