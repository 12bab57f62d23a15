"""A command starts itself again, once, with huge pages; training has flags of its own."""

import json
import os
import subprocess
import sys

import pytest

from v4jax.cli import cpu_settings

SCRIPT = """
import json, os, sys
print("begun", flush=True)
from v4jax.cli import cpu_settings
cpu_settings.start_again_with_huge_pages()
print(json.dumps([sys.argv[1:], os.environ["GLIBC_TUNABLES"], os.getpid()]))
"""


def begin(**environment):
    """What a script that asks for huge pages prints, and its process."""
    inherited = {k: v for k, v in os.environ.items() if k != cpu_settings.VARIABLE}
    command = [sys.executable, "-c", SCRIPT, "--flag", "two words"]
    process = subprocess.Popen(
        command, env=inherited | environment, stdout=subprocess.PIPE, text=True
    )
    out, _ = process.communicate()
    assert process.returncode == 0
    *begun, said = out.splitlines()
    return len(begun), json.loads(said), process.pid


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings")


@linux
def test_arguments_process_and_other_settings_stay():
    begun, (arguments, settings, pid), started = begin(GLIBC_TUNABLES="glibc.malloc.perturb=0")
    assert begun == 2
    assert arguments == ["--flag", "two words"]
    assert settings == "glibc.malloc.perturb=0:glibc.malloc.hugetlb=1"
    assert pid == started  # whoever waits for it or kills it need not know


@linux
def test_a_setting_of_the_users_own_stays():
    begun, (_, settings, _), _ = begin(GLIBC_TUNABLES="glibc.malloc.hugetlb=0")
    assert (begun, settings) == (1, "glibc.malloc.hugetlb=0")


@linux
@pytest.mark.parametrize("command", ["train", "generate"])
def test_commands_that_run_programs_ask_for_them(command):
    """As the system sees it: this process's environment when it began."""
    ours = (cpu_settings.VARIABLE, cpu_settings.XLA_VARIABLE)
    inherited = {k: v for k, v in os.environ.items() if k not in ours}
    watch = (
        "import importlib, v4jax.cli.main as m\n"
        "def show(name):\n"
        "    print(open('/proc/self/environ').read())\n"
        "    exit(0)\n"
        "importlib.import_module = show\n"
        "m.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", watch, command], env=inherited, capture_output=True, text=True
    )
    assert "GLIBC_TUNABLES=glibc.malloc.hugetlb=1" in done.stdout
    flags = (f"{flag}={value}" for flag, value in cpu_settings.TRAINING_FLAGS.items())
    assert all((flag in done.stdout) == (command == "train") for flag in flags)


def test_flags_of_the_users_own_stay(monkeypatch):
    own = "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_CONCURRENCY_OPTIMIZED"
    monkeypatch.setenv("XLA_FLAGS", own)
    cpu_settings.compile_for_training()
    added = "--xla_backend_extra_options=xla_cpu_use_multi_output_fusion=true"
    assert os.environ["XLA_FLAGS"] == f"{own} {added}"
    cpu_settings.compile_for_training()
    assert os.environ["XLA_FLAGS"] == f"{own} {added}"
