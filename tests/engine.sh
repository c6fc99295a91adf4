#!/usr/bin/env bash
# Makes a container engine, a base for builder images, Chromium and an emulator of Arm CPUs available
# to the tests, as root on Debian or Ubuntu. What is there already is kept. Exit code 0: engine and base are there; 1: they
# are not.
#
#   tests/engine.sh && eval "$(tests/engine.sh --env)"
#
# --env prints the variables that the tests need, for `eval`; all else goes to standard error.
set -euo pipefail

# The base for machines that cannot pull one: Debian's current release with Python 3.11, the oldest
# that the builders support, from the release before.
readonly BASE=weightsmith-test-base:python3.11
readonly SUITE=trixie PYTHON_SUITE=bookworm
readonly MIRROR=${WEIGHTSMITH_TEST_MIRROR:-http://deb.debian.org/debian}
readonly PACKAGES=(docker.io docker-cli docker-buildx docker-compose docker-registry skopeo umoci
  podman oras cosign mmdebstrap)
# Sources of registries that others wrote, and what these need; the compiler is golang-go.
readonly REGISTRY_SOURCES=(golang-github-google-go-containerregistry-dev
  golang-github-cue-labs-oci-dev golang-github-opencontainers-go-digest-dev
  golang-github-opencontainers-image-spec-dev)
readonly REGISTRIES=/usr/local/bin/weightsmith-test-registries
readonly LOG=${TMPDIR:-/tmp}/weightsmith-dockerd.log
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly HERE

say() { printf '%4d s  %s\n' "$SECONDS" "$*" >&2; }

fail() {
  say "error: $*"
  exit 1
}

answers() { timeout 20 docker version --format '{{.Server.Version}}' >/dev/null 2>&1; }

# Runs a command until it succeeds, four times at the most: mirrors have bad minutes.
retried() {
  local pause
  for pause in 5 20 60; do
    "$@" && return
    say "failed: $*; again in $pause s"
    sleep "$pause"
  done
  "$@"
}

# Waits for whoever holds the package lock, as a fresh machine's own upgrades do.
apt() {
  DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=600 -o Acquire::Retries=5 "$@" >&2
}

# Succeeds with lists that are whole: apt is content with those that it could get.
update_lists() { apt update && apt-cache show docker.io >/dev/null 2>&1; }

# After a failure with new lists, since mirrors drop old versions.
apt_install() {
  apt install -y --no-install-recommends "$@" && return
  apt update || true
  return 1
}

require_root_on_debian() {
  [ "$(id -u)" = 0 ] || fail "no engine answers, and only root can install one"
  command -v apt-get >/dev/null || fail "no engine answers, and there is no apt-get to install one"
}

install_packages() {
  local wanted=() package
  retried update_lists || fail "apt-get update failed, or there is no docker.io"
  for package in "${PACKAGES[@]}"; do
    # Older releases have the client inside docker.io.
    if apt-cache show "$package" >/dev/null 2>&1; then wanted+=("$package"); fi
  done
  say "installing ${wanted[*]}"
  # No service is started by the installation itself: docker-registry would take port 5000.
  local policy=/usr/sbin/policy-rc.d made=no
  if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    made=yes
  fi
  retried apt_install "${wanted[@]}" iptables ||
    { [ $made = no ] || rm -f "$policy"; fail "apt-get install failed"; }
  [ $made = no ] || rm -f "$policy"
  stop_registry_service
}

# The report's tests need it: 212 MB to download, about a minute. They are skipped without it.
install_browser() {
  local name
  for name in chromium chromium-browser google-chrome chrome; do
    if command -v "$name" >/dev/null; then return; fi
  done
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then return; fi
  [ -n "$(find /var/lib/apt/lists -name '*_Packages*' -print -quit)" ] || retried apt update || true
  # Ubuntu has a snap of that name instead, which does not run in containers.
  case $(apt-cache policy chromium 2>/dev/null) in *'Candidate: '[0-9]*) ;; *) return ;; esac
  say "installing chromium"
  retried apt_install chromium ||
    say "chromium cannot be installed: the report's tests will be skipped"
}

# Programs for 64-bit Arm are started with it: 71 MB to download. Their tests are skipped without it.
# No kernel feature is registered: only tests that call it use it.
install_emulator() {
  if command -v qemu-aarch64-static >/dev/null || command -v qemu-aarch64 >/dev/null; then return; fi
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then return; fi
  [ -n "$(find /var/lib/apt/lists -name '*_Packages*' -print -quit)" ] || retried apt update || true
  say "installing qemu-user-static"
  retried apt_install qemu-user-static ||
    say "qemu-user-static cannot be installed: the tests of Arm images will be skipped"
}

