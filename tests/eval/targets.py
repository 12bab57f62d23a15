"""Targets without a model: a perfect one, and one that plays a conversation with tools."""

import json
import time

from v4jax.eval.sample import Answer


class Fake:
    """Answers by a function of the prompt; counts tokens as bytes."""

    def __init__(self, answer=lambda prompt, **options: "", style="plain", seconds=0.0):
        self.name, self.style, self.max_length = "fake", style, None
        self.identity = {"model": "fake", "style": style}
        self._answer, self._seconds = answer, seconds
        self.asked, self.closed = [], False

    def measure(self, prompt):
        return len(prompt.text.encode())

    def ask(self, prompt, max_new_tokens, stop=(), temperature=0.0, seed=0, shared=0):
        self.asked.append(prompt)
        time.sleep(self._seconds)
        found = self._answer(prompt, temperature=temperature, seed=seed)
        if isinstance(found, Answer):
            return found
        return Answer(
            text=found,
            prompt_tokens=self.measure(prompt),
            output_tokens=len(found),
            seconds=0.25,
            first_token_seconds=0.125,
            finish="stop",
        )

    def ask_tokens(
        self, tokens, max_new_tokens, stop=(), temperature=0.0, seed=0, keep=(), ends=True, salt=""
    ):
        times = [(0.1 + 0.01 * i, 1) for i in range(max_new_tokens)]
        return Answer(
            text="",
            prompt_tokens=len(tokens),
            output_tokens=max_new_tokens,
            seconds=times[-1][0],
            first_token_seconds=times[0][0],
            times=times,
        )

    vocab_size = 100

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode()

    def resize(self, slots):
        pass

    def warm_up(self):
        return 0.0

    def close(self):
        self.closed = True


def needle_reader(prompt, **options):
    """What a model says that finds the prose needle."""
    text = prompt.text
    key = text.rsplit("for ", 1)[1].split(" in the text is")[0]
    return " " + text.split(f"for {key} is: ")[1].split(".")[0]


class Caller:
    """A model that obeys a chain of tools; `wrong(turn)` may spoil the arguments of a turn."""

    def __init__(self, wrong=lambda turn, arguments: arguments):
        self._wrong = wrong

    def __call__(self, prompt, **options):
        last = prompt.messages[-1]
        turn = sum(message["role"] == "assistant" for message in prompt.messages)
        if '"' not in last["content"]:
            return "no tool is for that"
        if last["role"] == "user":
            name, code = last["content"].split()[1], last["content"].split('"')[1]
        else:
            result = json.loads(last["content"])
            if "next" not in result:
                return Answer(text=str(result.get("value", "I do not know")), finish="stop")
            name, code = result["next"], result["code"]
        arguments = self._wrong(turn, {"code": code})
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        return Answer(
            calls=[{"id": f"c{turn}", "name": name, "arguments": text}],
            prompt_tokens=10,
            output_tokens=5,
            seconds=0.5,
            first_token_seconds=0.25,
            finish="tool_calls",
        )
