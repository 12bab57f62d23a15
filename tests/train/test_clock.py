"""Seconds of a step, whenever its figures are read."""

import time

import jax.numpy as jnp

from v4jax.train.clock import Clock


def test_a_step_takes_from_the_end_of_the_one_before_to_its_own():
    """Whenever its figures are read: those of the first two in one moment, behind both."""
    clock = Clock(tokens=100, length=50, flops=1.0)

    def step():
        time.sleep(0.02)
        ended = clock.watch(jnp.zeros(()))
        ended.result()
        return ended

    ends = [step(), step()]
    seconds = [clock.tick(ended)["seconds"] for ended in ends]
    time.sleep(0.5)  # an evaluation, a checkpoint
    clock.start()
    seconds.append(clock.tick(step())["seconds"])
    clock.close()
    assert all(0.02 <= second < 0.4 for second in seconds)
