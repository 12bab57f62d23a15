"""A cheap worker drafts, a strong reviewer judges: cost per completed task, by share.

Each tier is a checkpoint in this process or an endpoint. Every step goes to a ledger in --out as it
is made: the same command again goes on where the last one ended. A table goes to stdout (or, with
--format json, the summary), progress to stderr.
"""

import contextlib
import json
import os
import time
from pathlib import Path

import tqdm
from absl import flags

import v4jax
from v4jax.cli import compilation_cache
from v4jax.cli.eval_targets import numbers, say
from v4jax.errors import InputError
from v4jax.eval import policies, report, tier_report, tier_tasks, tiers
from v4jax.eval.cost import Prices
from v4jax.eval.descriptions import OfEndpoint, OfEngine
from v4jax.eval.ledger import ROLES, Ledger
from v4jax.eval.policies import TierPrices
from v4jax.eval.records import Records
from v4jax.eval.suite import Target
from v4jax.eval.suite import run as run_jobs
from v4jax.eval.tier_documents import SPARE
from v4jax.eval.tier_tasks import Plan, Table

FLAGS = flags.FLAGS


def define_flags():
    """Declares the flags of this subcommand."""
    flags.DEFINE_string("worker", "nano", "Who drafts: a checkpoint, or an endpoint's URL")
    flags.DEFINE_string("reviewer", None, "Who judges: a checkpoint, or an endpoint's URL")
    for role in ROLES:
        flags.DEFINE_string(f"{role}_model", None, "Name of the model at the endpoint")
        flags.DEFINE_string(f"{role}_key", None, f"Its key (default: {_key(role)}, if set)")
        flags.DEFINE_string(f"{role}_tokenizer", None, "Checkpoint whose tokenizer it has")
        flags.DEFINE_float(f"{role}_price_prompt", 0.0, "Of a million prompt tokens it read")
        flags.DEFINE_float(f"{role}_price_cached", 0.0, "Of a million from its prefix cache")
        flags.DEFINE_float(f"{role}_price_output", 0.0, "Of a million tokens that it made")
        flags.DEFINE_float(f"{role}_price_hour", 0.0, "Of an hour of its accelerator")
    flags.DEFINE_string("tasks", "extraction", f"Of {', '.join(tier_tasks.NAMES)}")
    flags.DEFINE_enum(
        "form",
        "json",
        tier_tasks.FORMS,
        "words: for models of nano's chat training; a review is a second answer",
    )
    flags.DEFINE_string("lengths", "1024", "extraction: tokens of the text and the answer")
    flags.DEFINE_integer("samples", 20, "Samples of each task and length")
    flags.DEFINE_integer("seed", 0, "The same seed makes the same samples")
    flags.DEFINE_integer("revisions", tiers.REVISIONS, "Before the reviewer answers itself")
    flags.DEFINE_string("shares", "0,25,50,75,100", "Per cents of the drafts that are reviewed")
    flags.DEFINE_enum("rule", "confidence", policies.RULES, "Which drafts are reviewed first")
    flags.DEFINE_boolean("alone", True, "Have each tier do the tasks alone too")
    flags.DEFINE_enum("style", "chat", ["chat", "plain"], "Endpoints: chat or plain completions")
    flags.DEFINE_integer("concurrency", 1, "Tasks under way at a time", lower_bound=1)
    flags.DEFINE_float("timeout", 600.0, "Seconds an endpoint may be silent", lower_bound=0.1)
    flags.DEFINE_integer(
        "max_positions", None, "Positions that checkpoints read, beyond their limit", lower_bound=1
    )
    flags.DEFINE_float("minutes", None, "Begin nothing after so long", lower_bound=0.0)
    flags.DEFINE_string("out", None, "Directory (default: evals/tiers-WORKER-REVIEWER)")
    flags.DEFINE_enum("format", "text", ["text", "json"], "json: the summary on stdout")
    compilation_cache.define_flag()


def run() -> int:
    """Runs what is left and reports; the exit status."""
    plan, shares, prices = _plan(), numbers("shares", FLAGS.shares), _prices()
    policies.check_shares(shares)
    with contextlib.ExitStack() as stack:
        worker, reviewer = (_target(role, plan, stack) for role in ROLES)
        identity = _identity(plan, worker, reviewer)
        directory = FLAGS.out or f"evals/tiers-{_file(worker.name)}-{_file(reviewer.name)}"
        ledger = stack.enter_context(Ledger(directory, identity))
        records = stack.enter_context(Records(directory, identity))
        work = _Work(plan, Table(plan, ledger, worker, reviewer), records, worker)
        work.run(shares, (worker, reviewer))
        _report(identity, work, ledger, shares, prices)
    return 0


