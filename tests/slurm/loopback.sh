#!/usr/bin/env bash
# A real Slurm cluster of several nodes on this machine, below one directory, for tests. As root.
#
#   loopback.sh install                    slurmctld slurmd slurm-client munge, by apt
#   loopback.sh start DIR [NODES]          up when every node is idle; nodes are n1..nN
#   loopback.sh exec  DIR COMMAND...       a client command where the controller lives
#   loopback.sh crash DIR NODE|ctld        power loss: SIGKILL of all of it at once
#   loopback.sh boot  DIR NODE|ctld        on again
#   loopback.sh forget DIR jobs            lose the record of all jobs, while ctld is down
#   loopback.sh freeze|thaw DIR NODE       SIGSTOP / SIGCONT of everything on the node
#   loopback.sh cut|mend DIR NODE          pull the network cable, plug it in (LOOPBACK_NET=1)
#   loopback.sh pids  DIR NODE [VAR=VAL].. pids of its processes with these in their environment
#   loopback.sh clean DIR                  cancel, stop, remove
#
# Each node has a pid, mount and uts namespace of its own, so that `crash` takes daemon, steps and
# tasks away together. LOOPBACK_NET=1 adds a network namespace: 10.77.0.i on a bridge in a further
# namespace. Without it all nodes share 127.0.0.1. Nothing listens outside.
# LOOPBACK_EXTRA names a file of further slurm.conf lines.
set -u
umask 022
die() { echo "loopback: $*" >&2; exit 1; }

