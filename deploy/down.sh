#!/usr/bin/env bash
# What `make down` does: stops Open WebUI and the supervised daemon that this checkout started.
set -euo pipefail
cd "$(dirname "$0")/.."
python deploy/webui.py stop
if supervisorctl -c deploy/supervisord.conf pid >/dev/null 2>&1; then
  echo "Stopping the daemon (running answers may finish)"
  supervisorctl -c deploy/supervisord.conf shutdown >/dev/null
  while supervisorctl -c deploy/supervisord.conf pid >/dev/null 2>&1; do sleep 0.2; done
fi
