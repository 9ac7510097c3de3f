"""Start a package from templates/package, so that all of them have the same rooms.

python tools/new_package.py NAME [ROOT]
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

TEMPLATE = Path(__file__).resolve().parents[1] / "templates" / "package"


def render(text: str, name: str) -> str:
    """Put the distribution's name (@name@) and the module's (@module@) into a template text."""
    return text.replace("@name@", name).replace("@module@", f"leap_{name.replace('-', '_')}")


def create(name: str, root: Path) -> Path:
    """Write the package's folder under `root`/packages and return it; refuses to touch one that exists."""
    target = root / "packages" / name
    if target.exists():
        raise SystemExit(f"{target} exists already: choose another name, or remove it first")
    for source in sorted(p for p in TEMPLATE.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
        file = target / render(str(source.relative_to(TEMPLATE)), name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(render(source.read_text(encoding="utf-8"), name), encoding="utf-8")
    shutil.copyfile(root / "LICENSE", target / "LICENSE")
    return target


if __name__ == "__main__":
    print(create(sys.argv[1], Path(*sys.argv[2:3]) if sys.argv[2:] else TEMPLATE.parents[1]))
