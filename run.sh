#!/usr/bin/env bash
# The only door: finds or makes a Python with what the command needs, looks at the machine, prints
# the command that it runs, and runs it. `./run.sh --help` lists the commands; data/doctor.py, which
# needs nothing but Python, answers the questions. No arrays: macOS has bash 3.2.
# shellcheck disable=SC2086 # lists of plain words are meant to split, and set -f keeps globs off
set -euf

root=$(cd "$(dirname "$0")" && pwd)
at=$root/ # in front of the repository's paths; the user's own start from where the user is
if [ "$PWD" = "$root" ]; then at=; fi
venv=${at}.venv/bin/python torch=torch
tested="torch numpy hub data plot records hf eval test"
workers="-n auto --maxprocesses 8 --dist worksteal"

say() { printf 'run.sh: %s\n' "$*" >&2; }
die() { say "$*" && exit 2; }
dry() { [ -n "${RUN_SH_DRY:-}" ]; }

usage() { # lists the lines of the last case statement whose file is there
  cat <<'TEXT'
Usage: ./run.sh [COMMAND] [options]        ./run.sh COMMAND --help explains a command's options
Without a command: the speedrun where there are an NVIDIA GPU and tokens, otherwise the demo.

TEXT
  sed -n 's/^  \([a-z]*\)) \(.*\) ;; # /\1 \2#/p' "$0" | while read -r name line; do
    file=$(printf '%s\n' "$line" | sed -n 's/.*}\([a-z_/]*\.py\)".*/\1/p')
    if [ -e "$root/$file" ]; then printf '  %-9s %s\n' "$name" "${line##*#}"; fi
  done
  cat <<'TEXT'

speedrun has train_gpt.py's options, and --gpus N (or NPROC=N) for fewer GPUs than are here.
RUN_SH_DRY=1 prints the command and stops; PYTHON=PATH is tried before python3.
Exit codes: 0 done, 2 bad input, 3 loss not finite, 4 a peer lost, 5 out of memory, 75 saved on a
signal; with several GPUs also torchrun's 1, where a run ends before it has a folder.
TEXT
}

show() { # prints a command so that it can be pasted
  printf '+' >&2
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_./,=+:@%-]*) printf " '%s'" "$word" >&2 ;;
      *) printf ' %s' "$word" >&2 ;;
    esac
  done
  printf '\n' >&2
}

missing() { "$py" "$root/data/doctor.py" --missing "$@"; }

pick() { # -> $py: the present Python, or .venv where that lacks torch and .venv is there
  for base in "${PYTHON:-python3}" python3 python3.14 python3.13 python3.12 python3.11 "$venv" ''
  do
    if "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then break; fi
  done
  if [ -z "$base" ]; then die "no Python 3.11 or newer: install one, or set PYTHON=PATH"; fi
  py=$base
  if [ -n "$(missing $torch)" ] && "$venv" -c 'import pip' 2>/dev/null; then py=$venv; fi
}

use() { # use GROUP...: -> $py with these groups of requirements.txt (+GROUP: nice to have)
  pick
  if dry || [ -z "$(missing "$@")" ]; then return; fi
  if [ "$py" = "$base" ] && [ -n "$(missing $torch)" ]; then # not ours and no torch: leave it
    py=$venv
    say "making ${at}.venv"
    "$base" -m venv --clear "${at}.venv" >&2 ||
      die "$base cannot make a virtual environment (on Debian: apt install python3-venv)"
  fi
  wanted=$(missing "$@") quiet=-qq wheels=
  say "installing for $py, which can take minutes:" $wanted
  if [ -t 2 ]; then quiet=; fi
  case $wanted in torch*) wheels=$("$py" "$root/data/doctor.py" --cpu-wheels) ;; esac
  "$py" -m pip install --disable-pip-version-check --retries 2 $quiet $wheels $wanted >&2 || true
  wanted=$(missing "$@" --must)
  if [ -n "$wanted" ]; then die "could not install" $wanted "for $py: is there a network?"; fi
  wanted=$(missing "$@")
  if [ -n "$wanted" ]; then say "could not install" $wanted "and goes on without"; fi
}

