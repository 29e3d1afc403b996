"""Writes the glosses of WordNet 3.0 as JSON lines: words and what they mean, in English that people wrote.

They come from Debian's package wordnet-base, which `apt-get download` fetches: no root is needed, and nothing is
installed. The licence, which stands in the package, allows any use that names it.

    python sweeps/prepare/wordnet.py runs/wordnet.jsonl
    python -m memray run sweeps/duration.py -p rows=runs/wordnet.jsonl
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

PARTS = ("noun", "verb", "adj", "adv")


def glosses(folder: Path) -> Iterator[dict[str, str]]:
    """The first gloss of each word or phrase, without examples."""
    seen = set()
    for part in PARTS:
        for line in (folder / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):  # the licence
                continue
            fields, _, gloss = line.partition(" | ")
            word = fields.split()[4].partition("(")[0].replace("_", " ")
            definition = gloss.partition('; "')[0].strip()
            if word not in seen and definition:
                seen.add(word)
                yield {"prefix": word, "reference": definition, "part": part}


def main(path: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(["apt-get", "download", "wordnet-base"], cwd=scratch, check=True)
        (package,) = Path(scratch).glob("wordnet-base_*.deb")
        subprocess.run(["dpkg-deb", "-x", package.name, "."], cwd=scratch, check=True)
        rows = list(glosses(Path(scratch) / "usr/share/wordnet"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} rows in {path}")  # noqa: T201, a script


if __name__ == "__main__":
    main(Path(sys.argv[1]))