alive() {   # a zombie is not alive, though kill -0 would say so
    local state
    state=$(sed 's/^.*) \(.\) .*$/\1/' "/proc/${1:-none}/stat" 2>/dev/null) || return 1
    [ -n "$state" ] && [ "$state" != Z ] && [ "$state" != X ]
}
# A pid and its start time name one process for good: a stale note never hits a stranger.
born() { sed 's/^.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }
note() { echo "$2 $(born "$2")" > "$DIR/run/$1.id"; }
noted() {
    local p b
    read -r p b 2>/dev/null < "$DIR/run/$1.id" || return 1
    alive "$p" && [ "$(born "$p")" = "$b" ] && echo "$p"
}
wait_for() {   # SECONDS COMMAND...
    local end=$((SECONDS + $1)); shift
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$end" ] || return 1
        sleep 0.1
    done
}
end_noted() {   # NAME [SECONDS]
    local p n
    p=$(noted "$1") || { rm -f "$DIR/run/$1.id"; return 0; }
    kill -TERM "$p" 2>/dev/null
    for ((n = 0; n < ${2:-10} * 10; n++)); do alive "$p" || break; sleep 0.1; done
    alive "$p" && kill -KILL "$p" 2>/dev/null
    rm -f "$DIR/run/$1.id"
}

free_ports() {   # COUNT: the first of so many in a row that nobody listens on
    local used first i clash
    used=$(cat /proc/net/tcp /proc/net/tcp6 2>/dev/null |
        awk '$4 == "0A" { n = split($2, a, ":"); print a[n] }')
    for ((i = 0; i < 50; i++)); do
        first=$((20000 + (RANDOM % 220) * 50)); clash=0
        for ((p = first; p < first + $1; p++)); do
            grep -qix "$(printf '%04X' "$p")" <<< "$used" && clash=1
        done
        ((clash)) || { echo "$first"; return; }
    done
    die "no $1 free ports in a row"
}

configure() {
    local i gpu addr=127.0.0.1 ctl=127.0.0.1 host
    host=$(hostname -s)
    mkdir -p "$DIR"/{etc,run,log,state,spool,dev}
    echo "NODES=$NODES NET=$NET PORT=$PORT" > "$DIR/etc/cluster.env"
    head -c 128 /dev/urandom > "$DIR/etc/munge.key"
    chmod 600 "$DIR/etc/munge.key"
    { echo "127.0.0.1 localhost $host"
      if ((NET)); then
          echo "10.77.0.254 ctl"
          for ((i = 1; i <= NODES; i++)); do echo "10.77.0.$i n$i"; done
      else
          for ((i = 1; i <= NODES; i++)); do echo "127.0.0.1 n$i"; done
      fi; } > "$DIR/etc/hosts"
    if ((NET)); then addr="10.77.0.[1-$NODES]"; ctl=10.77.0.254; host=ctl; fi
    for gpu in 0 1 2 3; do   # null devices: gres/gpu wants a file for each
        [ -e "$DIR/dev/gpu$gpu" ] || mknod "$DIR/dev/gpu$gpu" c 1 3 || : > "$DIR/dev/gpu$gpu"
    done
    echo "Name=gpu File=$DIR/dev/gpu[0-3]" > "$DIR/etc/gres.conf"
    echo "CgroupAutomount=no" > "$DIR/etc/cgroup.conf"
    cat > "$DIR/etc/slurm.conf" <<CONF
ClusterName=loopback
SlurmctldHost=$host($ctl)
SlurmctldPort=$PORT
SlurmUser=root
AuthType=auth/munge
# cred_expire + 1 s is how long a requeued job stays out; 5 is the least, Slurm's default 120
AuthInfo=socket=$DIR/run/munge.sock,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/slurmd-%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd-%n.log
MailProg=/bin/true
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=5
TCPTimeout=2
KillWait=20
BatchStartTimeout=10
UnkillableStepTimeout=30
MinJobAge=600
JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2,nohold_on_prolog_fail
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobCompType=jobcomp/filetxt
JobCompLoc=$DIR/log/jobcomp.txt
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=n[1-$NODES] NodeAddr=$addr Port=[$((PORT + 1))-$((PORT + NODES))] CPUs=8 RealMemory=4000 Gres=gpu:4
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE
PartitionName=grace Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
CONF
    [ -n "${LOOPBACK_EXTRA:-}" ] && cat "$LOOPBACK_EXTRA" >> "$DIR/etc/slurm.conf"
    return 0
}

at_hub() {
    if ((NET)); then
        nsenter -t "$(noted hub)" --net --mount --uts --wdns="$PWD" "$@"
    else
        "$@"
    fi
}
start_hub() {
    noted hub >/dev/null && return 0
    rm -f "$DIR/run/hub.ready"
    # shellcheck disable=SC2016
    setsid unshare --net --mount --uts bash -c '
        hostname ctl && mount --bind "$1/etc/hosts" /etc/hosts && ip link set lo up &&
        ip link add br0 type bridge && ip addr add 10.77.0.254/24 dev br0 && ip link set br0 up &&
        touch "$1/run/hub.ready" && exec sleep infinity' hub "$DIR" \
        </dev/null >"$DIR/log/hub.out" 2>&1 &
    note hub $!
    wait_for 10 test -e "$DIR/run/hub.ready" || die "no network namespace: see $DIR/log/hub.out"
}
start_munged() {
    noted munged >/dev/null && return 0
    munged --socket="$DIR/run/munge.sock" --key-file="$DIR/etc/munge.key" --force \
        --pid-file="$DIR/run/munged.pid" --log-file="$DIR/log/munged.log" \
        --seed-file="$DIR/run/munged.seed" --num-threads=2 2>>"$DIR/log/munged.out" ||
        die "munged did not start: see $DIR/log/munged.log"
    wait_for 5 test -s "$DIR/run/munged.pid" || die "munged wrote no pid file"
    note munged "$(cat "$DIR/run/munged.pid")"
}
start_ctld() {
    noted slurmctld >/dev/null && return 0
    local in=()
    ((NET)) && in=(nsenter -t "$(noted hub)" --net --mount --uts)
    setsid "${in[@]}" slurmctld -D -f "$SLURM_CONF" </dev/null >"$DIR/log/slurmctld.out" 2>&1 &
    note slurmctld $!
    wait_for 15 at_hub scontrol ping || die "slurmctld did not start: see $DIR/log/slurmctld.log"
}
start_node() {
    local net='' init
    noted "node-$1" >/dev/null && return 0
    mkdir -p "$DIR/spool/$1"
    ((NET)) && net=--net
    # Pid 1 of the node reaps orphans; --kill-child lets the outer death end the whole namespace.
    # shellcheck disable=SC2016,SC2086
    setsid unshare $net --mount --uts --pid --fork --kill-child --mount-proc bash -c '
        hostname "$1"
        mount --bind "$2/etc/hosts" /etc/hosts
        if [ -n "$3" ]; then
            ip link set lo up
            until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
            ip addr add "10.77.0.${1#n}/24" dev eth0 && ip link set eth0 up
        fi
        slurmd -D -N "$1" -f "$2/etc/slurm.conf" &
        daemon=$!
        trap "kill -TERM $daemon" TERM
        while kill -0 "$daemon" 2>/dev/null; do wait "$daemon"; done' node "$1" "$DIR" "$net" \
        </dev/null >"$DIR/log/node-$1.out" 2>&1 &
    note "node-$1" $!
    if ((NET)); then
        init=$(init_of "$1") || die "$1 did not start: see $DIR/log/node-$1.out"
        at_hub ip link del "v-$1" 2>/dev/null
        at_hub ip link add "v-$1" type veth peer name eth0 netns "$init" &&
            at_hub ip link set "v-$1" master br0 up || die "no cable for $1"
    fi
}
init_of() {   # pid 1 of a node, as the host sees it
    local top n child
    top=$(noted "node-$1") || return 1
    for ((n = 0; n < 100; n++)); do
        read -r child _ 2>/dev/null < "/proc/$top/task/$top/children"
        [ -n "${child:-}" ] && { echo "$child"; return 0; }
        sleep 0.02
    done
    return 1
}
processes_of() {
    local init namespace
    init=$(init_of "$1") || return 1
    namespace=$(readlink "/proc/$init/ns/pid")
    find /proc/[0-9]*/ns/pid -maxdepth 0 -printf '%l %p\n' 2>/dev/null |
        awk -v ns="$namespace" '$1 == ns { split($2, a, "/"); print a[3] }'
}
stop_node() {
    local init
    if init=$(init_of "$1" 2>/dev/null); then
        kill -CONT "$init" 2>/dev/null
        kill -TERM "$init" 2>/dev/null
        wait_for 5 eval "! noted node-$1"
    fi
    end_noted "node-$1" 3
}
names() { local i; for ((i = 1; i <= NODES; i++)); do echo "n$i"; done; }
all_idle() {
    [ "$(at_hub sinfo -h -N -o '%T' -p main 2>/dev/null | grep -cx idle)" -eq "$NODES" ]
}

verb=${1:-}
[ -n "$verb" ] && shift
if [ "$verb" = install ]; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq &&
        apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge
    exit
fi
[ -n "${1:-}" ] || { sed -n '2,/^set -u/{/^set -u/d;s/^# \{0,1\}//;p}' "$0"; exit 2; }
mkdir -p "$1" && DIR=$(cd "$1" && pwd -P) || die "no directory $1"
# slurmstepd's sockets lie below it, and a unix socket's path ends at 107 bytes
[ "${#DIR}" -le 70 ] || die "$DIR is too long for unix sockets: use at most 70 characters"
export SLURM_CONF=$DIR/etc/slurm.conf
shift
if [ "$verb" = start ]; then
    NODES=${1:-4} NET=${LOOPBACK_NET:-0}
    [ -z "$(ls -A "$DIR")" ] || die "$DIR is not empty"
    PORT=$(free_ports $((NODES + 2)))
    configure
    start_munged
    ((NET)) && start_hub
    start_ctld
    for node in $(names); do start_node "$node"; done
    wait_for 60 all_idle || { at_hub sinfo -N -l; die "not every node is idle: see $DIR/log"; }
    exit 0
fi
[ -r "$DIR/etc/cluster.env" ] || { [ "$verb" = clean ] && exit 0; die "$DIR holds no cluster"; }
# shellcheck disable=SC1091
. "$DIR/etc/cluster.env"
case $verb in
exec) at_hub "$@" ;;
crash)
    if [ "$1" = ctld ]; then
        pid=$(noted slurmctld) && kill -KILL "$pid"
        rm -f "$DIR/run/slurmctld.id"
    else
        pids=$(processes_of "$1")
        kill -KILL "$(noted "node-$1")"
        for pid in $pids; do wait_for 5 eval "! alive $pid"; done
        rm -f "$DIR/run/node-$1.id"
    fi ;;
