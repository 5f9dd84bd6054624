#!/bin/sh
# docs/results/ablation-report.png: the report of an ablation, as headless Chromium (Debian: apt-get install chromium)
# shows it.
#   docs/screenshot.sh RESULT_FOLDER/report.html docs/results/ablation-report.png [HEIGHT]
set -eu
if [ $# -lt 2 ]; then
  echo "screenshot.sh: error: give a report and the PNG to write: REPORT.html docs/results/ablation-report.png" >&2
  exit 2
fi
browser=$(command -v chromium || command -v chromium-browser || command -v google-chrome) || {
  echo "screenshot.sh: error: no Chromium; apt-get install chromium" >&2
  exit 2
}
profile=$(mktemp -d)
trap 'rm -rf "$profile"' EXIT
# --no-sandbox: root has no other way. Host rules: a report that would load something from a network cannot.
"$browser" --headless --no-sandbox --disable-gpu --hide-scrollbars --user-data-dir="$profile" \
  --host-resolver-rules='MAP * ~NOTFOUND' --window-size="1160,${3:-3600}" \
  --screenshot="$(realpath "$2")" "file://$(realpath "$1")" 2>"$profile/log" || { cat "$profile/log" >&2; exit 1; }