go() { # go GROUP... -- ARG...: python ARG... with these groups
  groups=
  while [ "$1" != -- ]; do groups="$groups $1" && shift; done
  shift
  if [ "$1" != -m ] && [ ! -e "$1" ]; then die "$1 is not there: this checkout is not whole"; fi
  use $groups
  show "$py" "$@"
  if dry; then exit 0; fi
  exec "$py" "$@"
}

speedrun() { # speedrun asked|bare WORD...
  pick
  plan=$("$base" "$root/data/doctor.py" --plan "$@") || exit
  how=$1
  eval "set -- $plan" # shell words, quoted by doctor.py
  main=$1 gpus=$2 tokens=$3 script=$4 run=$5
  shift 5
  if [ "$main" = demo ]; then exec "$root/run.sh" demo; fi
  if [ "$main" = help ]; then go torch numpy -- "$at$script" --help; fi
  torch="torch cuda"
  use $torch numpy
  if [ "$tokens" != have ]; then fetch "$tokens" "$how"; fi
  if [ "$gpus" = 1 ]; then go $torch numpy -- "$at$script" "$@"; fi
  set -- -m torch.distributed.run --standalone --nproc-per-node "$gpus" "$at$script" "$@"
  show "$py" "$@"
  if dry; then exit 0; fi
  torchrun "$run/exit.json" "$@"
}

fetch() { # fetch SHARDS bare|asked: where the hub fails, a bare ./run.sh still has the demo
  use $torch numpy +hub
  show "$py" "${at}data/get.py" fineweb-edu --shards "$1"
  if dry || "$py" "${at}data/get.py" fineweb-edu --shards "$1"; then return; else code=$?; fi
  if [ "$code$2" = 2bare ]; then say "no tokens: this is the demo" && exec "$root/run.sh" demo; fi
  exit "$code"
}

torchrun() { # torchrun FILE WORD...: it returns 1 whatever its workers return, so FILE counts
  said=$1 since=$(mktemp)
  shift
  "$py" "$@" &
  job=$!
  trap 'kill -TERM $job' TERM
  trap : INT # the terminal has told torchrun, too: wait until it has saved
  while wait $job; code=$? && kill -0 $job 2>/dev/null; do :; done
  if [ -e "$said" ] && ! [ "$said" -ot "$since" ]; then # not one of a run before
    code=$(sed -n 's/.*"code": *\([0-9]*\).*/\1/p' "$said")
  fi
  rm -f "$since"
  exit "${code:-1}"
}

case ${1:-} in
  -h | --help | help) usage && exit ;;
  '' | -*) speedrun bare "$@" ;;
esac
command=$1
shift
case $command.${1:-} in
  data.text) more=+data ;;
  data.fineweb*) more=+hub ;;
  records.replay) more=torch ;;
  *) more= ;;
esac
case $command in # a line here is a command: its groups, its file, and its purpose for --help
  speedrun) speedrun asked "$@" ;; # trains on FineWeb-Edu, or --data DIR, with the NVIDIA GPUs here
  demo) go torch numpy +plot -- "${at}records/demo.py" "$@" ;; # two small models on a CPU, minutes
  data) go numpy $more -- "${at}data/get.py" "$@" ;; # downloads tokens, or tokenises text
  look) go torch numpy +hf +data -- "${at}evals/look.py" "$@" ;; # a page of where the heads look
  compare) go torch numpy records +plot -- "${at}records/compare.py" "$@" ;; # arms, block by block
  eval) go torch numpy hf eval +data -- "${at}evals/harness.py" "$@" ;; # Evaluation Harness
  export) go torch numpy hf +data -- "${at}evals/export.py" "$@" ;; # writes a Hugging Face folder
  finetune) go torch numpy hf +data +plot +records -- "${at}evals/finetune.py" "$@" ;; # CoQA, CSQA
  records) go numpy records $more -- "${at}records/leaderboard.py" "$@" ;; # check, replay
  sample) go torch numpy +data -- "${at}evals/sample.py" "$@" ;; # writes text with a trained model
  doctor) go -- "${at}data/doctor.py" "$@" ;; # says what this machine has, and what would run
  test) cd "$root" && go $tested -- -m pytest -q $workers "$@" ;; # runs the tests
  *) die "there is no command '$command': ./run.sh --help lists them" ;;
esac
