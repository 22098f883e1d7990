# How the launch scripts read their arguments and print their commands. Sourced, never run.
# shellcheck shell=bash

die() {
    printf 'error: %s\n' "$1" >&2
    exit 43
}

# The comment at the head of the script.
usage() {
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
}

# A word as a shell reads it back.
quote() {
    case $1 in
        "" | *[!A-Za-z0-9_./:=,@%+~-]*) printf "'%s'" "${1//\'/\'\\\'\'}" ;;
        *) printf '%s' "$1" ;;
    esac
}

# Words as one line of a shell.
show() {
    local word line=""
    for word in "$@"; do line+="$(quote "$word") "; done
    printf '%s\n' "${line% }"
}

# A string as JSON writes it, which YAML reads too.
json() {
    local text=$1
    text=${text//\\/\\\\} text=${text//\"/\\\"} text=${text//$'\n'/\\n} text=${text//$'\t'/\\t}
    printf '"%s"' "$text"
}

# Runs a command, or prints it.
call() {
    if $dry_run; then show "$@"; else "$@"; fi
}

# read_arguments "name zone" "spot" "$@": --name=X and --zone=X set variables of these names, --spot sets its own to true, and what follows "--" is left
# in the array "arguments". dry_run is true or false.
read_arguments() {
    local values=" $1 " switches=" $2 " word key valid=""
    for word in $1; do valid+="--$word= "; done
    for word in $2; do valid+="--$word "; done
    shift 2
    dry_run=false arguments=()
    while [ $# -gt 0 ]; do
        key=${1%%=*} key=${key#--}
        case $1 in
            --) shift; arguments=("$@"); return ;;
            --dry-run) dry_run=true ;;
            -h | --help) usage; exit 0 ;;
            --*=*)
                [[ $values == *" $key "* ]] || unknown "$1" "$valid"
                printf -v "${key//-/_}" %s "${1#*=}" ;;
            *)
                [[ $1 == --?* && $switches == *" $key "* ]] || unknown "$1" "$valid"
                printf -v "${key//-/_}" true ;;
        esac
        shift
    done
}

unknown() {
    die "$1 is not known (valid: $2--dry-run --help); arguments of vlm_jax.main follow --"
}

# Raises an error unless variables of these names have a value.
need() {
    local word
    for word in "$@"; do [ -n "${!word}" ] || die "--$word is missing"; done
}

need_training() {
    [ ${#arguments[@]} -gt 0 ] || die "nothing to train: give --config=... after --"
}

# Raises an error unless the variable of this name is a positive number.
need_number() {
    [[ ${!1} =~ ^[1-9][0-9]*$ ]] || die "--$1=${!1} is not a positive number"
}
