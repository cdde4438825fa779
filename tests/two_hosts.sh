#!/usr/bin/env bash
# Two hosts on one machine: two network namespaces that see each other through a veth pair and nothing else, with one
# torchrun of one process in each. Needs root and iproute2.
#
#     tests/two_hosts.sh -m lace_lightning fit --config … --trainer.num_nodes 2 --trainer.devices 1
#
# PYTHON names the interpreter (python). Says in the end how many bytes came in over the wire; ends with the exit code
# of the first host that failed, and the other host with it.
set -uo pipefail
first=lace-a-$$ second=lace-b-$$ address=10.77.0
pids=()

clean_up() {
    for pid in "${pids[@]}"; do kill "$pid" 2> /dev/null; done
    wait
    ip netns del "$first" 2> /dev/null
    ip netns del "$second" 2> /dev/null # the pair goes with them
}
trap clean_up EXIT
trap 'exit 143' TERM INT

set -e
ip netns add "$first"
ip netns add "$second"
ip link add eth0 netns "$first" type veth peer name eth0 netns "$second"
number=1
for host in "$first" "$second"; do
    ip -n "$host" addr add "$address.$number/24" dev eth0
    ip -n "$host" link set lo up
    ip -n "$host" link set eth0 up
    number=$((number + 1))
done
set +e

rank=0
for host in "$first" "$second"; do
    GLOO_SOCKET_IFNAME=eth0 ip netns exec "$host" "${PYTHON:-python}" -m torch.distributed.run --nnodes 2 \
        --node_rank $rank --nproc_per_node 1 --master_addr "$address.1" --master_port 29500 "$@" &
    pids+=($!)
    rank=$((rank + 1))
done

wait -n || exit $?
wait -n || exit $?
echo "bytes over the wire: $(ip netns exec "$first" cat /sys/class/net/eth0/statistics/rx_bytes)"
