"""Constraints for the lowest supported version of every direct dependency: `python .ci/lowest.py > constraints.txt`."""

import re
import tomllib
from pathlib import Path


def lowest(requirement: str) -> str:
    """`name>=1.2` as `name==1.2`, or `name==1.2.*` where a bound has no third number."""
    name, version = re.fullmatch(r"([\w.-]+)>=([\d.]+)", requirement).groups()
    return f"{name}=={version}" if version.count(".") > 1 else f"{name}=={version}.*"


if __name__ == "__main__":
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    print("\n".join(lowest(line) for line in [*project["dependencies"], *project["optional-dependencies"]["test"]]))
