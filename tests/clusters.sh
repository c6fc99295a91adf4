#!/usr/bin/env bash
# Starts a Ray cluster of two nodes and a Slurm cluster of two nodes on this machine, for the tests
# of fleets; Slurm needs root on Debian or Ubuntu, and is left out elsewhere. What runs already is
# kept. `stop` ends both.
#
#   tests/clusters.sh start FOLDER && eval "$(tests/clusters.sh env FOLDER)"
#   tests/clusters.sh revive-ray FOLDER     # or revive-slurm: starts its second node again
#   tests/clusters.sh stop FOLDER
set -euo pipefail

readonly PACKAGES=(slurmctld slurmd slurm-client munge)
readonly PYTHON=${PYTHON:-python3}
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly HERE ACTION=${1:-start} FOLDER=${2:?a folder}
readonly RAY=$FOLDER/ray SLURM=$FOLDER/slurm
# Outside the ports that Ray gives to its workers, 10002 to 19999.
readonly RAY_PORT=${WEIGHTSMITH_TEST_RAY_PORT:-26379} CTLD_PORT=26817 NODE_PORT=26820
# Tasks get as much of a busy machine as other programs, and not what these leave (15).
export RAY_USAGE_STATS_ENABLED=0 RAY_raylet_start_wait_time_s=60 RAY_worker_niceness=0
export WEIGHTSMITH_TEST_CLUSTERS_FOLDER=$FOLDER
export PYTHONPATH=$HERE/tests/without:$HERE/toolchain:$HERE${PYTHONPATH:+:$PYTHONPATH}

say() { printf '%4d s  %s\n' "$SECONDS" "$*" >&2; }

# With ports of its own choice, a node waits 15 s at most until its agents have told it theirs, which
# a busy machine does not always make: then both are started again, with all files in memory.
# WEIGHTSMITH_TEST_RAY_NODES, 1 or 2, gives each node half of one core, for measurements: on a machine
# of two, the registry and the command have the rest, as they have machines of their own elsewhere.
ray_node() (
  local pinned=()
  if [ -n "${WEIGHTSMITH_TEST_RAY_NODES:-}" ]; then
    pinned=(taskset -c "$(($1 - 1))")
    half_a_core "$1" || exit 1
  fi
  WEIGHTSMITH_STORE=$FOLDER/store-$1 "${pinned[@]}" "$PYTHON" -m ray.scripts.scripts start "${@:2}" \
    --num-cpus=1 --memory=8000000000 --object-store-memory=100000000 \
    --dashboard-agent-grpc-port=2640"$1" --dashboard-agent-listen-port=2641"$1" \
    --runtime-env-agent-port=2642"$1" --metrics-export-port=2643"$1" \
    --node-ip-address=127.0.0.1 --disable-usage-stats </dev/null >>"$FOLDER/ray.log" 2>&1
)

# Limits this shell and what it starts, as root. Where a caller looks at the result, `set -e` is off:
# each step says itself that it failed, since a node without the limit would be measured as with it.
half_a_core() {
  local group=/sys/fs/cgroup/weightsmith-ray-$1
  if [ -d /sys/fs/cgroup/cpu ]; then
    group=/sys/fs/cgroup/cpu/weightsmith-ray-$1
    mkdir -p "$group" && echo 50000 >"$group/cpu.cfs_quota_us"
  else
    echo +cpu >/sys/fs/cgroup/cgroup.subtree_control && mkdir -p "$group" &&
      echo 50000 100000 >"$group/cpu.max"
  fi && echo "$BASHPID" >"$group/cgroup.procs"
}

second_ray_node() {
  [ "${WEIGHTSMITH_TEST_RAY_NODES:-2}" = 1 ] || ray_node 2 --address="127.0.0.1:$RAY_PORT"
}

# Until Ray counts as many nodes as there are: on a busy machine, one that has started may end again,
# and one that was killed counts for a while.
wait_for_ray() {
  "$PYTHON" - "127.0.0.1:$RAY_PORT" "${WEIGHTSMITH_TEST_RAY_NODES:-2}" <<'PYTHON' >>"$FOLDER/ray.log" 2>&1
import sys, time, ray

ray.init(address=sys.argv[1], log_to_driver=False)
until = time.monotonic() + 300
while sum(node["Alive"] for node in ray.nodes()) != int(sys.argv[2]):
    if time.monotonic() > until:
        sys.exit("its nodes are not there")
    time.sleep(0.2)
PYTHON
}

slurm_node() {
  WEIGHTSMITH_STORE=$FOLDER/store-$1 SLURM_CONF=$SLURM/slurm.conf \
    slurmd -N "$1" -f "$SLURM/slurm.conf" >>"$SLURM/start.log" 2>&1
}

# Until both nodes take jobs.
wait_for_slurm() {
  for _ in $(seq 1 240); do
    [ "$(SLURM_CONF=$SLURM/slurm.conf sinfo -h -N -t idle -o %N 2>/dev/null | sort -u | wc -l)" = 2 ] &&
      return
    sleep 0.5
  done
  say "Slurm does not start, see $SLURM/*.log"
  return 1
}

