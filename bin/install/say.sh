# How the set-up scripts speak: a line for each step, and for a failure what is wrong and how to fix it.
say() { printf 'setup: %s\n' "$1"; }
die() {
    printf 'setup: %s\n       %s\n' "$1" "$2" >&2
    exit 1
}
