#!/bin/sh
# Installs what every node needs into the environment whose `python` is the first on the PATH: the packages of
# pyproject.toml at the versions of constraints.txt. The project itself is not installed, for every job brings its own.
set -eu
infra=$(cd "$(dirname "$0")" && pwd)

for compiler in g++ ninja; do # DeepSpeed compiles one of its operations when it is first used
    command -v "$compiler" >/dev/null || { echo "$compiler must be on the PATH, but is not; install it" >&2; exit 1; }
done

requirements=$(mktemp)
trap 'rm -f "$requirements"' EXIT
python - "$infra/../pyproject.toml" >"$requirements" <<'END'
import sys
import tomllib

with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"]
print(*project["dependencies"], *extras["lora"], *extras["hub"], *extras["text"], *extras["cluster"], sep="\n")
END

python -m pip install --quiet -c "$infra/constraints.txt" torch
# boto3: Ray's autoscaler on AWS, and working directories that lie in a bucket.
python -m pip install --quiet -c "$infra/constraints.txt" -r "$requirements" boto3

# A profiler on the public index has this project's name, and Ray's dashboard runs whatever has it.
python -m pip uninstall --quiet --yes memray
cd / # where no folder is called memray
python - <<'END'
import importlib.util
import shutil

found = importlib.util.find_spec("memray"), shutil.which("memray")
assert found == (None, None), f"nothing named memray may be installed, but there is {found}"
END
