#!/usr/bin/env bash
# Runs the fast tests here as they would run on other machines: each setting below is a function.
#
#   tests/portable.sh                      every setting, the whole of the fast tests
#   tests/portable.sh avx2 one_core        these settings
#   TESTS="tests/rewards tests/jobs" tests/portable.sh lang_c
#   TESTS=short tests/portable.sh          every setting, two minutes in all: what CI runs
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d -p /var/tmp) # not /tmp, which is another folder in the sandbox
trap 'rm -rf "$work"' EXIT
chmod 711 "$work" # another user passes through it

settings=(avx2 no_vectors one_core other_user read_only_home odd_path lang_c umask_077 no_npm_no_network)

# What differs between processors is arithmetic, and what differs between users and shells is files and the sandbox.
arithmetic=(tests/pipeline/test_objectives.py tests/pipeline/test_objectives_preference.py tests/pipeline/test_attention.py)
system=(tests/configs/test_load.py tests/rewards/sandbox/test_isolation.py tests/rewards/test_offline.py)

# Kernels that torch compiled are kept by their graph, not by the width of vectors they were compiled for: one of another
# width, from the folder that all runs share, computes garbage.
avx2() {
  export ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 TORCHINDUCTOR_CACHE_DIR=$work/kernels
  run "$root" "${arithmetic[@]}"
}

no_vectors() {
  export ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2 TORCHINDUCTOR_CACHE_DIR=$work/kernels
  run "$root" "${arithmetic[@]}"
}

one_core() {
  workers=0 run "$root" tests/rewards/test_contract.py tests/pipeline/test_train_engine.py -- taskset -c 0
}

other_user() {
  [ "$(id -u)" = 0 ] || skip "only root can become another user; the other settings run as one who is not root"
  local become=(setpriv --reuid=65534 --regid=65534 --clear-groups)
  copy "$work/checkout"
  if ! "${become[@]}" test -x "$(readlink -f "$root/.venv/bin/python")"; then
    with_system_python "$work/checkout/.venv" ||
      skip "the interpreter of .venv is in a folder that other users may not enter, and the system has none of its version"
  fi
  mkdir "$work/home"
  chown -R 65534:65534 "$work/checkout" "$work/home"
  # Not the PATH of root, whose home holds programs that another user may not look up.
  HOME="$work/home" PATH=/usr/local/bin:/usr/bin:/bin run "$work/checkout" "${system[@]}" -- "${become[@]}"
}

read_only_home() {
  export HOME="$work/read-only"
  mkdir "$HOME"
  chmod 555 "$HOME"
  if [ "$(id -u)" = 0 ]; then # whom modes do not keep out
    unshare --mount true || skip "no file system can be mounted here"
    # shellcheck disable=SC2016
    run "$root" "${system[@]}" -- unshare --mount bash -c 'mount --bind "$HOME" "$HOME" && mount -o remount,bind,ro "$HOME" && exec "$@"' -
  else
    run "$root" "${system[@]}"
  fi
}

odd_path() {
  copy "$work/ein Ordner für Prüfungen 检查"
  run "$work/ein Ordner für Prüfungen 检查" "${system[@]}"
}

lang_c() {
  unset LC_ALL LC_CTYPE
  export LANG=C
  run "$root" "${system[@]}"
}

umask_077() {
  umask 077
  run "$root" "${system[@]}"
}

no_npm_no_network() {
  local alone=(unshare --net)
  [ "$(id -u)" = 0 ] || alone+=(--map-root-user)
  "${alone[@]}" true || skip "no network of its own can be made here"
  copy "$work/checkout"
  rm -f "$work/checkout/.venv/browser" # what set-up leaves out where there is no npm
  unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY all_proxy
  mkdir "$work/tools"
  printf '#!/bin/sh\nexit 127\n' >"$work/tools/npm"
  chmod 755 "$work/tools/npm"
  local up='import fcntl, socket, struct, sys, os
with socket.socket() as probe:  # loopback, which a new network has but does not use
    fcntl.ioctl(probe, 0x8914, struct.pack("16sH14x", b"lo", 0x49))
os.execvp(sys.argv[1], sys.argv[1:])'
  PATH="$work/tools:$PATH" run "$work/checkout" "${system[@]}" -- \
    "${alone[@]}" "$root/.venv/bin/python" -c "$up"
}

# run CHECKOUT SHORT_TEST... [-- PREFIX...]: the tests of TESTS in CHECKOUT, behind the command PREFIX.
run() {
  local checkout=$1 short=()
  shift
  while [ $# -gt 0 ] && [ "$1" != -- ]; do
    short+=("$1")
    shift
  done
  [ $# = 0 ] || shift
  local tests=()
  if [ "${TESTS:-}" = short ]; then
    tests=("${short[@]}")
  else
    read -ra tests <<<"${TESTS:-tests}"
  fi
  cd "$checkout"
  PYTHONPATH="$checkout" "$@" .venv/bin/python -m pytest -m "not slow" -n "${workers:-2}" --dist loadfile \
    --no-loadscope-reorder "${tests[@]}"
}

# copy FOLDER: a checkout with this one's files and packages.
copy() {
  mkdir -p "$1/.venv"
  (cd "$root" && git ls-files -z --cached --others --exclude-standard -- ':!.venv' | tar --null --files-from=- -cf -) | tar -xf - -C "$1"
  local part
  for part in "$root"/.venv/*; do
    ln -sfT "$(readlink -f "$part")" "$1/.venv/${part##*/}"
  done
}

# with_system_python VENV: the packages of .venv under the system's Python of the same version, which any user may run.
with_system_python() {
  local version script
  version=$("$root/.venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  [ -x "/usr/bin/python$version" ] || return 1
  rm -rf "$1/bin" "$1/lib" "$1/lib64" "$1/pyvenv.cfg"
  "/usr/bin/python$version" -m venv --without-pip "$1"
  rmdir "$1/lib/python$version/site-packages"
  ln -s "$root/.venv/lib/python$version/site-packages" "$1/lib/python$version/site-packages"
  for script in "$root"/.venv/bin/*; do
    [ -f "$script" ] && [ ! -L "$script" ] && [ ! -e "$1/bin/${script##*/}" ] || continue
    sed "1s|^#!.*/python[0-9.]*\$|#!$1/bin/python|" "$script" >"$1/bin/${script##*/}"
    chmod 755 "$1/bin/${script##*/}"
  done
}

skip() {
  printf 'skipped: %s\n' "$*"
  exit 0
}

failed=()
for setting in "${@:-${settings[@]}}"; do
  case " ${settings[*]} " in
    *" $setting "*) ;;
    *) printf 'unknown setting %s; known: %s\n' "$setting" "${settings[*]}" >&2 && exit 2 ;;
  esac
  printf '== %s\n' "$setting"
  rm -rf "${work:?}"/*
  set +e # a shell on the left of || would go on after an error
  (
    set -e
    "$setting"
  )
  [ $? = 0 ] || failed+=("$setting")
  set -e
done
[ ${#failed[@]} = 0 ] || { printf 'failed under: %s\n' "${failed[*]}" >&2 && exit 1; }
