#!/usr/bin/env bash
# Installs the Debian/Ubuntu packages that are named and missing: says which first, uses apt where root or sudo allows
# it, and otherwise prints the one line to paste. usage: require.sh PACKAGE...
set -euo pipefail

missing=()
for package in "$@"; do
  case $package in
    g++) command -v g++ >/dev/null || missing+=("$package") ;;
    ccache | make | git | objdump) command -v "$package" >/dev/null || missing+=("$package") ;;
    binutils) command -v objdump >/dev/null || missing+=("$package") ;;
    chromium) command -v chromium >/dev/null || missing+=("$package") ;;
    chromium-driver) command -v chromedriver >/dev/null || missing+=("$package") ;;
    qemu-user-static) command -v qemu-x86_64-static >/dev/null || missing+=("$package") ;;
    python3-venv) "${PYTHON:-python3}" -c 'import ensurepip, venv' 2>/dev/null || missing+=("$package") ;;
    python3-dev)
      header='import sysconfig, pathlib, sys; sys.exit(not (pathlib.Path(sysconfig.get_path("include")) / "Python.h").exists())'
      "${PYTHON:-python3}" -c "$header" || missing+=("$package")
      ;;
    *) dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package") ;;
  esac
done
[ ${#missing[@]} -eq 0 ] && exit 0

line="apt-get update && apt-get install -y --no-install-recommends ${missing[*]}"
if ! command -v apt-get >/dev/null; then
  echo "Please install these first (this system has no apt-get): ${missing[*]}" >&2
  exit 1
fi
if [ "$(id -u)" = 0 ]; then
  as_root=""
elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
  as_root="sudo"
else
  echo "Missing system packages. Please run:  sudo sh -c '$line'" >&2
  exit 1
fi
echo "Installing system packages: ${missing[*]}"
DEBIAN_FRONTEND=noninteractive $as_root sh -c "$line" >/dev/null
