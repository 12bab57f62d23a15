"""What opening a run's checkpoints does to others in the same process."""

import logging

from absl import logging as absl_logging

from v4jax.train.saves import Checkpoints


def test_only_orbax_is_silenced(tmp_path, caplog):
    """A conversion in the same process warns through absl's logger too."""
    Checkpoints(tmp_path, keep=1).close()
    absl_logging.warning("of a conversion")
    logger = logging.getLogger("absl")
    for level, text in ((logging.WARNING, "a note"), (logging.ERROR, "an error")):
        place = (absl_logging.__name__, level, "/site-packages/orbax/save.py", 1)
        logger.handle(logger.makeRecord(*place, text, (), None))
    assert "of a conversion" in caplog.text and "an error" in caplog.text
    assert "a note" not in caplog.text
