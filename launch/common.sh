# shellcheck shell=bash
# What the launch scripts share; they source it. Bash 3.2, which macOS has, is enough.
#   take_words WORD …  sets words (all but --dry-run), workdir and config; refuses what `main` would
#                      refuse at once
#   run WORD …         runs a command; with --dry-run or DRY_RUN=1 prints it instead, on one line
#                      and quoted for bash

dry_run=${DRY_RUN:-}
[ "$dry_run" != 0 ] || dry_run=
words=() workdir='' config='' mode=train

die() {  # a mistake in what was typed: one line, exit code 2
  printf '%s: %s\n' "$(basename "$0")" "$1" >&2
  exit 2
}

say() { printf '%s: %s\n' "$(basename "$0")" "$1" >&2; }

show_help() {  # the head comment of the script
  sed -n '2,/^[^#]/ s/^#\( \|$\)//p' "$0"
  exit 0
}

quote() {  # the words on one line, as bash reads them back
  local word separator=''
  for word in "$@"; do
    printf '%s' "$separator"
    case $word in
      *[[:cntrl:]]* | *'$'*) printf '%q' "$word" ;;  # Kubernetes would read $(…) even within quotes
      '' | *[!A-Za-z0-9_./:=@%+,-]*) printf "'%s'" "$(printf '%s' "$word" | sed "s/'/'\\\\''/g")" ;;
      *) printf '%s' "$word" ;;
    esac
    separator=' '
  done
}

run() {
  if [ -z "$dry_run" ]; then "$@"; return; fi
  quote "$@"
  printf '\n'
}

take_words() {
  local word
  while [ $# -gt 0 ]; do
    word=$1
    case $word in
      -h | --help) show_help ;;
      --dry-run) dry_run=1; shift; continue ;;
      --config | --workdir | --mode)
        [ $# -gt 1 ] || die "$word needs a value"
        word="$1=$2"
        shift ;;
    esac
    case $word in
      --config=*) config=${word#*=} ;;
      --workdir=*)
        workdir=${word#*=}
        workdir=${workdir/#'~/'/$HOME/} ;;  # bash does not expand ~ within a word
      --mode=*) mode=${word#*=} ;;
      -*) ;;
      *) die "$word is no flag: write --NAME=VALUE in one word, overrides --config.KEY=VALUE" ;;
    esac
    words+=("$word")
    shift
  done
  [ "$mode" != train ] || [ -n "$config" ] ||
    die 'give --config=configs/NAME.py and --workdir=DIR (--help says more)'
  case $mode in
    pack | reference | compile) ;;  # they have no workdir
    *) [ -n "$workdir" ] || die 'give --workdir=DIR (--help says more)' ;;
  esac
}

alone() {  # a verb takes no words but --dry-run
  case $#${2:-} in
    1) ;;
    2--dry-run) dry_run=1 ;;
    *) die "$1 takes no more words" ;;
  esac
}

need() {  # every variable named must be set
  local name
  for name in "$@"; do
    [ -n "${!name:-}" ] || die "set $name (--help says more)"
  done
}

whole() {  # the whole number in the variable named $1, $2 if it is not set
  local value=${!1:-$2}
  case $value in *[!0-9]*) die "$1 is '$value', but must be a whole number" ;; esac
  printf '%s' "$value"
}

need_remote_words() {  # for machines that share no disk and get a copy of the checkout $1
  [ -n "$workdir" ] || die "--mode=$mode runs on one machine: use launch/local.sh"
  case $workdir in
    gs://?*/?*) ;;
    *) die "--workdir is $workdir, but these machines share no disk: give gs://BUCKET/DIR" ;;
  esac
  [ -n "$config" ] || return 0
  case $config in
    configs/*) [ -f "$1/${config%%:*}" ] || die "there is no config file ${config%%:*}" ;;
    *.py | *.py:*)
      die "--config is $config, but only the files in configs/ are copied: put it there" ;;
    *) [ -f "$1/configs/${config%%:*}.py" ] || die "there is no config ${config%%:*}" ;;
  esac
}

cache_dir() {  # where compiled programs are kept for the next start
  local place=$HOME/.cache/sphere_ar_jax/launched  # of modes without a workdir
  [ -z "$workdir" ] || place=$(dirname "$workdir")/compilation_cache
  printf '%s' "${JAX_COMPILATION_CACHE_DIR:-$place}"
}
