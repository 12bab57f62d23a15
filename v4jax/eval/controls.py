"""Data controls of a server: access, logging, retention, deletion, and tenants that stay apart.

Each check is a pass or a fail with what was seen. A check that needs something which was not given
(another tenant's key, the audit log's directory) has no score and says what it needs.
"""

import dataclasses
import json
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from v4jax.eval.http_client import Client, Refused
from v4jax.eval.suite import Job

WAIT = 5.0  # seconds in which a line must be in the log
LONG = 1200  # words of a prompt that fills several pages of a prefix cache
Outcome = tuple[bool | None, str, str]  # passed (None: not checked), seen, expected


@dataclasses.dataclass(frozen=True)
class Controlled:
    """A server and what its operator gives for the checks.

    Attributes:
      other_key: of another tenant. limited_key: one that may not use completions.
      audit: directory of the audit log. retention: "none", "metadata" or "full".
    """

    client: Client
    model: str
    key: str | None = None
    other_key: str | None = None
    limited_key: str | None = None
    audit: Path | None = None
    retention: str = "metadata"


def jobs(server: Controlled) -> list[Job]:
    """All checks, in an order in which none disturbs another."""
    checks: dict[str, Callable[[Controlled], Outcome]] = {
        "access_with_key": access_with_key,
        "access_without_key": access_without_key,
        "access_wrong_key": access_wrong_key,
        "access_scope": access_scope,
        "logging_every_request": logging_every_request,
        "logging_no_secrets": logging_no_secrets,
        "retention_of_text": retention_of_text,
        "errors_without_text": errors_without_text,
        "tenants_apart": tenants_apart,
        "deletion_by_request": deletion_by_request,
    }
    return [Job(name, 0, 0, _Check(check, server)) for name, check in checks.items()]


@dataclasses.dataclass(frozen=True)
class _Check:
    check: Callable[[Controlled], Outcome]
    server: Controlled

    def __call__(self, target: Any) -> dict[str, Any]:
        began = time.perf_counter()
        try:
            passed, seen, expected = self.check(self.server)
        except Refused as error:
            passed, seen, expected = False, str(error), "an answer"
        return {
            "seconds": round(time.perf_counter() - began, 6),
            "answer": seen,
            "expected": expected,
            "score": None if passed is None else float(passed),
        }


def access_with_key(server: Controlled) -> Outcome:
    status, *_ = _ask(server, "one")
    return status == 200, f"status {status}", "status 200 with the key"


def access_without_key(server: Controlled) -> Outcome:
    if server.key is None:
        return None, "no key was given", "status 401 without a key: give --api_key"
    status, *_ = _ask(server, "one", key=None)
    return status == 401, f"status {status}", "status 401 without a key"


def access_wrong_key(server: Controlled) -> Outcome:
    if server.key is None:
        return None, "no key was given", "status 401 with a wrong key: give --api_key"
    status, *_ = _ask(server, "one", key="v4jax-" + secrets.token_hex(16))
    return status == 401, f"status {status}", "status 401 with a key that nobody has"


def access_scope(server: Controlled) -> Outcome:
    if server.limited_key is None:
        return None, "no limited key was given", "status 403: give --limited_key"
    status, *_ = _ask(server, "one", key=server.limited_key)
    return status == 403, f"status {status}", "status 403 with a key of another scope"


def logging_every_request(server: Controlled) -> Outcome:
    if server.audit is None:
        return None, "no audit log was given", "a line a request: give --audit"
    if server.retention == "none":
        return not _log(server), f"{len(_log(server))} lines", "no line at retention none"
    _, headers, _ = _ask(server, "logged")
    request = headers.get("x-request-id", "")
    line = _line_of(server, request)
    if line is None:
        return False, f"no line with the request's id {request!r}", "a line with its id"
    named = [name for name in ("time", "key", "endpoint", "status") if name in line]
    return len(named) == 4, f"a line with {', '.join(line)}", "time, key, endpoint, status, ..."


def logging_no_secrets(server: Controlled) -> Outcome:
    if server.audit is None or server.key is None:
        return None, "no audit log or key was given", "no key in it: give --audit and --api_key"
    found = [key for key in (server.key, server.other_key) if key and key in _log_text(server)]
    return not found, f"{len(found)} keys in the log", "no key in the log"


def retention_of_text(server: Controlled) -> Outcome:
    if server.audit is None:
        return None, "no audit log was given", "text in the log as retention says: give --audit"
    canary = "canary" + secrets.token_hex(8)
    _, headers, _ = _ask(server, canary)
    if server.retention != "none":
        _line_of(server, headers.get("x-request-id", ""))
    there = canary in _log_text(server)
    wanted = server.retention == "full"
    seen = f"the prompt's text is {'in' if there else 'not in'} the log"
    return there == wanted, seen, f"{'in' if wanted else 'not in'} it at {server.retention}"


def errors_without_text(server: Controlled) -> Outcome:
    canary = "canary" + secrets.token_hex(8)
    body = {"model": server.model, "prompt": canary, "max_tokens": "many"}
    status, _, text = server.client.exchange("/completions", body)
    there = canary in text
    seen = f"status {status}, the prompt's text {'is' if there else 'is not'} in the error"
    return 400 <= status < 500 and not there, seen, "status 4xx without the prompt's text"


def tenants_apart(server: Controlled) -> Outcome:
    if server.other_key is None:
        return None, "no other tenant's key was given", "0 cached tokens: give --other_key"
    prompt = " ".join(f"{secrets.randbelow(1000)}" for _ in range(LONG))
    _, again, other = (
        _cached(server, prompt, key) for key in (server.key, server.key, server.other_key)
    )
    seen = f"{again} cached tokens for the same tenant, {other} for another"
    return other == 0, seen, "0 for another tenant"


def deletion_by_request(server: Controlled) -> Outcome:
    if server.audit is None or server.retention == "none":
        return None, "there is no audit log", "its line is gone: give --audit"
    _, headers, _ = _ask(server, "to be deleted")
    request = headers.get("x-request-id", "")
    if _line_of(server, request) is None:
        return False, "the request is not in the log", "a line that can be deleted"
    command = [sys.executable, "-m", "v4jax", "forget", "--audit", str(server.audit)]
    done = subprocess.run([*command, "--request", request], capture_output=True, text=True)
    there = any(line.get("request") == request for line in _log(server))
    if done.returncode:
        return False, f"v4jax forget says: {done.stderr.strip()[:200]}", "its line is gone"
    return not there, f"its line is {'there' if there else 'gone'}", "its line is gone"


def _ask(server, text, key=""):
    body = {"model": server.model, "prompt": text, "max_tokens": 1, "temperature": 0}
    key = server.key if key == "" else key
    return server.client.exchange("/completions", body, key=key)


def _cached(server, prompt, key):
    status, _, text = _ask(server, prompt, key)
    if status != 200:
        raise Refused(status, text[:200])
    usage = json.loads(text).get("usage") or {}
    return (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


def _log_text(server):
    return "".join(
        path.read_text(errors="replace") for path in sorted(server.audit.glob("*.jsonl"))
    )


def _log(server):
    found = []
    for line in _log_text(server).splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _line_of(server, request):
    """The log's line of a request, once it is there; None: it does not come."""
    until = time.monotonic() + WAIT
    while True:
        for line in _log(server):
            if request and line.get("request") == request:
                return line
        if time.monotonic() > until:
            return None
        time.sleep(0.1)
