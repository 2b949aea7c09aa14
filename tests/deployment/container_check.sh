#!/usr/bin/env bash
# Checks the default compose file, once it is up: a run of MAML over five hospitals' containers gives the same
# meta-state as one process does; a hospital that is killed in a round is named, and the run continues; clients without
# the federation's certificates and keys are refused; 200 idle clients cost the gate little memory and no site its reply
# (how long a round takes with them and without is printed: a time depends on what else the machine does);
# certificates are renewed while a run is on; a revoked site is out; what runs submitted code reaches its node alone.
#
# Runs where `podman` finds the containers of compose project $P, made from $IMAGE, in the project's folder. Services
# wait for their keys and data, which are made here. ROUNDS sets the length of the first run.
set -euo pipefail
P=${P:-fedmeta} IMAGE=${IMAGE:-localhost/fedmeta:dev}
ROUNDS=${ROUNDS:-$((${CHECK_S:-240} >= 400 ? 10 : 3))}
CERTS=$(realpath -m "${FEDMETA_CERTS:-docker/certs}") DATA=$(realpath -m "${FEDMETA_DATA:-docker/data}")
HEART=$(realpath -m ../shared/data/heart)
SITES=(hospital-a hospital-b hospital-c hospital-d hospital-e)
WORK=$(mktemp -d) T0=$SECONDS
trap 'rm -rf "$WORK"; [ -z "${MADE:-}" ] || rm -rf "$CERTS" "$DATA"' EXIT
say() { printf '== %3d s  %s\n' $((SECONDS - T0)) "$*"; }
die() { say "FAILED: $*"; exit 1; }
tool() { podman run --rm -i --network none --user 0 --entrypoint "" "$@"; }
server() { podman exec -i "${P}_serverapp_1" "$@"; }
last() { tail -1 "$2" | tool "$IMAGE" python -c "import json, sys; s = json.load(sys.stdin); print($1)"; }
within() { local s=$1; shift; until "$@" >/dev/null 2>&1; do ((s-- > 0)) || return 1; sleep 1; done; }

# What is made here is removed at the end, and must not be anybody's: only empty folders may be there.
[ -z "$(find "$CERTS" "$DATA" -type f 2>/dev/null | head -1)" ] ||
    die "$CERTS or $DATA holds files; set FEDMETA_CERTS and FEDMETA_DATA to other folders"
MADE=1
mkdir -p "$CERTS" "$DATA" "$WORK/local"
mounts=(-v "$DATA:/data"); [ ! -e "$HEART/heart.npz" ] || mounts+=(-v "$HEART:/heart:ro")
tool "${mounts[@]}" "$IMAGE" python - /data /heart/heart.npz <tests/deployment/cut_hospitals.py
names=(); for site in "${SITES[@]}" intruder; do names+=(--site "$site"); done
tool -v "$CERTS:/certs" "$IMAGE" fedmeta certs --out /certs --server fl.example.org "${names[@]}" >/dev/null
chown -R 10001:10001 "$CERTS" "$WORK/local"; chmod 711 "$WORK"
say "keys and files are made"

cat >"$WORK/heart.toml" <<X
[data]
source = "tables"
path = "/data/all"
new_sites = 1
[model]
name = "logistic"
[learner]
name = "maml"
inner_steps = 3
[server]
rounds = $ROUNDS
sites_per_round = 0
wait_for = ["hospital-a", "hospital-b", "hospital-c", "hospital-d", "hospital-e"]
round_timeout = 90.0
[evaluation]
every = 0
[runtime]
engine = "vmap"
X
tool -v "$DATA:/data:ro" -v "$WORK:/here" -w /here/local "$IMAGE" \
    fedmeta run /here/heart.toml --set tracking.uri=none --json >"$WORK/local.json" 2>"$WORK/local.log" &
LOCAL=$!

within 60 podman healthcheck run "${P}_superlink_1" || die "the SuperLink is not well"
within 30 podman healthcheck run "${P}_gate_1" || die "the gate is not well"
say "SuperLink and gate are well"
registered=()
for site in "${SITES[@]}"; do
    server fedmeta flower supernode register /dev/stdin --name "$site" <"$CERTS/sites/$site/node.pub" \
        >"$WORK/$site.log" 2>&1 & registered+=($!)
done
for pid in "${registered[@]}"; do wait "$pid" || { cat "$WORK"/hospital-*.log; die "a key was not registered"; }; done
say "five keys are registered"
within 60 podman healthcheck run "${P}_mlflow_1" || die "MLflow is not well"
# Its first answer starts what it left to that, and takes long on a busy machine.
within 60 server python -c "import urllib.request
urllib.request.urlopen('http://mlflow:5000/api/2.0/mlflow/experiments/search?max_results=1', timeout=60)" ||
    die "MLflow does not answer"
server sh -c 'cat >/tmp/heart.toml' <"$WORK/heart.toml"
wait "$LOCAL" || { cat "$WORK/local.log"; die "the local run failed"; }
say "MLflow is well, and the local run is done"

