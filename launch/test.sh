#!/usr/bin/env bash
# Sets up what the tests need and runs them. Arguments go to pytest:
#   ./launch/test.sh tests/unit -k plan
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh

setup_project dev
.venv/bin/python -m pytest "$@" ||
  fail "Tests failed (see above). One alone: ./launch/test.sh <file>::<test>"
