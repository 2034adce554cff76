#!/usr/bin/env bash
# Builds the programs of a real Kubernetes from Go modules at the versions pinned in e2e/pins, once, and
# keeps the binaries outside the tree. A family is keyed by the hash of its pins and of this script.
#
#   e2e/cluster/build-tools.sh            build what is missing, print the folder with the links
#   e2e/cluster/build-tools.sh FAMILY...  only these families
#
# LAMINA_CACHE  where binaries are kept (default: $XDG_CACHE_HOME/lamina or ~/.cache/lamina)
# The links to all binaries are in $LAMINA_CACHE/cluster-tools/bin.
set -euo pipefail

case "${1:-}" in -h|--help) sed -n '2,9p' "$0" | cut -c3-; exit 0 ;; esac

here=$(cd "$(dirname "$0")" && pwd)
pins="$here/../pins"
cache="${LAMINA_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/lamina}"
tools="$cache/cluster-tools"
mkdir -p "$tools/bin"

say() { printf '%s build-tools: %s\n' "$(date +%H:%M:%S)" "$*"; }

# The families in this order: those that share compiled packages stand next to each other.
families=("$@")
[ ${#families[@]} -gt 0 ] || families=(runc cni etcd containerd kubernetes csi csi-sanity helm)

key_of() { cat "$pins/$1/go.mod" "$pins/$1/go.sum" "$0" | sha256sum | cut -c1-16; }

build_one() {
  local family=$1 out=$2
  export CGO_ENABLED=0 GOFLAGS="-buildvcs=false -trimpath -mod=readonly" GOBIN="$out" GOTOOLCHAIN=local
  local ldflags="-s -w"
  cd "$pins/$family"
  case "$family" in
    kubernetes)
      local v=k8s.io/component-base/version
      ldflags="$ldflags -X $v.gitVersion=v1.36.3 -X $v.gitMajor=1 -X $v.gitMinor=36"
      go install -ldflags "$ldflags" tool ;;
    etcd)
      go build -ldflags "$ldflags" -o "$out/etcd" go.etcd.io/etcd/server/v3
      go build -ldflags "$ldflags" -o "$out/etcdctl" go.etcd.io/etcd/etcdctl/v3 ;;
    runc)
      # Without the seccomp tag every pod fails with "seccomp: config provided but seccomp not supported".
      CGO_ENABLED=1 go install -tags seccomp -ldflags "$ldflags" tool ;;
    *)
      go install -ldflags "$ldflags" tool ;;
  esac
}

built=0
for family in "${families[@]}"; do
  [ -f "$pins/$family/go.mod" ] || { echo "build-tools: no such family: $family (have: $(ls "$pins" | tr '\n' ' '))" >&2; exit 2; }
  dir="$tools/$family-$(key_of "$family")"
  if [ ! -e "$dir/.complete" ]; then
    if [ "$family" = runc ] && ! pkg-config --exists libseccomp 2>/dev/null; then
      say "installing libseccomp-dev (runc needs it)"
      apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq libseccomp-dev pkg-config >/dev/null
    fi
    say "building $family (minutes on a cold machine)"
    rm -rf "$dir.part"; mkdir -p "$dir.part"
    start=$SECONDS
    ( build_one "$family" "$dir.part" )
    touch "$dir.part/.complete"
    rm -rf "$dir"; mv "$dir.part" "$dir"
    say "$family built in $((SECONDS - start)) s"
    built=1
  fi
  for binary in "$dir"/*; do ln -sfn "$binary" "$tools/bin/$(basename "$binary")"; done
done
if [ -e "$tools/bin/server" ]; then rm -f "$tools/bin/server"; fi
[ "$built" = 0 ] || say "binaries linked in $tools/bin"
echo "$tools/bin"
