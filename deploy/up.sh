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
served=${KTD_GGUF_PATH:-the embedded model}

if "${supervisor[@]}" pid >/dev/null 2>&1; then
  if [ "$(cat run/served 2>/dev/null)" != "$served" ]; then
    echo "Another model is asked for than is served: $(cat run/served 2>/dev/null)"
    deploy/stop.sh
    supervisord -c deploy/supervisord.conf
  fi
else
  deploy/stop.sh >/dev/null # one that is stopping just now keeps its socket until it is gone
  supervisord -c deploy/supervisord.conf
fi
echo "$served" >run/served
"${supervisor[@]}" start ktd >/dev/null 2>&1 || true # it may run already; `ktd wait` says what is wrong if not
ktd wait --timeout 3600
python deploy/first_question.py

cat <<'TEXT'

The daemon runs under supervisor:  supervisorctl -c deploy/supervisord.conf status|stop|restart|tail ktd
In Open WebUI (make webui installs one with all of this done) paste plugin/ktd_pipe.py under
Admin Panel -> Functions -> +, switch it on, and set its valves:
  BASE_URL  grpc://127.0.0.1:50051
  API_KEY   (leave it empty)
  MODELS    (leave it empty: the daemon is asked)
Next:  make webui     or talk in this terminal:  .venv/bin/ktd chat --connect grpc://127.0.0.1:50051
TEXT