forget)   # the controller's record of all jobs, while it is down
    noted slurmctld >/dev/null && die "the controller is up"
    rm -f "$DIR"/state/job_state* "$DIR"/state/last_*job* ;;
boot) if [ "$1" = ctld ]; then start_ctld; else start_node "$1"; fi ;;
freeze) for pid in $(processes_of "$1"); do kill -STOP "$pid" 2>/dev/null; done ;;
thaw) for pid in $(processes_of "$1"); do kill -CONT "$pid" 2>/dev/null; done ;;
cut) at_hub ip link set "v-$1" down ;;
mend) at_hub ip link set "v-$1" up ;;
pids)
    node=$1; shift
    for pid in $(processes_of "$node"); do
        text=$({ tr '\0' '\n' < "/proc/$pid/environ"; } 2>/dev/null)
        [ -n "$text" ] || continue
        for want in "$@"; do grep -qxF -- "$want" <<< "$text" || continue 2; done
        echo "$pid"
    done ;;
clean)
    if noted slurmctld >/dev/null; then
        for part in main low grace; do at_hub timeout 5 scancel -p "$part" 2>/dev/null; done
    fi
    for node in $(names); do stop_node "$node" & done
    wait
    end_noted slurmctld 15
    end_noted hub 2
    end_noted munged 5
    rm -rf "${DIR:?}"/{run,log,state,spool,dev,etc} ;;
*) die "no verb $verb" ;;
esac
