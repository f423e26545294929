#!/usr/bin/env bash
# Set up .venv and run the checks: format, lint, types, floors, tests. Arguments go to pytest, e.g.
#   bash launch/test.sh -m slow
set -euo pipefail
cd "$(dirname "$0")/.."
EXTRAS="[dev,gpu]" source launch/setup.sh

ruff format --check .
ruff check .
mypy
lint-imports --no-cache >/tmp/lint-imports.$$ 2>&1 || { cat /tmp/lint-imports.$$; exit 1; }
rm -f /tmp/lint-imports.$$
[ $# -gt 0 ] && exec python -m pytest "$@"
# The long ones first, so that the two workers end together.
python -m pytest -n 2 --dist worksteal \
  tests/end_to_end tests/distributed tests/cluster tests/unit tests/kernels tests/golden
