#!/usr/bin/env bash
# Two Ray nodes on this machine, on loopback, with token authentication.
#   cluster.sh up | down | status | submit COMMAND ...     (COMMAND: train, tune, evaluate, doctor ...)
# DIFFSCALE_CLUSTER: folder of this cluster (token, process ids, Ray's files); default /tmp/diffscale-$UID
set -euo pipefail
umask 077

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=${DIFFSCALE_CLUSTER:-/tmp/diffscale-$UID}
port=${DIFFSCALE_PORT:-6390}
dashboard=${DIFFSCALE_DASHBOARD_PORT:-8270}
cpus=${DIFFSCALE_CPUS:-$(($(nproc) / 2 > 0 ? $(nproc) / 2 : 1))} # of each of the two nodes
memory=${DIFFSCALE_OBJECT_STORE:-300000000}                      # bytes of shared memory for objects, each node

export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$folder/auth_token"
# NODE_ENVIRONMENT of diffscale/distributed/connect.py, which gives the reasons.
export RAY_health_check_period_ms=1000 RAY_health_check_timeout_ms=4000 RAY_health_check_failure_threshold=5
export RAY_worker_niceness=0
export RAY_API_SERVER_ADDRESS="http://127.0.0.1:$dashboard"
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 # keeps Ray on loopback: ray_on_loopback.py says how

start() { # name, arguments of `ray start`: in an own process group, so that `down` ends exactly what `up` started
    local name=$1
    shift
    # No job starts if another Ray uses Ray's fixed agent port (52365): 0 chooses a free one.
    setsid python "$here/ray_on_loopback.py" start "$@" --node-ip-address=127.0.0.1 --num-cpus="$cpus" --object-store-memory="$memory" \
        --dashboard-agent-listen-port=0 --disable-usage-stats --block > "$folder/$name.log" 2>&1 < /dev/null &
    echo $! > "$folder/$name.pid"
}

nodes() { # how many are alive
    (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null || { echo 0 && return; } # Ray's client would wait for a minute
    python "$here/nodes.py" "$port" 2> /dev/null || echo 0
}

up() {
    local count
    count=$(nodes)
    if [[ $count -gt 0 ]]; then
        echo "already up: $count nodes" >&2
        return
    fi
    down
    mkdir -p "$folder"
    chmod 700 "$folder"
    if [[ ! -s $RAY_AUTH_TOKEN_PATH ]]; then
        python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH"
    fi
    chmod 600 "$RAY_AUTH_TOKEN_PATH"
    start head --head --port="$port" --dashboard-host=127.0.0.1 --dashboard-port="$dashboard" \
        --ray-client-server-port=$((dashboard + 1)) --temp-dir="$folder/ray"
    for _ in $(seq 60); do
        count=$(nodes)
        if [[ $count -eq 1 && ! -e $folder/second.pid ]]; then
            # Own folder: in a shared one this node would unpack a job's files again, under the running job.
            start second --address="127.0.0.1:$port" --temp-dir="$folder/ray2"
        fi
        if [[ $count -eq 2 ]]; then
            cat << END
Ray is up: 2 nodes x $cpus CPUs on loopback. In your shell:
  export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$RAY_AUTH_TOKEN_PATH
  export RAY_ADDRESS=127.0.0.1:$port RAY_API_SERVER_ADDRESS=$RAY_API_SERVER_ADDRESS
Then: python -m diffscale.train ...   or   cluster/local/cluster.sh submit train ...
END
            return
        fi
        sleep 1
    done
    echo "Ray did not start; see $folder/head.log" >&2
    exit 1
}

alive() { # whether a process group has processes left that are not zombies
    ps -e -o pgid=,stat= | awk -v group="$1" '$1 == group && $2 !~ /^Z/ { found = 1 } END { exit !found }'
}

down() {
    local name pid
    for name in second head; do # both at once: `ray start --block` lets its node finish, for up to 30 s
        if [[ -s $folder/$name.pid ]]; then kill -TERM "$(< "$folder/$name.pid")" 2> /dev/null || true; fi
    done
    for name in second head; do
        [[ -s $folder/$name.pid ]] || continue
        pid=$(< "$folder/$name.pid")
        for _ in $(seq 175); do alive "$pid" || break; sleep 0.2; done
        kill -KILL -- "-$pid" 2> /dev/null || true
        rm -f "$folder/$name.pid"
    done
}

case ${1:-} in
    up) up ;;
    down) down ;;
    status) ray status --address="127.0.0.1:$port" ;;
    submit)
        shift
        cd "$here/../.."
        exec python -m diffscale.submit -- "$@"
        ;;
    *)
        echo "usage: $0 up | down | status | submit COMMAND ..." >&2
        exit 2
        ;;
esac