start_ray() {
  "$PYTHON" -c 'import ray' 2>/dev/null || { say "no Ray: its tests will be skipped"; return; }
  [ -e "$RAY/started" ] && return
  mkdir -p "$RAY"
  local try
  for try in 1 2 3; do
    say "starting two Ray nodes"
    ray_node 1 --head --port="$RAY_PORT" --include-dashboard=false --temp-dir="$RAY" &&
      second_ray_node && wait_for_ray && { touch "$RAY/started"; return; }
    stop_ray
  done
  say "Ray does not start, see $FOLDER/ray.log"
  return 1
}

# Ends Ray's own processes, which name its folder or the head's address, and no others.
stop_ray() {
  local pid
  for pid in $(pgrep -f "$RAY/session|127.0.0.1:$RAY_PORT" || true); do
    [ "$pid" = $$ ] || kill -9 "$pid" 2>/dev/null || true
  done
}

install_slurm() {
  command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null &&
    return
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return
  say "installing ${PACKAGES[*]}"
  local policy=/usr/sbin/policy-rc.d made=no
  [ -e $policy ] || { printf '#!/bin/sh\nexit 101\n' >$policy; chmod 755 $policy; made=yes; }
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq -o DPkg::Lock::Timeout=600 \
    -o Acquire::Retries=5 --no-install-recommends "${PACKAGES[@]}" >&2 || true
  [ $made = no ] || rm -f $policy
  command -v slurmctld >/dev/null
}

# A job whose node was lost waits for as long as its credential is valid: two minutes, by default.
write_slurm() {
  local host
  host=$(hostname -s)
  mkdir -p "$SLURM"/{state,spool-1,spool-2,munge}
  cat >"$SLURM/slurm.conf" <<CONF
ClusterName=weightsmith-test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$SLURM/munge/socket,cred_expire=20
CredType=cred/munge
SlurmctldPort=$CTLD_PORT
StateSaveLocation=$SLURM/state
SlurmdSpoolDir=$SLURM/spool-%n
SlurmctldPidFile=$SLURM/slurmctld.pid
SlurmdPidFile=$SLURM/slurmd-%n.pid
SlurmctldLogFile=$SLURM/slurmctld.log
SlurmdLogFile=$SLURM/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=1,batch_sched_delay=0
MpiDefault=none
ReturnToService=2
SlurmdTimeout=20
InactiveLimit=0
KillWait=5
MinJobAge=300
JobRequeue=1
SlurmctldParameters=enable_configless
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$NODE_PORT CPUs=1 RealMemory=8000
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((NODE_PORT + 1)) CPUs=1 RealMemory=8000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
CONF
  printf 'CgroupPlugin=disabled\nIgnoreSystemd=yes\n' >"$SLURM/cgroup.conf"
}

start_slurm() {
  [ "$(id -u)" = 0 ] || { say "no root: the tests of Slurm will be skipped"; return; }
  [ -e "$SLURM/started" ] && return
  install_slurm || { say "no Slurm: its tests will be skipped"; return; }
  say "starting a Slurm cluster of two nodes"
  write_slurm
  export SLURM_CONF=$SLURM/slurm.conf
  dd if=/dev/urandom of="$SLURM/munge/key" bs=1024 count=1 status=none
  chmod 400 "$SLURM/munge/key"
  chmod 711 "$SLURM/munge"
  munged --force --socket="$SLURM/munge/socket" --key-file="$SLURM/munge/key" \
    --pid-file="$SLURM/munge/pid" --log-file="$SLURM/munge/log" --seed-file="$SLURM/munge/seed"
  slurmctld -f "$SLURM_CONF" >>"$SLURM/start.log" 2>&1
  local node
  for node in n1 n2; do
    slurm_node $node
  done
  wait_for_slurm && touch "$SLURM/started"
}

print_environment() {
  echo "export WEIGHTSMITH_TEST_CLUSTERS_FOLDER=$FOLDER"
  [ ! -e "$RAY/started" ] || echo "export WEIGHTSMITH_TEST_RAY=127.0.0.1:$RAY_PORT"
  [ ! -e "$SLURM/started" ] || echo "export SLURM_CONF=$SLURM/slurm.conf"
}

stop() {
  local pid
  stop_ray
  for pid in "$SLURM"/slurmd-*.pid "$SLURM/slurmctld.pid" "$SLURM/munge/pid"; do
    [ ! -s "$pid" ] || kill "$(cat "$pid")" 2>/dev/null || true
  done
}

case $ACTION in
  start)
    mkdir -p "$FOLDER"
    case ${WEIGHTSMITH_TEST_CLUSTERS:-both} in ray | both) start_ray || true ;; esac
    case ${WEIGHTSMITH_TEST_CLUSTERS:-both} in slurm | both) start_slurm || true ;; esac
    ;;
  env) print_environment ;;
  revive-ray)
    second_ray_node || second_ray_node
    wait_for_ray
    ;;
  revive-slurm) slurm_node n2 && wait_for_slurm ;;
  stop) stop ;;
  *) say "start, env, revive-ray, revive-slurm or stop?"; exit 2 ;;
esac
