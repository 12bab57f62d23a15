#!/usr/bin/env bash
# The exhaustive sweeps that CI leaves out: full-size checkpoints, every length and chunking, meshes,
# every chip, the notebooks. A table at the end says what each part took; the exit status is 1 if one
# failed. Arguments go to pytest: `tools/run_slow_tests.sh -x -n 8`.
set -uo pipefail
cd "$(dirname "$0")/.."
table=$(mktemp)
times=$(mktemp)
trap 'rm -f "$table" "$times"' EXIT
failed=0
TIMEFORMAT="%R %U %S"

part() { # NAME COMMAND...: runs the command, and notes how long it took and how it ended
    local name=$1 status outcome
    shift
    echo "=== $name"
    { time "$@" 2>&3; } 3>&2 2>"$times"
    status=$?
    case $status in
        0) outcome=passed ;;
        5) outcome="no slow tests" ;;
        *) outcome="FAILED ($status)" failed=1 ;;
    esac
    tail -n 1 "$times" | awk -v name="$name" -v outcome="$outcome" \
        '{ printf "%-28s %8.0f s %8.0f s  %s\n", name, $1, $2 + $3, outcome }' >>"$table"
}

for path in tests/*/ tests/test_*.py; do
    path=${path%/}
    case $path in tests/support | tests/__pycache__) continue ;; esac
    part "$path" python -m pytest -m slow "$path" "$@"
done
# All five axes of a mesh at once take more devices than the other tests', which pay for each.
part "tests/sharding, 32 devices" \
    env XLA_FLAGS="--xla_force_host_platform_device_count=32 --xla_backend_optimization_level=0" \
    python -m pytest -m slow tests/sharding/test_five_axes.py "$@"

printf "\n%-28s %10s %10s\n" "part" "took" "processor"
cat "$table"
exit $failed
