"""Work shared among the threads of a pool, with no thread left running when it ends."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any


def run_all(pool: ThreadPoolExecutor | None, work: Callable, items: Iterable) -> list[Any]:
    """`[work(item) for item in items]` by the pool's threads; None works in this thread.

    After an error no further item is begun, and the call returns only when those in flight have
    ended: none of them may touch a file or buffer that the caller has given up.
    """
    if pool is None:
        return [work(item) for item in items]
    futures = [pool.submit(work, item) for item in items]
    try:
        return [future.result() for future in futures]
    except BaseException:
        for future in futures:
            future.cancel()
        wait(futures)
        raise
