#!/usr/bin/env bash
# Stops the supervised daemon that this checkout started, and its supervisor; returns when both are gone.
set -euo pipefail
cd "$(dirname "$0")/.."
# A supervisord that is stopping already refuses commands, but its socket is taken until it is gone.
pid=$(cat run/supervisord.pid 2>/dev/null || true)
if [ -n "$pid" ] && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = supervisord ]; then
  echo "Stopping the daemon (running answers may finish)"
  supervisorctl -c deploy/supervisord.conf shutdown >/dev/null || true
  while kill -0 "$pid" 2>/dev/null; do sleep 0.1; done
fi
