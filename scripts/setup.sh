#!/usr/bin/env bash
# Installs what a bare Debian 12 with rustup lacks to build and test Shoal.
#
#   scripts/setup.sh build    a C compiler (ring and the tokenizer's regexes are C in part), and protoc
#                             (Raft's and etcd's messages are generated)
#   scripts/setup.sh test     that, python3 with venv (the OpenAI SDK runs against Shoal), and an etcd
#                             (the other control store runs against it)
#
# As root, or with sudo where that asks for no password, it installs; else it prints the one line to
# type and stops. What is there already is left alone, and then nothing is asked of the network.
set -euo pipefail

say() { printf 'setup: %s\n' "$*" >&2; }

packages=()
need_compiler() { command -v cc > /dev/null || packages+=(build-essential); }
need_protoc() {
    # The compiler alone lacks the types that etcd's messages import.
    command -v protoc > /dev/null && [ -e "$(dirname "$(command -v protoc)")/../include/google/protobuf/descriptor.proto" ] ||
        packages+=(protobuf-compiler libprotobuf-dev)
}
need_etcd() { command -v etcd > /dev/null || packages+=(etcd-server); }
need_python() {
    command -v python3 > /dev/null && python3 -c 'import venv, ensurepip' 2> /dev/null ||
        packages+=(python3-venv)
}

case "${1:-build}" in
build)
    need_compiler
    need_protoc
    ;;
test)
    need_compiler
    need_protoc
    need_etcd
    need_python
    ;;
*)
    say "unknown: '$1'; say build or test"
    exit 2
    ;;
esac

if ! command -v cargo > /dev/null; then
    if [ -r "$HOME/.cargo/env" ]; then
        say "cargo is installed but not on the PATH; type: . \"\$HOME/.cargo/env\""
    else
        say "there is no cargo; install rustup first: https://rustup.rs"
    fi
    exit 1
fi

if [ ${#packages[@]} -gt 0 ]; then
    install="apt-get update && apt-get install -y --no-install-recommends ${packages[*]}"
    if ! command -v apt-get > /dev/null; then
        say "missing: ${packages[*]} (names of Debian 12); install them and try again"
        exit 1
    elif [ "$(id -u)" = 0 ]; then
        say "installing ${packages[*]}"
        DEBIAN_FRONTEND=noninteractive sh -c "$install" >&2
    elif sudo -n true 2> /dev/null; then
        say "installing ${packages[*]} with sudo"
        sudo -n DEBIAN_FRONTEND=noninteractive sh -c "$install" >&2
    else
        say "missing: ${packages[*]}; type this line, then try again:"
        printf "sudo sh -c '%s'\n" "$install" >&2
        exit 1
    fi
fi

# The toolchain that rust-toolchain.toml pins.
if ! cargo --version > /dev/null 2>&1; then
    say "installing the pinned Rust toolchain"
    rustup toolchain install >&2
fi
