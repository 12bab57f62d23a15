"""A checkpoint behind a server of its own, on this machine, for suites that ask one."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from v4jax.errors import InputError
from v4jax.eval.controls import Controlled
from v4jax.eval.endpoint import EndpointTarget
from v4jax.eval.http_client import Client, Refused
from v4jax.infer.tokenizer import Tokenizer
from v4jax.lifeline import Child

_ADDRESS = re.compile(r"(\S+) at (http://\S+/v1)")
_PATIENCE = 600.0  # seconds until it must be ready: it compiles


class OwnServer:
    """`v4jax serve` as a child process, with an audit log and keys of two tenants and a guest.

    It ends with this process, also where that is killed.

    Args:
      checkpoint: directory or name. slots: requests together. max_length: tokens of each.
      command: how v4jax is called. environment: more variables for it.

    Attributes:
      target: the model there, by chat. controlled: what the checks of the controls suite need.

    Raises:
      InputError: it does not start, with what it said last.
    """

    def __init__(
        self,
        checkpoint: str,
        slots: int,
        max_length: int,
        command: tuple[str, ...] = (sys.executable, "-m", "v4jax"),
        environment: Mapping[str, str] | None = None,
    ):
        self._command = command
        self._environment = os.environ | dict(environment or {})
        self._directory = Path(tempfile.mkdtemp(prefix="v4jax-eval-"))
        self._said: list[str] = []
        self._process: subprocess.Popen | None = None
        try:
            self._start(checkpoint, slots, max_length)
        except BaseException:
            self.close()
            raise

    def _start(self, checkpoint, slots, max_length):
        keys, audit = self._directory / "keys.json", self._directory / "audit"
        first, other = (self._key(keys, name) for name in ("first", "other"))
        limited = self._key(keys, "limited", "--endpoints=models")
        flags = [f"--checkpoint={checkpoint}", "--port=0", f"--keys={keys}", f"--audit={audit}"]
        flags += ["--retention=metadata", f"--slots={slots}", f"--max_length={max_length}"]
        self._process = Child(
            [*self._command, "serve", *flags],
            self._environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            errors="replace",
        )
        threading.Thread(target=self._listen, daemon=True).start()
        name, url = self._address()
        client = Client(url, first)
        self._wait_until_ready(client)
        self.target = EndpointTarget(url, name, first, tokenizer=Tokenizer(checkpoint))
        self.target.identity["where"] = "a server of its own"
        self.controlled = Controlled(client, name, first, other, limited, audit, "metadata")

    def _key(self, path, name, *flags):
        command = [*self._command, "keys", "create", f"--file={path}", f"--name={name}", *flags]
        done = subprocess.run(command, capture_output=True, text=True, env=self._environment)
        if done.returncode:
            raise InputError(f"v4jax keys does not work here: {_last(done.stderr)}")
        return done.stdout.strip()

    def _listen(self):
        for line in self._process.stderr:
            self._said.append(line.rstrip())

    def _address(self):
        """The model's name and the URL, once the server says them."""
        until = time.monotonic() + _PATIENCE
        while time.monotonic() < until:
            for line in list(self._said):
                if match := _ADDRESS.search(line):
                    return match[1], match[2]
            self._check_running()
            time.sleep(0.05)
        raise InputError(f"v4jax serve says no address: {_last(chr(10).join(self._said))}")

    def _wait_until_ready(self, client):
        until = time.monotonic() + _PATIENCE
        while time.monotonic() < until:
            with contextlib.suppress(Refused):
                client.get_root("/health")
                return
            self._check_running()
            time.sleep(0.25)
        raise InputError(f"v4jax serve is not ready after {_PATIENCE:g} seconds")

    def _check_running(self):
        if self._process.poll() is not None:
            time.sleep(0.1)  # its last words
            raise InputError(f"v4jax serve ended: {_last(chr(10).join(self._said))}")

    def close(self) -> None:
        """Stops the server and deletes its keys and its log."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> "OwnServer":
        return self

    def __exit__(self, *error) -> None:
        self.close()


def _last(text):
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it says nothing"
