#!/usr/bin/env bash
# Installs from Debian what `pytest -m cluster` drives: Slurm, Prometheus, a browser, iproute2.
# Needs root on Debian; does nothing, and says so, elsewhere.
set -euo pipefail
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "tests/cluster/install.sh: not root on Debian, so the cluster tests will be skipped." >&2
  exit 0
fi
wanted=()
for package in slurm-wlm munge prometheus chromium iproute2; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q "install ok installed" || wanted+=("$package")
done
[ ${#wanted[@]} = 0 ] && exit 0
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# Their services would start where there is systemd; the tests start their own.
RUNLEVEL=1 apt-get install -qq -y --no-install-recommends "${wanted[@]}" >/dev/null