class _Work:
    """A plan under way: drafts first, since they say which are reviewed, then the rest."""

    def __init__(self, plan: Plan, table: Table, records: Records, target: Target):
        self._plan, self._table, self.records = plan, table, records
        self._target = target  # of jobs that do not ask it, since the table knows both
        self._end = None if FLAGS.minutes is None else time.monotonic() + 60 * FLAGS.minutes
        self._said: set[str] = set()
        self._keys = set(plan.every_sample())

    def run(self, shares, targets) -> None:
        """All courses."""
        keys = self._plan.every_sample()
        self._warm_up(keys, targets)
        self._do("drafts", [(key, "draft") for key in keys])
        chosen = policies.to_review(self.of_plan(), shares, FLAGS.rule, self._plan.seed)
        self._do("reviews", [(key, "reviewed") for key in keys if key in chosen])
        if FLAGS.alone:
            own = [k for k in keys if tier_tasks.has_own_way(self._plan.form, k[0])]
            self._do("worker alone", [(key, "worker") for key in own])
            self._do("reviewer alone", [(key, "reviewer") for key in keys])

    def of_plan(self) -> list:
        """The plan's records: the directory may have those of other tasks and lengths too."""
        return [each for each in self.records.done.values() if self.has(each)]

    def has(self, line) -> bool:
        """Whether a record or a step is of the plan."""
        task = line["task"].partition("/")[0]
        return (task, line["length"], line["sample"]) in self._keys

    def _warm_up(self, keys, targets):
        """Compiles before anything is timed, where anything is left to do."""
        if all((f"{task}/draft", *rest) in self.records.done for task, *rest in keys):
            return
        for target in targets:
            if (seconds := target.warm_up()) > 1:
                say(f"{target.name}: compiled in {seconds:.1f} s")

    def _do(self, what, courses):
        jobs = [self._table.job(key, course) for key, course in courses]
        there = sum(job.key in self.records.done for job in jobs)
        if there:
            say(f"{what}: {there} of {len(jobs)} are there, in {self.records.directory}")
        with tqdm.tqdm(total=len(jobs), initial=there, unit="task", desc=what, disable=None) as bar:
            left = run_jobs(
                jobs,
                self._target,
                self.records,
                FLAGS.concurrency,
                lambda record: bar.update(),
                self._end,
                self._say_once,
            )
        if left:
            say(f"{what}: {left} are left for want of time; the same command goes on")

    def _say_once(self, sentence):
        if sentence not in self._said:
            self._said.add(sentence)
            say(sentence)


def _plan():
    names = tuple(part.strip() for part in FLAGS.tasks.split(",") if part.strip())
    lengths = numbers("lengths", FLAGS.lengths)
    tier_tasks.check_names(names)
    for what, value in (("samples", FLAGS.samples), *(("a length", each) for each in lengths)):
        if value < 1:
            raise InputError(f"{what} is {value}; expected 1 or more")
    if not lengths:
        raise InputError("lengths is empty; expected numbers such as 512,1024")
    if not 0 <= FLAGS.seed < 2**32:
        raise InputError(f"seed is {FLAGS.seed}; expected 0 to 2^32 - 1")
    tiers.check_revisions(FLAGS.revisions)
    return Plan(FLAGS.form, names, lengths, FLAGS.samples, FLAGS.seed, FLAGS.revisions)


def _prices():
    names = ("prompt", "cached", "output", "hour")
    worker, reviewer = (
        Prices(*(FLAGS[f"{role}_price_{name}"].value for name in names)) for role in ROLES
    )
    return TierPrices(worker, reviewer)


def _target(role, plan, stack):
    """Who plays a role, as the flags say."""
    where = FLAGS[role].value
    if not where:
        raise InputError(f"--{role} is missing; expected a checkpoint, or an endpoint's URL")
    longest = max(plan.lengths) + SPARE
    if where.startswith(("http://", "https://")):
        target = _endpoint(role, where, longest)
    else:
        target = _checkpoint(role, where, plan, longest)
    stack.callback(target.close)
    return target


def _endpoint(role, url, longest):
    model = FLAGS[f"{role}_model"].value
    if not model:
        raise InputError(f"--{role}_model is missing; expected the name of the endpoint's model")
    key = FLAGS[f"{role}_key"].value or os.environ.get(_key(role))
    tokenizer = FLAGS[f"{role}_tokenizer"].value or None
    target = OfEndpoint(url, model, key, FLAGS.style, tokenizer, FLAGS.timeout).open(say)
    if target.max_length is not None and longest > target.max_length:
        raise InputError(
            f"the longest of --lengths needs {longest} tokens with what the steps add, and {model} "
            f"at {url} reads at most {target.max_length}: give shorter ones"
        )
    return target


def _checkpoint(role, name, plan, longest):
    if FLAGS[f"{role}_model"].value is not None:
        raise InputError(f"--{role}_model is given, and --{role} is no URL; leave one of them out")
    if tools := [task for task in plan.tasks if task not in tier_tasks.WITH_LENGTH]:
        raise InputError(
            f"the task {tools[0]} calls tools, and --{role} is a checkpoint in this process, which "
            "continues text: serve it (v4jax serve) and give its URL"
        )
    compilation_cache.begin()
    return OfEngine(
        name,
        longest,
        slots=FLAGS.concurrency,
        style="plain",
        max_positions=FLAGS.max_positions,
        programs=compilation_cache.programs(),
    ).open()


def _key(role):
    """The variable of a role's key: each has its own, so that no endpoint sees the other's."""
    return f"V4JAX_{role.upper()}_KEY"


def _identity(plan, worker, reviewer):
    return {
        "suite": "tiers",
        "form": plan.form,
        "seed": plan.seed,
        "revisions": plan.revisions,
        "version": v4jax.__version__,
        "tasks": tier_tasks.VERSION,
        "worker": worker.identity,
        "reviewer": reviewer.identity,
    }


def _file(name):
    return name.replace("/", "-")


def _report(identity, work, ledger, shares, prices):
    lines = [line for line in ledger.done.values() if work.has(line)]
    summary = tier_report.summarize(identity, work.of_plan(), lines, shares, FLAGS.rule, prices)
    directory = Path(work.records.directory)
    if note := tier_report.write(directory, summary):
        say(note)
    if FLAGS.format == "json":
        print(json.dumps(summary))
    else:
        print(tier_report.as_table(summary))
        for sentence in tier_report.sentences(summary):
            print(sentence)
    say(f"v4jax tiers: {directory / report.HTML}")
