#!/usr/bin/env bash
# Every check, each with its time. Called by `make test`.
set -euo pipefail
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} MPLBACKEND=agg
all=$(date +%s)
stage() {
  local t
  t=$(date +%s)
  echo "== $1"
  shift
  "$@"
  echo "   $(( $(date +%s) - t )) s"
}
stage "exported modules match the notebooks" bash scripts/check_nbs.sh
stage "lint" ruff check ssl_patch tests scripts nbs setup.py
stage "format" ruff format --check tests scripts nbs setup.py
stage "checks in the notebooks" nbdev_test --n_workers 2 --timing
stage "pytest" python -m pytest -n 2 --dist worksteal
echo "== all passed in $(( $(date +%s) - all )) s"