server fedmeta run /tmp/heart.toml --runtime deployment --json >"$WORK/deployed.json" 2>"$WORK/deployed.log" ||
    { cat "$WORK/deployed.log"; die "the deployed run failed"; }
say "$ROUNDS rounds over containers are done"
tail -1 "$WORK/deployed.json" | server sh -c 'cat >/tmp/deployed.json'
tail -1 "$WORK/local.json" | sed 's#/here/local#/tmp/local#g' | server sh -c 'cat >/tmp/local.json'
tar -C "$WORK" -c local | server tar -C /tmp -x
server python - /tmp/deployed.json /tmp/local.json http://mlflow:5000 "${SITES[@]}" <tests/deployment/compare_runs.py ||
    die "the deployed run is not the local one"
podman logs "${P}_hospital-a-app_1" >"$WORK/app.log" 2>&1
! grep "no copy of a process could be had" "$WORK/app.log" || die "a hospital's app started a process where a copy would have done"
say "it is the local run, and MLflow has every site"

# A run that loses a hospital, and clients that must not get in meanwhile. A reply is given up after twice the time that a round took.
round_s=$(last 'int(s["wall_s"] / (s["rounds"] + 1)) + 1' "$WORK/deployed.json")
say "a round took about $round_s s"
second_rounds() { podman logs "${P}_hospital-c-node_1" 2>&1 | grep -c "ROUND 2\]" || true; }
before=$(second_rounds)
server fedmeta run /tmp/heart.toml --runtime deployment --json --set server.rounds=2 \
    --set server.round_timeout=$((2 * round_s + 5)) \
    >"$WORK/killed.json" 2>"$WORK/killed.log" & RUN=$!
ENDED="Failed to initialize the connection|SuperNode terminated gracefully"
outsider() { # NAME NETWORK SUPERLINK WORDS...: a SuperNode beside hospital-a's that must not get in
    local name=$1 network=$2 superlink=$3; shift 3
    timeout 90 podman run --rm --name "${P}_$name" --network "${P}_$network" --tmpfs /tmp \
        -v "$CERTS/sites/intruder:/certs:ro" -v "$DATA/$name:/data:ro" "$IMAGE" \
        flower-supernode --superlink "$superlink" --max-retries 2 --node-config "site=\"$name\" data=\"/data/$name.csv\"" \
        "$@" >"$WORK/$name.log" 2>&1
}
# Through hospital-a's egress a certificate is shown, and the key is not registered; at the gate itself none is shown.
KEYED=(--root-certificates /certs/public/ca.crt --auth-supernode-private-key /certs/node.key)
outsider intruder hospital-a-way hospital-a-egress:8443 "${KEYED[@]}" & KEY=$!
outsider eavesdropper hospital-a-out gate:8443 --insecure & PLAIN=$!
outsider uncertified hospital-a-out gate:8443 "${KEYED[@]}" & BARE=$!
reaches() { podman exec "${P}_hospital-a-app_1" python -c \
    "import socket; socket.create_connection(('$1', $2), timeout=3)" >/dev/null 2>&1; }
reaches hospital-a-node 9094 || die "a hospital's app does not reach its node"
for host in gate:8443 hospital-a-egress:8443 superlink:8000 mlflow:5000 hospital-b-node:9094; do
    ! reaches "${host%:*}" "${host#*:}" || die "what runs submitted code at a hospital reaches $host"
done
[ "$(podman exec "${P}_hospital-a-app_1" ls /data)" = hospital-a.csv ] || die "a hospital sees more than its own file"
! podman exec "${P}_hospital-a-app_1" cat /certs/node.key 2>/dev/null || die "submitted code can read the node's key"
podman exec -e FEDMETA_SUPERLINK=gate:8443 "${P}_serverapp_1" fedmeta flower list >"$WORK/list.log" 2>&1 &&
    die "runs can be submitted from outside, through the gate"
say "the gate keeps the SuperLink's other interfaces, and a hospital's app reaches its node alone"

begun() { [ "$(second_rounds)" -gt "$before" ]; }
within $((5 * round_s + 60)) begun || { cat "$WORK/killed.log"; die "the second run does not get to its second round"; }
podman kill "${P}_hospital-c-node_1" >/dev/null
say "hospital-c is killed in round 2"
# Flower's node ends of itself, gracefully where the gate answers 401; one that the time limit ended was not refused.
refused() { local code=0; wait "$1" || code=$?; [ "$code" != 124 ] && grep -qE "$ENDED" "$2" && ! grep -q "SuperNode ID" "$2"; }
refused "$KEY" "$WORK/intruder.log" || { cat "$WORK/intruder.log"; die "an unregistered key was not refused"; }
refused "$PLAIN" "$WORK/eavesdropper.log" || { cat "$WORK/eavesdropper.log"; die "plain text was not refused"; }
refused "$BARE" "$WORK/uncertified.log" || { cat "$WORK/uncertified.log"; die "a client without certificate was not refused"; }
say "an unregistered key, a plain-text client and one without certificate are refused"
wait "$RUN" || { cat "$WORK/killed.log"; die "the run did not survive a hospital's end"; }
grep -q "hospital-c" "$WORK/killed.log" || { cat "$WORK/killed.log"; die "who failed is not named"; }
[ "$(last 's["rounds"]' "$WORK/killed.json")" = 2 ] || die "the second run is too short"
[ "$(last 's["failures"]' "$WORK/killed.json")" -ge 1 ] || die "no failure was counted"
server python -c "import sys; from mlflow import MlflowClient
path = MlflowClient('http://mlflow:5000').download_artifacts(sys.argv[1], 'failures.json', '/tmp'); print(open(path).read())" \
    "$(last 's["run_id"]' "$WORK/killed.json")" >"$WORK/failures.json" 2>"$WORK/missed.log" ||
    { cat "$WORK/missed.log"; die "MLflow does not give what the run missed"; }
