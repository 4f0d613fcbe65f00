"""The YAML files of `conf/` that the project ships, without a user's own."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONF = ROOT / "conf"


def options(group: str) -> list[str]:
    """Return the names of a group's shipped options; without git, of all its files."""
    listed = subprocess.run(
        ["git", "ls-files", "--", f"conf/{group}/*.yaml"], cwd=ROOT, capture_output=True, text=True
    )
    paths = map(Path, listed.stdout.split()) if listed.stdout else (CONF / group).glob("*.yaml")
    return sorted(path.stem for path in paths)
