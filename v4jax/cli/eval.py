"""Evaluate a checkpoint or an endpoint: long context, tool calls, latency, cost, data controls.

Records go to --out as they are made: the same command again goes on where the last one ended. A
table goes to stdout (or, with --format json, the summary), progress to stderr.
"""

import contextlib
import dataclasses
import json
import time
from pathlib import Path

import tqdm
from absl import flags

import v4jax
from v4jax.cli import compilation_cache, eval_targets, worker_flags
from v4jax.cli.eval_targets import say
from v4jax.errors import InputError
from v4jax.eval import assignments, compare, controls, cost, five, report, suites, tool_use
from v4jax.eval.records import Records
from v4jax.eval.suite import run as run_suite
from v4jax.eval.summary import as_table, sentences, summarize, write_summary
from v4jax.files.writing import writable_file
from v4jax.tables import table

FLAGS = flags.FLAGS
_ONE_BY_ONE = ("controls", *suites.ALONE)


def define_flags():
    """Declares the flags of this subcommand."""
    eval_targets.define_flags()
    flags.DEFINE_string("lengths", None, "Tokens of prompt and answer, as 512,1024")
    flags.DEFINE_integer("samples", 20, "Samples of each task and length")
    flags.DEFINE_string("tasks", "", "Tasks of the suite, as single_1,multikey_2 (default: all)")
    flags.DEFINE_integer("seed", 0, "The same seed makes the same samples")
    flags.DEFINE_float("minutes", None, "Begin nothing after so long (five: 10)", lower_bound=0.0)
    flags.DEFINE_integer("trials", 4, "tools: times that each conversation is held")
    flags.DEFINE_float("temperature", tool_use.TEMPERATURE, "tools: of the draws")
    flags.DEFINE_string("loads", None, "latency: requests at once (default: 1,4,16)")
    flags.DEFINE_integer("attempts", cost.ATTEMPTS, "cost: at a task until it is solved, at most")
    flags.DEFINE_float("price_prompt", 0.0, "Of a million prompt tokens that were read")
    flags.DEFINE_float("price_cached", 0.0, "Of a million prompt tokens from the prefix cache")
    flags.DEFINE_float("price_output", 0.0, "Of a million tokens that were made")
    flags.DEFINE_float("price_hour", 0.0, "Of an hour of the accelerator")
    flags.DEFINE_enum("scoring", "ours", ["ours", "published"], "graphwalks: how lists are read")
    flags.DEFINE_string(
        "out", None, "Directory of the records (default: evals/SUITE-MODEL); compare: HTML file"
    )
    flags.DEFINE_enum("format", "text", ["text", "json"], "json: the summary on stdout")
    worker_flags.define_flags("one engine, in this process")
    compilation_cache.define_flag()


def run(suite: str, *directories: str) -> int:
    """Runs what is left of a suite and reports; the exit status."""
    if suite == "compare":
        return _compare(directories)
    suites.check_name(suite)
    if directories:
        raise InputError(f"there is an argument too many, {directories[0][:100]!r}")
    worker_flags.check()
    prices = cost.Prices(
        FLAGS.price_prompt, FLAGS.price_cached, FLAGS.price_output, FLAGS.price_hour
    )
    if suite == "five" and FLAGS.minutes is None:
        FLAGS.minutes = 10.0
    settings = _settings(suite)
    compilation_cache.begin()
    with contextlib.ExitStack() as stack:
        runner = _Runner(suite, settings, stack)
        runner.run()
    _report(runner, prices)
    return 0


