#!/usr/bin/env bash
# The fast suite with the lowest versions that pyproject.toml allows and with the newest, each in a fresh environment.
#
#   scripts/check_versions.sh                          both, with this machine's python3
#   scripts/check_versions.sh lowest-direct 3.12       one of them, with another Python
#   scripts/check_versions.sh highest 3.11 tests/text  some of the tests
#
# Needs uv (`pip install uv`). Environments are kept in $CHECK_VERSIONS if it is set, and removed after the run if not.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ $# -gt 0 ]; then resolutions=("$1"); else resolutions=(lowest-direct highest); fi
python=${2:-$(python3 -c 'import sys; print(sys.executable)')}
tests=("${@:3}")
place=${CHECK_VERSIONS:-$(mktemp -d)}
[ -n "${CHECK_VERSIONS:-}" ] || trap 'rm -rf "$place"' EXIT

failed=()
for resolution in "${resolutions[@]}"; do
    environment="$place/$resolution"
    uv venv --quiet --allow-existing --python "$python" "$environment"
    uv pip install --quiet --python "$environment" --resolution "$resolution" -e ".[dev]"
    echo "--- $resolution: $(uv pip freeze --quiet --python "$environment" \
        | grep -E '^(torch|transformers|huggingface-hub|accelerate|datasets|diffusers|pillow|pydantic)==' | tr '\n' ' ')"
    (export PATH="$environment/bin:$PATH" && python -m pytest "${tests[@]}") || failed+=("$resolution")
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
