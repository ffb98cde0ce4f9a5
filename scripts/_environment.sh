# Sourced by the scripts beside it. Gives: ROOT, PYTHON_VENV, ensure_environment EXTRAS.

ROOT="$(CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON_VENV="$ROOT/.venv/bin/python"

# Prints the first Python that is new enough; a version manager may list commands that do not run.
find_python() {
  local candidate
  for candidate in "${PYTHON:-python3.12}" python3.12 python3.11 python3.13 python3 python python3.14; do
    if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "No Python 3.11 or newer was found: install one (python3.11 or later, with pip) or name it, as in PYTHON=/path/to/python3.12 $0." >&2
  return 1
}

create_venv() {
  local python
  python="$(find_python)" || return 1
  echo "Creating $ROOT/.venv with $python ..." >&2
  # Some distributions ship venv without ensurepip; then that Python's own pip fills the folder.
  if "$python" -c 'import ensurepip' 2>/dev/null; then
    "$python" -m venv "$ROOT/.venv"
  elif "$python" -m pip --version >/dev/null 2>&1; then
    "$python" -m venv --without-pip "$ROOT/.venv" &&
      "$python" -m pip --python "$PYTHON_VENV" install --quiet --disable-pip-version-check pip
  else
    echo "$python has neither ensurepip nor pip: install its venv or pip package and run this again." >&2
    return 1
  fi
}

# Prints a hash of all that decides what is installed.
requirements_hash() {
  "$PYTHON_VENV" - "$ROOT/setup.py" "$ROOT/pyproject.toml" <<'PY'
import hashlib, pathlib, sys
files = b"\0".join(pathlib.Path(name).read_bytes() for name in sys.argv[1:])
print(hashlib.sha256(files + sys.version.encode() + sys.prefix.encode()).hexdigest())
PY
}

# ensure_environment EXTRAS: the package, editable, in ROOT/.venv; EXTRAS is empty or like "test".
# A stamp file per set of extras makes the second run quick.
ensure_environment() {
  local extras="$1" stamp wanted target="$ROOT"
  "$PYTHON_VENV" -m pip --version >/dev/null 2>&1 || create_venv || return 1
  stamp="$ROOT/.venv/.installed${extras:+-$extras}"
  wanted="$(requirements_hash)" || return 1
  if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    return 0
  fi
  echo "Installing speccascade_t5x${extras:+ with extras [$extras]} (minutes the first time) ..." >&2
  target="$ROOT${extras:+[$extras]}"
  if ! "$PYTHON_VENV" -m pip install --quiet --disable-pip-version-check --editable "$target"; then
    echo "The installation failed; pip's own message is above. It is safe to run this again." >&2
    return 1
  fi
  printf '%s\n' "$wanted" >"$stamp"
  # Whatever holds the extras holds the package as well.
  printf '%s\n' "$wanted" >"$ROOT/.venv/.installed"
}
