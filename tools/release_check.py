"""Check that tag, version, changelog and dependency range of the distributions agree.

    python tools/release_check.py [TAG | all] [--notes]

A tag is leap-<name>-v<version>. Without one, or with `all`, every distribution is checked. `--notes` prints the
changelog section of the tagged version instead of the closing line. Exits with 1 after naming all that disagrees.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE_PAPER = "https://arxiv.org/abs/0000.00000"
HEADING = re.compile(r"^## \[([^\]]+)\](?: - (\S+))?[ \t]*$", re.MULTILINE)


@dataclass(frozen=True)
class Distribution:
    """One folder with a pyproject.toml: what it says about itself."""

    name: str
    folder: Path
    project: dict[str, Any]
    version: str | None
    sections: dict[str, tuple[str | None, str]]


def text(file: Path) -> str:
    """The file's text, empty where there is no such file."""
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def changelog_sections(changelog: str) -> dict[str, tuple[str | None, str]]:
    """Date and body of every section of a changelog in the Keep a Changelog form, by version."""
    _, *parts = HEADING.split(changelog)
    return {
        version: (day, body.strip()) for version, day, body in zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    }


def read(folder: Path) -> Distribution:
    """Collect what a distribution says about itself."""
    name = f"leap-{folder.name}"
    module = text(folder / "src" / name.replace("-", "_") / "__init__.py")
    version = re.search(r'^__version__ = "([^"]+)"$', module, re.MULTILINE)
    project = tomllib.loads(text(folder / "pyproject.toml")).get("project", {})
    return Distribution(
        name, folder, project, version and version[1], changelog_sections(text(folder / "CHANGELOG.md"))
    )


def changelog_problems(own: Distribution, tagged: bool) -> list[str]:
    """What is wrong with the changelog section of the distribution's version; before its first tag it needs none."""
    if own.sections.keys() == {"Unreleased"} and not tagged:
        return []
    if own.version not in own.sections:
        return [f"CHANGELOG.md has no section for {own.version}: add '## [{own.version}] - YYYY-MM-DD'"]
    day, body = own.sections[own.version]
    problems = [] if body else [f"CHANGELOG.md says nothing under {own.version}: describe what a user gets"]
    try:
        late = date.fromisoformat(day or "") > date.today()
    except ValueError:
        return [*problems, f"CHANGELOG.md dates {own.version} {day!r}: write the date as YYYY-MM-DD"]
    return [*problems, f"CHANGELOG.md dates {own.version} {day}, which is in the future"] if late else problems


def bounded(specifier: SpecifierSet) -> bool:
    """Whether some version is too high for the specifier."""
    return any(part.operator in {"<", "<=", "==", "===", "~="} for part in specifier)


def dependency_problems(own: Distribution, shared: str | None) -> list[str]:
    """What is wrong with the distribution's requirements on distributions of this repository."""
    extras = own.project.get("optional-dependencies", {}).values()
    required = [Requirement(line) for line in own.project.get("dependencies", [])]
    asked = required + [Requirement(line) for lines in extras for line in lines]
    names = {re.sub(r"[-_.]+", "-", requirement.name).lower() for requirement in asked}
    strangers = sorted(name for name in names - {"leap-shared", own.name} if name.startswith("leap-"))
    problems = [f"depends on {name}: a package knows leap-shared and never another package" for name in strangers]
    if own.name == "leap-shared":
        return problems
    if "leap-shared" not in {requirement.name for requirement in required}:
        problems.append("does not depend on leap-shared: add it with a range, for example 'leap-shared>=0.1,<0.2'")
    for requirement in asked:
        if requirement.name != "leap-shared":
            continue
        if shared and not requirement.specifier.contains(shared, prereleases=True):
            problems.append(f"asks for '{requirement}', which leaves out the current leap-shared {shared}")
        if not bounded(requirement.specifier):
            problems.append(f"asks for '{requirement}' without an upper bound: add one, for example '<0.2'")
    return problems


def problems_of(own: Distribution, shared: str | None, licence: str, tagged: bool) -> list[str]:
    """Everything that disagrees inside one distribution."""
    problems = []
    if own.project.get("name") != own.name:
        problems.append(f"pyproject.toml names {own.project.get('name')!r}, its folder says {own.name!r}")
    if not own.project.get("description", "").strip():
        problems.append("pyproject.toml has no description")
    if TEMPLATE_PAPER in own.project.get("urls", {}).values() and tagged:
        problems.append("pyproject.toml still has the template's address of the paper: put in the right one")
    if text(own.folder / "LICENSE") != licence:
        problems.append("LICENSE is missing or differs from the one at the root: copy that one")
    if own.version is None:
        problems.append("its __init__.py has no line '__version__ = \"...\"'")
    else:
        problems += changelog_problems(own, tagged)
    return problems + dependency_problems(own, shared)


def main() -> None:
    """Read the command line, check, and exit with 1 where something disagrees."""
    parser = argparse.ArgumentParser(description="Check that tag, version, changelog and dependency range agree.")
    parser.add_argument("tag", nargs="?", default="all", help="leap-<name>-v<version>, or all (the default)")
    parser.add_argument("--notes", action="store_true", help="print the changelog section of the tagged version")
    arguments = parser.parse_args()
    folders = [ROOT / "shared", *sorted(file.parent for file in ROOT.glob("packages/*/pyproject.toml"))]
    known = {own.name: own for own in map(read, folders)}
    shared = known["leap-shared"].version
    chosen, wrong, tagged = list(known.values()), [], arguments.tag != "all"
    if tagged:
        tag = re.fullmatch(r"(leap-[a-z0-9-]+)-v(\d.*)", arguments.tag)
        if not tag or tag[1] not in known:
            sys.exit(f"the tag {arguments.tag!r} is not leap-<name>-v<version> with a name out of: {', '.join(known)}")
        chosen = [known[tag[1]]]
        if chosen[0].version != tag[2]:
            wrong.append(f"{tag[1]}: the tag says {tag[2]}, __version__ says {chosen[0].version}")
    elif arguments.notes:
        parser.error("--notes needs a tag")
    licence = text(ROOT / "LICENSE")
    wrong += [f"{own.name}: {problem}" for own in chosen for problem in problems_of(own, shared, licence, tagged)]
    if wrong:
        sys.exit("\n".join(wrong))
    if arguments.notes:
        print(chosen[0].sections[chosen[0].version or ""][1])
    else:
        print(f"{', '.join(own.name for own in chosen)}: all agree")


if __name__ == "__main__":
    main()
