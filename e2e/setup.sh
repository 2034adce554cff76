#!/usr/bin/env bash
# Installs what building and testing Lamina needs, from Debian's packages. Idempotent; needs root (or run it with sudo).
# Rust (see rust-version in Cargo.toml) and Go are expected to be there.
set -euo pipefail
packages=(
  pkg-config libseccomp-dev gcc libc6-dev # runc, the linker
  g++                                     # libFuzzer
  e2fsprogs xfsprogs util-linux fio       # filesystems and their load
  iproute2 iptables busybox-static        # network namespaces, images
  qemu-utils libnbd-bin nbdkit            # peers for the NBD export
)
missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
  echo "setup: installing ${missing[*]}"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi
for tool in cargo go; do
  command -v "$tool" >/dev/null || { echo "setup: $tool is missing: install it first (README, Requirements)" >&2; exit 1; }
done
