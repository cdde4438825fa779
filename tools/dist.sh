#!/bin/sh
# Builds wheel and source distribution of the last commit: the same commit gives the same bytes, wherever and whenever.
#   tools/dist.sh PYTHON FOLDER       (make dist)
# Left to itself, setuptools keeps the modes that the checkout's files happen to have and the time of building.
set -eu
python=$(command -v "$1")
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
mkdir -p "$2"
out=$(cd "$2" && pwd)
umask 022
export LC_ALL=C SOURCE_DATE_EPOCH="$(git log -1 --format=%ct)"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/commit" "$work/source"
git archive HEAD | tar -x --no-same-permissions -C "$work/commit"
(cd "$work/commit" && "$python" -m build --no-isolation --wheel --sdist --outdir "$work/out" . >"$work/log") || { cat "$work/log" >&2; exit 1; }
for source in "$work"/out/*.tar.gz; do
  tar -xz --no-same-permissions -C "$work/source" -f "$source"
  tar -c --format=gnu --sort=name --mtime="@$SOURCE_DATE_EPOCH" --owner=0 --group=0 --numeric-owner \
    -C "$work/source" "$(ls "$work/source")" | gzip -n9 >"$source"
done
cp "$work"/out/* "$out"
(cd "$out" && sha256sum -- *.whl *.tar.gz)
