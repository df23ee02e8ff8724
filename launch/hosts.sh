# shellcheck shell=bash
# hosts.sh: the hosts of a hostfile over ssh, and the processes of one launch on them. run.sh and supervise.sh source it
# after lib.sh. A launch is known by MEGAKD_LAUNCH_ID=$id in the environment of its processes, so that others of the same
# user are left alone.
SSH_OPTIONS=(-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=3)
hosts=() id=''
declare -A slots # of each host in a hostfile: its ranks

read_hosts() { # FILE: sets hosts and slots
  local lines host number
  # where DeepSpeed finds no hostfile it goes on with this machine alone
  { [ -f "$1" ] && [ -r "$1" ]; } || refuse "HOSTFILE=$1: no such file"
  lines=$(awk '{ sub(/^[ \t]+/, ""); sub(/\r$/, "") } /^#/ || /^$/ { next }
    !/^[^ \t]+[ \t]+slots=[1-9][0-9]*([ \t]|$)/ { print NR ": expected HOST slots=N, got: " $0; exit 1 }
    seen[$1]++ { print NR ": host " $1 " is named twice"; exit 1 }
    { sub(/slots=/, "", $2); print $1, $2 }' "$1") || refuse "HOSTFILE=$1, line $(tail -n 1 <<<"$lines")"
  [ -n "$lines" ] || refuse "HOSTFILE=$1: no host in it; expected lines HOST slots=N"
  while read -r host number; do
    hosts+=("$host") slots[$host]=$number
  done <<<"$lines"
}

hostfile_of() { # HOST ...: lines of a hostfile with these hosts alone
  local host
  for host; do echo "$host slots=${slots[$host]}"; done
}

ranks_on() { # HOST ...: how many ranks start on these hosts
  hostfile_of "$@" | awk -F = '{ sum += $2 } END { print sum + 0 }'
}

least_ranks() { # N: how many ranks start on the N smallest hosts
  hostfile_of "${hosts[@]}" | sort -t = -n -k 2 | head -n "$1" | awk -F = '{ sum += $2 } END { print sum + 0 }'
}

this_machine() { # is the hostfile one of this machine alone? DeepSpeed uses no ssh then
  [ "${#hosts[@]}" = 1 ] && [[ ${hosts[0]} =~ ^(localhost|127\.0\.0\.1)$ || ${hosts[0]} = "$(uname -n)" ]]
}

on_host() { # HOST SCRIPT [WORD ...]: its output
  local words=(bash -s --)
  [ $# -le 2 ] || words+=("${@:3}")
  if this_machine; then
    "${words[@]}" <<<"$2"
  else
    timeout 30 ssh "${SSH_OPTIONS[@]}" "$1" "${words[*]@Q}" <<<"$2"
  fi
}

on_all_hosts() { # SCRIPT [WORD ...]: at the same time
  local host waiting=()
  for host in "${hosts[@]}"; do
    on_host "$host" "$@" &>/dev/null &
    waiting+=($!)
  done
  wait "${waiting[@]}"
}

# shellcheck disable=SC2016 # for the bash of the hosts
OWN='of() { grep -qz "^MEGAKD_LAUNCH_ID=$1\$" "/proc/$2/environ" 2>/dev/null; }
rank() { grep -qzE "^(OMPI_COMM_WORLD_)?RANK=" "/proc/$1/environ" 2>/dev/null; }
'

end_processes() { # all that this launch has left on the hosts
  # shellcheck disable=SC2016
  on_all_hosts "$OWN"'for path in /proc/[0-9]*; do ! of "$1" "${path#/proc/}" || kill -KILL "${path#/proc/}"; done' "$id"
}

stop_ranks() { # USR1 to the ranks themselves, not to what they started: they save and end with 85
  # shellcheck disable=SC2016
  on_all_hosts "$OWN"'for path in /proc/[0-9]*; do
    process=${path#/proc/}
    of "$1" "$process" && rank "$process" || continue
    rank "$(awk "/^PPid/ { print \$2 }" "$path/status")" || kill -USR1 "$process"
  done' "$id"
}
