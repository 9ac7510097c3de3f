"""The site: guides from the README files, changelogs, and an API page per distribution, all found by looking.

Pages made here go to docs/packages/, which is written anew at every build.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
from functools import partial
from pathlib import Path

import tomllib

DOCS = Path(__file__).parent
ROOT = DOCS.parent
MADE = DOCS / "packages"
FOLDERS = [ROOT / "shared", *sorted(file.parent for file in ROOT.glob("packages/*/pyproject.toml"))]
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text()).get("tool", {}).get("leap", {}).get("repository", "")
PAGES = {ROOT / "CONTRIBUTING.md": DOCS / "contributing.md", ROOT / "SECURITY.md": DOCS / "security.md"}
for folder in FOLDERS:
    PAGES |= dict.fromkeys((folder, folder / "README.md"), MADE / folder.name / "index.md")
    PAGES[folder / "CHANGELOG.md"] = MADE / folder.name / "changelog.md"
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)#\s:]+)(?P<anchor>#[^)\s]*)?\)")

project = "leap"
author = "The leap developers"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "packages/readme.md"]
default_role = "literal"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_use_ivar = True
html_theme = "furo"
html_title = "leap"
html_show_copyright = False


def relink(link: re.Match[str], source: Path, base: Path) -> str:
    """Point a link of `source` at its page, as seen from the folder `base`; Sphinx refuses a wrong one."""
    target = (source.parent / link["target"]).resolve()
    anchor = link["anchor"] or ""
    if target in PAGES or (link["image"] and target.exists()):
        return f"{link['image']}[{link['text']}]({os.path.relpath(PAGES.get(target, target), base)}{anchor})"
    if not target.exists():
        return link[0]
    return (
        f"[{link['text']}]({REPOSITORY}/blob/main/{target.relative_to(ROOT)}{anchor})" if REPOSITORY else link["text"]
    )


def page(source: Path, base: Path) -> str:
    """The Markdown of `source` with its links made right for a page in the folder `base`."""
    return LINK.sub(partial(relink, source=source, base=base), source.read_text(encoding="utf-8"))


def exports(file: Path) -> list[str]:
    """Names that a module lists in `__all__`, without importing it."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return list(ast.literal_eval(node.value))
    return []


def public_modules(package: Path) -> list[str]:
    """The package itself where it exports more than its version, else its public modules and subpackages."""
    if set(exports(package / "__init__.py")) - {"__version__"}:
        return [package.name]
    files = {*package.glob("*.py"), *package.glob("*/**/__init__.py")} - {package / "__init__.py"}
    parts = [file.relative_to(package.parent).with_suffix("").parts for file in sorted(files) if exports(file)]
    names = [".".join(part for part in path if part != "__init__") for path in parts]
    return [name for name in names if "._" not in name]


def api(package: Path) -> str:
    """The API page of one import package."""
    automodule = "## {0}\n\n```{{eval-rst}}\n.. automodule:: {0}\n   :members:\n```\n"
    return "\n".join(["# API\n", *(automodule.format(name) for name in public_modules(package))])


def make_pages() -> None:
    """Write docs/packages/."""
    shutil.rmtree(MADE, ignore_errors=True)
    for folder in FOLDERS:
        target = MADE / folder.name
        target.mkdir(parents=True)
        contents = "\n```{toctree}\n:hidden:\n\napi\nchangelog\n```\n"
        (target / "index.md").write_text(page(folder / "README.md", target) + contents, encoding="utf-8")
        (target / "changelog.md").write_text(page(folder / "CHANGELOG.md", target), encoding="utf-8")
        (target / "api.md").write_text(api(next((folder / "src").glob("leap_*/"))), encoding="utf-8")
    (MADE / "readme.md").write_text(page(ROOT / "README.md", DOCS), encoding="utf-8")


make_pages()