grep -q hospital-c "$WORK/failures.json" || { cat "$WORK/failures.json"; die "MLflow does not name who was lost"; }
say "the run finished without hospital-c and named it"


# 200 clients that connect to the gate and stay silent, half of them after the first bytes of a handshake, while a run is
# on; each comes back when the gate ends its connection. And meanwhile certificates are renewed.
cat >"$WORK/flood.py" <<X
import socket, sys, time
until, held = time.monotonic() + float(sys.argv[1]), {}
while time.monotonic() < until:
    for number in range(200):
        try:
            if number not in held:
                held[number] = socket.create_connection(("gate", 8443), timeout=5)
                held[number].setblocking(False)
                if number % 2:
                    held[number].sendall(bytes([22, 3, 1, 2, 0, 1]))
            elif not held[number].recv(1):
                raise OSError
        except BlockingIOError:
            pass
        except OSError:
            held.pop(number, None)
    time.sleep(0.2)
print(len(held), flush=True)
X
memory() { podman exec "${P}_gate_1" python -c "import os; print(sum(int(open(f'/proc/{p}/statm').read().split()[1]) * 4
    for p in os.listdir('/proc') if p.isdigit() and b'nginx' in open(f'/proc/{p}/cmdline', 'rb').read()))"; }
serial() { tool -v "$CERTS:/certs:ro" "$IMAGE" openssl x509 -noout -serial -in "/certs/$1"; }
podman start "${P}_hospital-c-node_1" >/dev/null
quiet_s=$(last 'round(s["wall_s"] / (s["rounds"] + 1), 2)' "$WORK/deployed.json")
quiet_kb=$(memory) old=$(serial server/tls.crt)
podman run --rm --name "${P}_flood" --network "${P}_hospital-b-out" -v "$WORK/flood.py:/flood.py:ro" \
    --entrypoint "" "$IMAGE" python /flood.py 60 >"$WORK/flood.log" 2>&1 & FLOOD=$!
server fedmeta run /tmp/heart.toml --runtime deployment --json >"$WORK/flooded.json" 2>"$WORK/flooded.log" & RUN=$!
sleep 15
flood_kb=$(memory)
tool -v "$CERTS:/certs" "$IMAGE" fedmeta certs --out /certs --renew >/dev/null; chown -R 10001:10001 "$CERTS"
renewed() { [ "$(podman exec "${P}_serverapp_1" python -c "import socket, ssl
c = ssl.create_default_context(cafile='/certs/ca.crt'); c.check_hostname = False
s = c.wrap_socket(socket.create_connection(('gate', 8443), 5)); print('serial=' + s.getpeercert()['serialNumber'])")" != "$old" ]; }
within 60 renewed || die "the gate does not show the renewed certificate"
wait "$RUN" || { cat "$WORK/flooded.log"; podman logs "${P}_gate_1" 2>&1 | tail -20; die "flood and renewal ended the run"; }
wait "$FLOOD" || { cat "$WORK/flood.log"; die "the flood did not end"; }
flood_s=$(last 'round(s["wall_s"] / (s["rounds"] + 1), 2)' "$WORK/flooded.json")
say "200 idle clients ($(tail -1 "$WORK/flood.log") held at the end) cost the gate $((flood_kb - quiet_kb)) KB;" \
    "a round took $flood_s s with them and $quiet_s s without; certificates were renewed meanwhile"
[ $((flood_kb - quiet_kb)) -lt 102400 ] || die "the flood costs 100 MB or more"
[ "$(last 's["failures"]' "$WORK/flooded.json")" = 0 ] || { cat "$WORK/flooded.json"; die "the flood costs a site's reply"; }

tool -v "$CERTS:/certs" "$IMAGE" fedmeta certs --out /certs --revoke hospital-e >/dev/null; chown -R 10001:10001 "$CERTS"
out() { podman logs "${P}_hospital-e-node_1" 2>&1 | tail -40 | grep -qE "$ENDED"; }
within 90 out || { podman logs --tail 20 "${P}_hospital-e-node_1"; die "a revoked site still gets in"; }
say "a revoked site is out"
