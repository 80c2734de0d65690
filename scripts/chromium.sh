#!/bin/sh
# Print the path of a Chromium to test the report with: $CHROMIUM, or the system's; as root on Debian it is installed.
set -eu

find_chromium() {
    for name in "${CHROMIUM:-}" chromium chromium-browser google-chrome-stable google-chrome; do
        if [ -n "$name" ] && path=$(command -v "$name"); then
            echo "$path"
            return
        fi
    done
    return 1
}

find_chromium && exit
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing chromium with apt-get" >&2
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } >/dev/null 2>&1 || true
    find_chromium && exit
fi
echo "The browser tests need Chromium, which was not found: install the package chromium (Debian, Ubuntu: apt-get" >&2
echo "install chromium), or name one in the environment: CHROMIUM=/path/to/chromium make test-browser." >&2
exit 1
