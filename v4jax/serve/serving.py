"""What a server has while it runs: the engine, who may ask, what is counted and kept."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from v4jax.engine.prefix_cache import PrefixCache
from v4jax.infer.tokenizer import Tokenizer
from v4jax.serve.audit import DAY, AuditLog
from v4jax.serve.errors import Refused
from v4jax.serve.forget import Watch
from v4jax.serve.keys import KeyFile
from v4jax.serve.limits import Limits, Rate
from v4jax.serve.look import Figures, Look
from v4jax.serve.metrics import Metrics
from v4jax.serve.running import Running
from v4jax.serve.seen import SeenRequests
from v4jax.serve.settings import Settings
from v4jax.serve.token_names import TokenNames

_LOG = logging.getLogger("v4jax.serve")
_HOUR = 3600.0
_UNKNOWN_LINES = 60  # a minute, of requests without a key that is known


class Serving:
    """The parts of one server, for one event loop.

    Args:
      engine: an `Engine` with the tokenizer, not started. tokenizer: of the checkpoint.
      eos: ids that end a text. bos, eos_token: ids of the config, or None.
      chat: a `ChatFormat`, or None: the checkpoint cannot chat, for the reason `no_chat`.
      prefix_cache: the engine's, or None.
      figures: `Lens.figures` of the model, or None: nobody can look into requests.

    Attributes:
      state: "warming up", "ready", "stopping" or "failed".

    Raises:
      InputError: a key file or an audit directory that cannot be used.
    """

    def __init__(
        self,
        settings: Settings,
        engine: Any,
        tokenizer: Tokenizer,
        *,
        bos: int | None,
        eos: int | None,
        stop_ids: frozenset[int],
        chat: Any = None,
        no_chat: str = "",
        prefix_cache: PrefixCache | None = None,
        figures: Figures | None = None,
    ):
        self.settings, self.engine, self.tokenizer = settings, engine, tokenizer
        self.names, self.stop_ids = TokenNames(tokenizer, bos, eos), stop_ids
        self.chat, self.no_chat, self.prefix_cache = chat, no_chat, prefix_cache
        self.look: Look | None = None
        if figures is not None:
            self.look = Look(figures, self.names.name, SeenRequests())
        self.keys = None if settings.keys is None else KeyFile(settings.keys)
        self.limits = Limits()
        self.unknown = Rate(_UNKNOWN_LINES)
        self.metrics = Metrics(engine.stats)
        self.audit = self._watch = None
        if settings.audit is not None:
            full = settings.retention == "full"
            self.audit = AuditLog(settings.audit, full, settings.keep_days)
            self._watch = Watch(settings.audit)
        self.pool = ThreadPoolExecutor(2, "v4jax-text")  # tokenising; long bodies and grammars
        self.log_thread = ThreadPoolExecutor(1, "v4jax-audit")
        self.created = int(time.time())
        self._state = "warming up"
        self.running: Running

    @property
    def state(self) -> str:
        if self._state == "ready" and self.engine.closed:
            return "failed"
        return self._state

    @property
    def waits_for(self) -> str:
        """What is done before it is ready, for people; empty where nothing is."""
        if self.state != "warming up":
            return ""
        return str(self.engine.compiling or "programs are looked for")

    @property
    def max_prompt_tokens(self) -> int:
        return min(
            self.engine.max_length, self.settings.max_prompt_tokens or self.engine.max_length
        )

    def stop(self) -> None:
        """New requests are refused from now on."""
        self._state = "stopping"

    @contextlib.asynccontextmanager
    async def lifespan(self, app=None) -> AsyncIterator[None]:
        """Runs while the server does: warms the engine up, and tidies."""
        self.running = Running(self.engine, self.settings.max_waiting, self.pool)
        tasks = [asyncio.create_task(self._warm_up()), asyncio.create_task(self._tidy())]
        try:
            yield
        finally:
            self.stop()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.to_thread(self.engine.close)
            self.pool.shutdown()
            self.log_thread.shutdown()

    def check_ready(self) -> None:
        """Raises Refused where no request can begin."""
        if self.state != "ready":
            why = f" ({self.waits_for})" if self.waits_for else ""
            raise Refused(
                503,
                f"the server is {self.state}{why}; try again later",
                code=self.state.replace(" ", "_"),
                retry_after=5,
            )

    async def in_pool(self, function, *arguments) -> Any:
        """Runs what takes time beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, function, *arguments)

    async def can_record(self) -> bool:
        """Whether a request that begins now can be recorded, if it has to be."""
        if self.audit is None:
            return True
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.log_thread, self.audit.writable)

    def record(self, line: dict[str, Any], prompt: bytes | None) -> asyncio.Future | None:
        """Appends a line to the audit log; a future that says whether it could be."""
        if self.audit is None:
            return None

        def write():
            line["prompt_hash"] = None if prompt is None else self.audit.hash_of(prompt)
            return self.audit.append(line)

        return asyncio.get_running_loop().run_in_executor(self.log_thread, write)

    async def _warm_up(self):
        telling = asyncio.create_task(self._tell_progress())
        try:
            seconds = await asyncio.to_thread(self.engine.warm_up)
            self.engine.start()
            self._state = "ready"
            _LOG.info("ready; the programs took %.1f s", seconds)
        except Exception:
            self._state = "failed"
            raise
        finally:
            telling.cancel()

    async def _tell_progress(self):
        """A line now and then: a first start takes minutes."""
        while True:
            await asyncio.sleep(self.settings.progress_seconds)
            _LOG.info("warming up: %s", self.waits_for)

    async def _tidy(self):
        """Forgets what was asked to be forgotten, and what is too old."""
        last = time.monotonic()
        while True:
            await asyncio.sleep(1.0)
            try:
                for asked in await self._asked():
                    await self._forget(asked)
                if time.monotonic() > last + _HOUR:
                    last = time.monotonic()
                    await self._delete_old()
            except Exception as error:  # the next round may do better
                _LOG.error("tidying: %s", type(error).__name__)

    async def _asked(self):
        return [] if self._watch is None else await self.in_pool(self._watch.news)

    async def _forget(self, asked):
        if self.chat is not None:
            for salt in asked["salts"]:
                self.chat.kept.forget(salt)
        if self.look is not None:
            for salt in asked["salts"]:
                self.look.requests.delete(tenant=salt)
            if (days := asked["older_than_days"]) is not None:
                self.look.requests.delete(older_than=days * DAY)
        if self.prefix_cache is not None:
            for salt in asked["salts"]:
                await asyncio.to_thread(self.prefix_cache.forget, salt)
            if (days := asked["older_than_days"]) is not None:
                await asyncio.to_thread(self.prefix_cache.forget, None, days * DAY)

    async def _delete_old(self):
        loop = asyncio.get_running_loop()
        if self.audit is not None:
            await loop.run_in_executor(self.log_thread, self.audit.delete_old)
            if self.prefix_cache is not None:
                days = self.settings.keep_days
                await asyncio.to_thread(self.prefix_cache.forget, None, days * DAY)
