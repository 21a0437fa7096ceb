# Sourced by the other scripts: makes .venv and installs the project into it, once for each state of pyproject.toml.
#   setup_project <extra>      e.g. quickstart, dev

fail() {
  printf '\n%s\n' "$*" >&2
  exit 1
}

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python; do
    [ -n "$candidate" ] || continue
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      printf '%s' "$candidate"
      return
    fi
  done
  fail "No Python 3.11 or newer was found. Install one, or name it: PYTHON=/path/to/python3.12 $0"
}

setup_project() {
  local extra=$1 python stamp
  if [ ! -x .venv/bin/python ]; then
    python=$(find_python)
    echo "Making .venv with $($python --version)"
    "$python" -m venv .venv || fail "venv failed. On Debian and Ubuntu: apt-get install python3-venv; then run this again."
  fi
  stamp=".venv/installed-$extra-$(.venv/bin/python -c 'import hashlib; print(hashlib.sha256(open("pyproject.toml", "rb").read()).hexdigest()[:12])')"
  if [ ! -e "$stamp" ]; then
    echo "Installing k5dist[$extra] into .venv (a few minutes the first time)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$extra]" ||
      fail "pip could not install the project; its last lines say why. Mend that (network, disk space, proxy) and run this again."
    touch "$stamp"
  fi
}
