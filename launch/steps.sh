# shellcheck shell=bash
# Sourced by the launchers. `step COMMAND...` prints a command, on stderr, and runs it;
# with DRY_RUN=1 it is only printed.
step() {
  local word line="+"
  for word in "$@"; do
    [[ $word =~ ^[[:alnum:]@%_+=:,./-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  echo "$line" >&2
  [ -n "${DRY_RUN:-}" ] || "$@"
}

need() {  # the variables that a launcher cannot do without
  local name
  for name in "$@"; do
    if [ -z "${!name:-}" ]; then
      echo "error: the variable $name is not set; launch/README.md says what it is" >&2
      exit 2
    fi
  done
}
