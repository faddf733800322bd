#!/usr/bin/env bash
# Makes .venv and installs the project into it. Called by `make setup`, which hands over:
#   PYTHON       the interpreter to use (default: the first of python3.11, python3.12, python3 that fits)
#   DEVICE       cpu or cuda (default: cuda where nvidia-smi lists a GPU)
#   TORCH_INDEX  an extra package index for torch alone, such as PyTorch's CPU index
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=.venv
FITS='import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))'

# Why an interpreter cannot be used, or nothing. It is run, not only found: a pyenv shim can exist and still fail.
fault() {
  command -v "$1" >/dev/null || { echo "not found"; return; }
  local version
  version=$("$1" -c 'import platform; print(platform.python_version())' 2>/dev/null </dev/null) \
    || { echo "there, but does not run (a pyenv shim without that version?)"; return; }
  "$1" -c "$FITS" >/dev/null 2>&1 && return
  case $version in
    3.11.* | 3.12.*) echo "Python $version, but without venv and ensurepip (Debian, Ubuntu: install python${version%.*}-venv)" ;;
    *) echo "Python $version, but 3.11 or 3.12 is needed" ;;
  esac
}

find_python() {
  local candidate why faults=
  local -a candidates=(python3.11 python3.12 python3)
  [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    why=$(fault "$candidate")
    if [ -z "$why" ]; then command -v "$candidate"; return; fi
    faults+="  $candidate: $why"$'\n'
  done
  printf 'setup: no usable Python 3.11 or 3.12:\n%sInstall one of them, or name it: make setup PYTHON=/path/to/python3.11\n' "$faults" >&2
  return 1
}

# step "what happens" command...: quiet, with the time it took.
step() {
  local start=$SECONDS
  printf '%-72s' "$1"
  shift
  if "$@" </dev/null; then echo "$((SECONDS - start)) s"; else
    echo "failed after $((SECONDS - start)) s" >&2
    return 1
  fi
}

python=$(find_python)
version=$("$python" -c 'import platform; print(platform.python_version())')

gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
device=${DEVICE:-$([ "${gpus:-0}" -gt 0 ] && echo cuda || echo cpu)}
case $device in
  cpu | cuda) ;;
  *) echo "setup: DEVICE=$device is not known: use cpu or cuda" >&2; exit 1 ;;
esac
echo "Python $version ($python), device $device (GPUs found: ${gpus:-0}), environment $VENV"

# An environment of another Python or device is made anew: fbgemm's CPU and CUDA builds hold the same files.
made_for="${version%.*} $device"
if [ ! -x $VENV/bin/python ] || [ "$(cat $VENV/.made-for 2>/dev/null || echo "$made_for")" != "$made_for" ] \
  || [ "$($VENV/bin/python -c "import sys; print('%d.%d' % sys.version_info[:2])" 2>/dev/null)" != "${version%.*}" ]; then
  step "Making $VENV" "$python" -m venv --clear $VENV
fi
echo "$made_for" >$VENV/.made-for
rm -f $VENV/.installed

# Twice quiet: errors only. Warnings about links and caches would bury the lines above.
pip=($VENV/bin/python -m pip --quiet --quiet --disable-pip-version-check --no-input)
torch=$(sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
if [ "$device" = cpu ]; then what=(./packaging/fbgemm-gpu-name -e ".[cpu,dev]"); else what=(-e ".[cuda,dev]"); fi

# torch goes first and alone, so that an extra index is asked about torch and about nothing else.
install_torch() {
  PIP_EXTRA_INDEX_URL="${TORCH_INDEX:-}${PIP_EXTRA_INDEX_URL:+ $PIP_EXTRA_INDEX_URL}" "${pip[@]}" install "$torch"
}
if [ -n "${TORCH_INDEX:-}" ]; then
  step "Installing $torch (from the index given too)" install_torch
else
  step "Installing $torch" "${pip[@]}" install "$torch"
fi
step "Installing genatt-dist and what it needs (minutes the first time)" "${pip[@]}" install "${what[@]}"
$VENV/bin/python -m pip --disable-pip-version-check check # not quiet: that would hide what is broken
touch $VENV/.installed
echo "Ready: make quickstart, or $VENV/bin/genatt --help"
