#!/usr/bin/env bash
# What `make up [GGUF=/path]` does once ktd is installed: the daemon under supervisor, one question asked.
# usage: up.sh [GGUF]
set -euo pipefail
cd "$(dirname "$0")/.."
supervisor=(supervisorctl -c deploy/supervisord.conf)

# The daemon inherits its settings from supervisord's environment.
if [ -n "${1:-}" ]; then
  KTD_GGUF_PATH=$(realpath -- "$1")
  export KTD_GGUF_PATH
  ktd plan "$KTD_GGUF_PATH"
fi
mkdir -p run
# A sum, as a key may be among the settings.
settings=$({ env | grep '^KTD_' | LC_ALL=C sort; cat ktd.toml 2>/dev/null || true; } | sha256sum)

if "${supervisor[@]}" pid >/dev/null 2>&1; then
  if [ "$(cat run/settings 2>/dev/null)" != "$settings" ]; then
    echo "Another model or other settings are asked for than the daemon was started with"
    deploy/stop.sh
    supervisord -c deploy/supervisord.conf
  fi
else
  deploy/stop.sh >/dev/null # one that is stopping just now keeps its socket until it is gone
  supervisord -c deploy/supervisord.conf
fi
echo "$settings" >run/settings
"${supervisor[@]}" start ktd >/dev/null 2>&1 || true # it may run already; `ktd wait` says what is wrong if not
ktd wait --timeout 3600
python deploy/first_question.py "$("${supervisor[@]}" pid ktd)"
