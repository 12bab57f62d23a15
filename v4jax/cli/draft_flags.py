"""The flags of commands that decode with drafts."""

from absl import flags

from v4jax.engine.acceptance import COUPLED, RULES

FLAGS = flags.FLAGS


def define_flags(rule: bool = False) -> None:
    """Declares --draft, and with `rule` --draft_rule."""
    flags.DEFINE_enum(
        "draft",
        "auto",
        ["auto", "mtp", "dspark", "none"],
        "Draft of speculative decoding, which changes no token (auto: where it is faster)",
    )
    if rule:
        flags.DEFINE_enum(
            "draft_rule",
            COUPLED,
            RULES,
            "How drafts are accepted; rejection accepts more and draws other tokens, as likely",
        )


def draft() -> str | None:
    """What --draft asks an engine for."""
    return None if FLAGS.draft == "none" else FLAGS.draft