class _Runner:
    """A suite under way: its targets, as they are needed, and its records."""

    def __init__(self, suite: str, settings: suites.Settings, stack: contextlib.ExitStack):
        self.suite, self._stack = suite, stack
        longest = max(settings.lengths)
        self._server = self._crew = self._described = None
        if FLAGS.endpoint is not None:
            self._described = eval_targets.of_endpoint()
        elif not _served(suite):
            talk = eval_targets.longest_talk() if suite == "tools" else 0
            self._described = eval_targets.of_checkpoint(max(longest, talk))
        if self._described is None:
            self._target = self._served().target
        else:
            self._target = eval_targets.opened(self._described, longest)
        self._stack.callback(self._target.close)
        self.name = self._target.name
        self._settings = settings
        self.identity = {
            "suite": suite,
            "seed": settings.seed,
            "version": v4jax.__version__,
            "tasks": suites.VERSION,
            "scoring": settings.scoring,
            **self._target.identity,
        }
        self.records = self._stack.enter_context(Records(_out(self), self.identity))
        self.jobs: list = []
        self.notes: list[str] = []
        self._end = None if FLAGS.minutes is None else time.monotonic() + 60 * FLAGS.minutes

    def run(self) -> None:
        """All parts."""
        if self.suite != "five":
            self._part(self.suite, self._settings, self._end)
            return
        left = list(five.SHARES)
        for part in five.SHARES:
            deadline = five.deadline(part, left, time.monotonic(), self._end)
            left.remove(part)
            try:
                self._part(part, five.settings(part, self._settings), deadline)
            except InputError as error:
                self._note(f"{part} was not done to its end: {error}")

    def of_suite(self) -> list:
        """The suite's records: the directory may have those of other lengths too."""
        done = self.records.done
        return [done[job.key] for job in self.jobs if job.key in done]

    def _part(self, part, settings, deadline):
        target = self._target
        if _served(part):
            target = self._served().target
        style = "facts" if self.name in eval_styles() else target.style
        settings = dataclasses.replace(settings, style=style)
        jobs = self._jobs(part, settings)
        self.jobs += jobs
        left = [job for job in jobs if job.key not in self.records.done]
        if there := len(jobs) - len(left):
            say(f"{part}: {there} of {len(jobs)} records are there, in {self.records.directory}")
        crew = self._workers(part, target) if left else None
        if left and part not in _ONE_BY_ONE and target is self._target and crew is None:
            target.resize(FLAGS.concurrency)
            if (seconds := target.warm_up()) > 1:
                say(f"compiled in {seconds:.1f} s")
        self._work(part, settings, jobs, target, crew, deadline)

    def _jobs(self, part, settings):
        if part != "controls":
            return suites.SUITES[part](settings)
        served = FLAGS.endpoint is None
        return controls.jobs(self._served().controlled if served else eval_targets.controlled())

    def _served(self):
        if self._server is None:
            self._server = self._stack.enter_context(eval_targets.own_server())
        return self._server

    def _workers(self, part, target):
        """Who does a part elsewhere, if anybody: a server of our own is asked from here."""
        if FLAGS.executor == worker_flags.LOCAL or part == "controls" or target is not self._target:
            return None
        if self._described is not None and self._crew is None:
            made = worker_flags.crew(assignments.Evaluator, FLAGS.concurrency, self._note)
            self._crew = self._stack.enter_context(made)
        return self._crew

    def _work(self, part, settings, jobs, target, crew, deadline):
        there = sum(job.key in self.records.done for job in jobs)
        with tqdm.tqdm(
            total=len(jobs), initial=there, unit="sample", desc=part, disable=None
        ) as bar:

            def progress(record):
                bar.set_postfix_str(f"{record['task']} {record['length']}", refresh=False)
                bar.update()

            if crew is None:
                many = 1 if part in _ONE_BY_ONE else FLAGS.concurrency
                left = run_suite(jobs, target, self.records, many, progress, deadline, self._note)
            else:
                tasks = [
                    assignments.Assignment(self._described, part, settings, job.key) for job in jobs
                ]
                left = assignments.run(tasks, crew, self.records, progress, deadline, self._note)
        if left:
            self._note(
                f"{part}: {left} samples are left for want of time; the same command goes on"
            )

    def _note(self, sentence):
        if sentence not in self.notes:
            self.notes.append(sentence)
            say(sentence)


def _served(part):
    """Whether a part starts a server: to be checked, or for calls of tools, unless by --style chat
    the checkpoint is asked in this process."""
    here = part == "tools" and FLAGS.style == "chat"
    return part in suites.SERVED and FLAGS.endpoint is None and not here


def eval_styles():
    """Models that are asked in the words of their training."""
    from v4jax.eval.engine_target import STYLES

    return STYLES if FLAGS.style is None else {}


def _settings(suite):
    lengths = suites.LENGTHS.get(suite, suites.DEFAULT_LENGTHS)
    if FLAGS.lengths is not None:
        lengths = eval_targets.numbers("lengths", FLAGS.lengths)
    elif suite == "five":
        lengths = _five_lengths()
    elif FLAGS.endpoint is None:
        longest = eval_targets.longest_of_checkpoint()
        lengths = tuple(each for each in lengths if each <= longest) or (longest,)
    return suites.Settings(
        lengths=lengths,
        samples=FLAGS.samples,
        seed=FLAGS.seed,
        tasks=tuple(part.strip() for part in FLAGS.tasks.split(",") if part.strip()),
        trials=FLAGS.trials,
        temperature=FLAGS.temperature,
        attempts=FLAGS.attempts,
        loads=eval_targets.loads(FLAGS.loads),
        scoring=FLAGS.scoring,
    )


def _five_lengths():
    if FLAGS.endpoint is not None:
        return five.lengths(FLAGS.minutes, None, fast=True)
    import jax

    longest = eval_targets.longest_of_checkpoint()
    return five.lengths(FLAGS.minutes, longest, jax.default_backend() != "cpu")


def _out(runner) -> Path:
    return Path(FLAGS.out or f"evals/{runner.suite}-{runner.name.replace('/', '-')}")


def _report(runner, prices):
    records, directory = runner.of_suite(), runner.records.directory
    summary = summarize(runner.identity, records, prices) | {"notes": runner.notes}
    write_summary(directory, summary)
    if note := report.write(directory, records, summary):
        say(note)
    if FLAGS.format == "json":
        print(json.dumps(summary))
    else:
        print(as_table(summary))
        for sentence in sentences(summary):
            print(sentence)
    say(f"v4jax eval: {directory / report.HTML}")


def _compare(directories):
    if FLAGS.out is not None:
        writable_file(FLAGS.out, "--out", ".html")
    runs, summaries = compare.read(directories)
    found = compare.compared(runs)
    if not found:
        raise InputError("the runs have no sample in common; compare runs of the same lengths")
    rows = compare.as_rows(found)
    if FLAGS.out is not None:
        path = Path(FLAGS.out)
        if note := report.write_comparison(path, runs, summaries, compare.COLUMNS, rows):
            say(note)
    if FLAGS.format == "json":
        print(json.dumps({"first": next(iter(runs)), "differences": found}))
    else:
        print(table(compare.COLUMNS, rows, left=2))
    return 0
