#!/usr/bin/env bash
# two_hosts.sh try|up|power|down FOLDER [HOST]: two hosts n1 and n2 on this machine, for tests of launches over ssh.
# A host has its own network, processes, host name and /dev/shm, and an sshd as process 1; all other files are shared.
# `try` fails where this machine allows no such hosts, as in most containers. `up` starts what is missing, `power` cuts a
# host's cable and ends its processes, `down` removes everything by what FOLDER records.
set -euo pipefail
what=$1 folder=$2 user=$(getent passwd "$(id -u)" | cut -d: -f6)
tag=mk$(cksum <<<"$folder" | cut -c1-5) # of this folder alone: two test runs may be on one machine
net=10.$((16#$(md5sum <<<"$folder" | cut -c1-2))).77

# what has ended and waits for its parent has no program any more
host_is_up() { [ -e "/proc/$(cat "$folder/$1/pid" 2>/dev/null || echo none)/exe" ]; }

end_host() { # its process 1, with which all others end
  ! host_is_up "$1" || kill -KILL "$(cat "$folder/$1/pid")"
  while host_is_up "$1"; do sleep 0.1; done
}

can_be_made() {
  ip link add "${tag}b" type bridge
  ip link del "${tag}b"
  ip link add "${tag}v1" type veth peer name "${tag}v2"
  ip link del "${tag}v1"
  ip netns add "$tag-n1"
  ip netns del "$tag-n1"
  unshare --mount --uts --ipc --pid --fork --mount-proc mount -t tmpfs tmpfs /dev/shm
}

prepare() {
  mkdir -p "$folder/ssh" "$folder/bin" /run/sshd "$user/.ssh"
  echo "$tag" >"$folder/tag" # with which all that the kernel knows by name begins
  chmod 700 "$folder/ssh"
  ssh-keygen -q -t ed25519 -N '' -f "$folder/ssh/id_ed25519"
  cp "$folder/ssh/id_ed25519.pub" "$folder/ssh/authorized_keys"
  # names from this file alone: torch would wait for a DNS server at each connection
  echo 'hosts: files' >"$folder/nsswitch.conf"
  echo '127.0.0.1 localhost' >"$folder/hosts"
  printf 'Host *\n IdentityFile %s\n UserKnownHostsFile /dev/null\n StrictHostKeyChecking no\n LogLevel ERROR\n' \
    "$folder/ssh/id_ed25519" >"$folder/ssh/config"
  for i in 1 2; do
    mkdir "$folder/n$i"
    ssh-keygen -q -t ed25519 -N '' -f "$folder/n$i/key"
    echo "$net.1$i n$i" >>"$folder/hosts"
    echo "n$i slots=1" >>"$folder/hostfile"
    printf 'Host n%s\n HostName %s\n' "$i" "$net.1$i" >>"$folder/ssh/config"
  done
  printf '#!/bin/sh\nexec /usr/bin/ssh -F "%s" "$@"\n' "$folder/ssh/config" >"$folder/bin/ssh"
  chmod 755 "$folder/bin/ssh"
  ip link add "${tag}b" type bridge
  ip addr add "$net.1/24" dev "${tag}b"
  ip link set "${tag}b" up
}

start_host() { # NUMBER
  local name=n$1 space=$tag-n$1 link=${tag}v$1
  if [ ! -e "/run/netns/$space" ]; then
    ip netns add "$space"
    ip link add "$link" type veth peer name eth0 netns "$space"
    ip link set "$link" master "${tag}b"
    ip -n "$space" addr add "$net.1$1/24" dev eth0
    ip -n "$space" link set lo up
    ip -n "$space" link set eth0 up
  fi
  ip link set "$link" up
  # shellcheck disable=SC2016 # for the shell in the new name spaces
  setsid ip netns exec "$space" unshare --mount --uts --ipc --pid --fork --kill-child --mount-proc sh -c '
    hostname "$1"
    mount --bind "$2/hosts" /etc/hosts
    mount --bind "$2/nsswitch.conf" /etc/nsswitch.conf
    mount --bind "$2/ssh" "$3/.ssh"
    mount -t tmpfs tmpfs /dev/shm
    exec /usr/sbin/sshd -D -e -f /dev/null -o ListenAddress="$4" -o HostKey="$2/$1/key" -o PidFile=none \
      -o AuthorizedKeysFile="$2/ssh/authorized_keys" -o UsePAM=no -o StrictModes=no -o UseDNS=no -o MaxStartups=100
  ' _ "$name" "$folder" "$user" "$net.1$1" >"$folder/$name/log" 2>&1 </dev/null &
  echo "$!" >"$folder/$name/pid" # unshare, which takes its child with it
  for _ in {1..50}; do
    "$folder/bin/ssh" -o ConnectTimeout=1 "$name" true 2>/dev/null && return
    sleep 0.1
  done
  cat "$folder/$name/log" >&2
  return 1
}

case $what in
  try) can_be_made ;;
  up)
    [ -e "$folder/hostfile" ] || prepare
    for i in 1 2; do host_is_up "n$i" || start_host "$i"; done
    ;;
  power)
    ip link set "${tag}v${3#n}" down
    end_host "$3"
    ;;
  down)
    for i in 1 2; do
      end_host "n$i"
      ip link del "${tag}v$i" 2>/dev/null || true # now: with its name space it would go some time later
      ip netns del "$tag-n$i" 2>/dev/null || true
    done
    ip link del "${tag}b" 2>/dev/null || true
    ;;
esac