# More registries for the client's tests: 50 MB to download and half a minute. They are skipped
# without it. Only the sources are unpacked: what the packages depend on is 170 MB more.
install_registries() {
  [ "$REGISTRIES" -nt "$HERE/fakes/registries.go" ] && return
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then return; fi
  say "building $REGISTRIES"
  local work
  work=$(mktemp -d)
  chmod 755 "$work"
  build_registries "$work" >&2 ||
    say "the other registries cannot be built: their tests will be skipped"
  rm -rf "$work"
}

# Each step is followed by `|| return`: in a condition `set -e` does not count.
build_registries() {
  local package
  [ -n "$(find /var/lib/apt/lists -name '*_Packages*' -print -quit)" ] || retried apt update || return
  command -v go >/dev/null || retried apt_install golang-go || return
  (cd "$1" && retried apt -o APT::Sandbox::User=root download "${REGISTRY_SOURCES[@]}") || return
  for package in "$1"/*.deb; do
    dpkg-deb -x "$package" "$1" || return
  done
  GO111MODULE=off GOPATH=$1/usr/share/gocode GOCACHE=$1/cache CGO_ENABLED=0 \
    go build -o "$REGISTRIES" "$HERE/fakes/registries.go"
}

stop_registry_service() {
  if command -v systemctl >/dev/null && systemctl is-active --quiet docker-registry 2>/dev/null; then
    say "disabling the system's docker-registry, which holds port 5000"
    systemctl disable --now docker-registry >&2 || true
  fi
}

start_engine() {
  local old=/var/run/docker.pid
  # Left by a daemon that was killed; its number may be a zombie's or another program's by now.
  if [ -s "$old" ] && [ "$(readlink "/proc/$(cat "$old")/exe" 2>/dev/null | xargs -r basename)" != dockerd ]; then
    rm -f "$old" /var/run/docker/containerd/containerd.pid
  fi
  local try
  for try in 1 2 3; do
    if [ "$try" != 1 ]; then
      say "dockerd ended: $(tail -n 1 "$LOG"); started again"
      sleep 5
    fi
    run_engine && return
  done
  tail -n 5 "$LOG" >&2
  fail "dockerd does not answer, see $LOG"
}

# Succeeds when the engine answers, this one or another that was just being started; fails when
# ours has ended, as it does where containerd is not up within 15 seconds.
run_engine() {
  say "starting dockerd, log: $LOG"
  nohup dockerd >"$LOG" 2>&1 </dev/null &
  local pid=$! waited
  for waited in $(seq 1 300); do
    if answers; then
      say "dockerd answers after $waited s"
      return
    fi
    kill -0 "$pid" 2>/dev/null || return 1
    sleep 1
  done
  say "dockerd does not answer within five minutes"
  kill "$pid"
  return 1
}

locked_base() {
  sed -n '/"builder-cpu"/,/reference/s/.*"reference": "\(.*\)".*/\1/p' "$HERE/../images/bases.lock"
}

have_base() {
  docker image inspect "$(locked_base)" >/dev/null 2>&1 && return
  docker image inspect "$BASE" >/dev/null 2>&1 && return
  say "pulling $(locked_base)"
  timeout 300 docker pull --quiet "$(locked_base)" >&2 2>/dev/null
}

bootstrap_base() {
  [ "$(id -u)" = 0 ] || fail "the base cannot be pulled, and only root can bootstrap one"
  command -v mmdebstrap >/dev/null || { require_root_on_debian; install_packages; }
  say "the base cannot be pulled: bootstrapping $BASE from $MIRROR (about a minute)"
  local work
  work=$(mktemp -d)
  # shellcheck disable=SC2064  # the folder of now is meant
  trap "rm -rf '$work'" EXIT
  cat >"$work/python" <<EOF
Package: *
Pin: release n=$PYTHON_SUITE
Pin-Priority: 100

Package: python3* libpython3*
Pin: release n=$PYTHON_SUITE
Pin-Priority: 990
EOF
  retried debootstrapped "$work" || fail "mmdebstrap failed"
  docker import "$work/base.tar" "$BASE" >&2
}

debootstrapped() {
  local work=$1
  mmdebstrap --quiet --variant=minbase --include=ca-certificates,python3,python3-venv \
    --aptopt='Acquire::Check-Valid-Until "false"' --aptopt='Acquire::Retries "5"' \
    --setup-hook="install -D -m 644 '$work/python' \"\$1/etc/apt/preferences.d/python\"" \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' \
    "$SUITE" "$work/base.tar" "deb $MIRROR $SUITE main" "deb $MIRROR $PYTHON_SUITE main" >&2
}

print_environment() {
  if ! docker image inspect "$(locked_base)" >/dev/null 2>&1; then
    echo "export WEIGHTSMITH_BUILDER_BASE=$BASE"
  fi
}

main() {
  if [ "${1:-}" = --env ]; then
    print_environment
    return
  fi
  if ! answers; then
    require_root_on_debian
    command -v dockerd >/dev/null || install_packages
    start_engine
  fi
  have_base || bootstrap_base
  install_browser
  install_emulator
  install_registries
  say "ready: docker $(docker version --format '{{.Server.Version}}')"
}

main "$@"
