#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["nox[uv]>=2025.5.1"]
# ///
"""Every check of the monorepo; `nox --list` shows them, CONTRIBUTING.md explains them.

Environments are reused, interpreters are never downloaded, and a missing interpreter skips its session.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import nox

ROOT = Path(__file__).parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
EXTRAS = "[vision,datasets,rl,minari,report]"
PARALLEL = "pytest-xdist>=3.6"
WORKERS = 4  # at the most, as each takes two gigabytes
DIST = ROOT / "dist"
REPORT = "report"  # relative, for it stands in what demos write

nox.needs_version = ">=2025.5.1"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = False
nox.options.download_python = "never"

os.environ["UV_PYTHON_DOWNLOADS"] = "never"
# The environments are kept, so their bytecode is worth writing: importing torch without it takes three times as long.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def packages() -> dict[str, Path]:
    """Folder of every package that exists, by its short name, `shared` first."""
    found = {p.parent.name: p.parent for p in sorted((ROOT / "packages").glob("*/pyproject.toml"))}
    return {"shared": ROOT / "shared", **found}


PACKAGES = packages()
MODULES = {name: f"leap_{name.replace('-', '_')}" for name in PACKAGES}


def group(name: str, folder: Path = ROOT) -> list[str]:
    """Requirements of one dependency group of a pyproject.toml."""
    return list(nox.project.dependency_groups(nox.project.load_toml(folder / "pyproject.toml"), name))


def editable(*names: str) -> list[str]:
    """Installer arguments for the named packages and leap-shared from this checkout.

    leap-shared brings its extras only where it is named itself: a package gets those that its own metadata asks for.
    """
    shared = f"{PACKAGES['shared']}{EXTRAS if 'shared' in names else ''}"
    folders = [shared, *(str(PACKAGES[n]) for n in names if n != "shared")]
    return [argument for folder in folders for argument in ("-e", folder)]


def sources() -> list[str]:
    """Import roots of all packages."""
    return [str(folder / "src") for folder in PACKAGES.values()]


def having(room: str) -> list[str]:
    """Names of the packages with a module, as `demo` or `benchmark`."""
    return [name for name, folder in PACKAGES.items() if (folder / "src" / MODULES[name] / f"{room}.py").exists()]


def pick(session: nox.Session, room: str, *flags: str) -> list[str]:
    """Packages named among the session's arguments, which may hold the flags too, or all that have the room."""
    names = [argument for argument in session.posargs if argument not in flags]
    if strangers := [name for name in names if name not in having(room)]:
        session.error(f"no {room} in {', '.join(strangers)}: name some of {', '.join(having(room))}")
    return names or having(room)


def pytest(session: nox.Session, *arguments: str) -> None:
    """Run pytest in processes of one thread; where markers choose the tests, there may be none (exit code 5)."""
    codes = [0, 5] if "-m" in session.posargs else [0]
    spread = ("-n", str(min(os.cpu_count() or 1, WORKERS)), *arguments, *session.posargs)
    session.run("pytest", *spread, env={"OMP_NUM_THREADS": "1"}, success_codes=codes)


def pythons_for(name: str) -> Iterator[str]:
    """Names of the `tests` sessions of one package."""
    return (f"tests-{python}(package='{name}')" for python in PYTHONS)


@nox.session(python=PYTHONS)
@nox.parametrize("package", [*PACKAGES, "tools"])
def tests(session: nox.Session, package: str) -> None:
    """Run one package's tests; `-- ARGUMENTS` go to pytest."""
    if package == "tools":
        session.install(*group("tools"), PARALLEL)
        pytest(session, "tests")
        return
    session.install(*editable(package), *group("test", PACKAGES[package]), PARALLEL)
    session.chdir(PACKAGES[package])
    pytest(session)


def register_shortcut(package: str) -> None:
    """`nox -s "tests(package='oper')"`: one package on every interpreter that is here."""

    def shortcut(session: nox.Session) -> None:
        for name in pythons_for(package):
            session.notify(name, session.posargs)

    shortcut.__doc__ = f"Run the tests of {package} on every Python."
    nox.session(shortcut, python=False, name=f"tests(package='{package}')", default=False)


for _package in (*PACKAGES, "tools"):
    register_shortcut(_package)


@nox.session(default=False)
@nox.parametrize("package", list(PACKAGES))
def tests_lowest(session: nox.Session, package: str) -> None:
    """Run one package's tests, but for the slow ones, with the lowest versions that its metadata allows."""
    session.install("uv")
    lowest = [*editable(package), *group("test", PACKAGES[package]), PARALLEL]
    session.run("uv", "pip", "install", "--resolution", "lowest-direct", *lowest, silent=True)
    session.chdir(PACKAGES[package])
    pytest(session, "-W", "default", "-m", "not slow")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting with ruff; `-- --fix` mends what can be mended."""
    session.install(*group("lint"))
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", *([] if "--fix" in session.posargs else ["--check"]))


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of every package with mypy --strict."""
    tested = [requirement for folder in PACKAGES.values() for requirement in group("test", folder)]
    session.install(*editable(*PACKAGES), *group("types"), *dict.fromkeys(tested))
    session.run("mypy", *sources())


@nox.session
def boundaries(session: nox.Session) -> None:
    """Check who imports whom: packages never import each other, and layers point one way."""
    session.install(*editable(*PACKAGES), *group("boundaries"))
    leaves = [module for name, module in MODULES.items() if name != "shared"]
    modules = "\n    ".join(MODULES.values())
    packages = "\n    ".join(leaves)
    contracts = [f"[importlinter]\nroot_packages =\n    {modules}"]
    contracts += ["[importlinter:contract:core]\nname = leap_shared knows no package\ntype = forbidden"]
    contracts += [f"source_modules =\n    leap_shared\nforbidden_modules =\n    {packages}"]
    if len(leaves) > 1:
        contracts += ["[importlinter:contract:apart]\nname = packages never know each other\ntype = independence"]
        contracts += [f"modules =\n    {packages}"]
    config = Path(session.create_tmp()) / "importlinter.ini"
    config.write_text("\n".join(contracts) + "\n")
    session.run("lint-imports", "--no-cache", "--config", str(config))
    for folder in PACKAGES.values():
        session.run("lint-imports", "--no-cache", "--config", str(folder / "pyproject.toml"))


def build(session: nox.Session) -> None:
    """Fill dist/ with the sdist and wheel of everything, and check their metadata and contents."""
    session.install(*group("build"))
    shutil.rmtree(DIST, ignore_errors=True)
    for folder in PACKAGES.values():
        session.run("python", "-m", "build", "--installer", "uv", "--outdir", str(DIST), str(folder))
    session.run("twine", "check", "--strict", *map(str, sorted(DIST.iterdir())))
    session.run("check-wheel-contents", *map(str, sorted(DIST.glob("*.whl"))))


@nox.session(default=False)
def wheels(session: nox.Session) -> None:
    """Build everything, then use each wheel in a clean environment that holds only dist/ and the index."""
    build(session)
    work = Path(session.create_tmp()).resolve()
    session.chdir(work)
    shared = next(DIST.glob("leap_shared-*.whl"))
    for name, module in MODULES.items():
        place = work / f"clean-{name}"
        session.run("uv", "venv", "--clear", "--quiet", "--python", sys.executable, str(place))
        scripts = place / ("Scripts" if os.name == "nt" else "bin")
        wheel = next(DIST.glob(f"{module}-*.whl"))
        installer = ["uv", "pip", "install", "--quiet", "--python", str(scripts / "python")]
        session.run(*installer, *sorted({str(shared), str(wheel)}))
        session.run(str(scripts / "python"), "-c", f"import {module}; print({module}.__version__)", external=True)
        script = str(scripts / f"leap-{name}")
        session.run(script, "--version", external=True)
        smoke = ["demo", "--quick", "--out", str(work / f"smoke-{name}")] if name in having("demo") else ["info"]
        session.run(script, *smoke, external=True)


@nox.session(default=False)
def docs(session: nox.Session) -> None:
    """Build the documentation; a warning is an error."""
    session.install(*editable(*PACKAGES), *group("docs"))
    session.run("sphinx-build", "-W", "--keep-going", "-q", "-b", "html", "docs", "docs/_build/html", *session.posargs)


@nox.session(default=False)
def demo(session: nox.Session) -> None:
    """Run every package's headline experiment into report/index.html; `-- --quick` elsewhere, small; `-- NAME` some."""
    names, quick = pick(session, "demo", "--quick"), "--quick" in session.posargs
    report = Path(session.create_tmp()) / "report" if quick else Path(REPORT)
    session.install(*editable(*names))
    for name in names:
        session.run(f"leap-{name}", "demo", "--out", str(report / name), *(["--quick"] if quick else []))
    session.run("leap-shared", "report", *(str(report / name) for name in names), "--out", str(report))


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """Measure every package beside its peers into benchmarks/results; `-- --quick` elsewhere, `-- NAME` some."""
    quick = "--quick" in session.posargs
    for name in pick(session, "benchmark", "--quick"):
        session.install(*editable(name), *group("bench", PACKAGES[name]))
        folder = f"{session.create_tmp()}/{name}" if quick else f"packages/{name}/benchmarks/results"
        session.run(f"leap-{name}", "bench", "--out", folder, *(["--quick"] if quick else []))


@nox.session(default=False)
def audit(session: nox.Session) -> None:
    """Look for unsafe code (bandit) and for known vulnerabilities in what the packages install (pip-audit)."""
    session.install(*editable(*PACKAGES), *group("audit"))
    # Its findings of low severity are those of ruff's rules S, which `lint` holds to with a reason at every exception.
    session.run("bandit", "-q", "-c", "pyproject.toml", "--severity-level", "medium", "-r", *sources())
    session.run("python", "tools/audit.py")


@nox.session(default=False)
def review(session: nox.Session) -> None:
    """Hold the repository and every package to the Scientific Python guide (repo-review)."""
    session.install(*group("review"))
    for folder in (ROOT, *PACKAGES.values()):
        session.run("repo-review", str(folder))


@nox.session(default=False)
def release_check(session: nox.Session) -> None:
    """Check that tag, version, changelog and dependency range agree; `-- TAG` for one release, else all."""
    session.install(*group("tools"))
    session.run("python", "tools/release_check.py", *session.posargs)


@nox.session(python=False, default=False)
def new(session: nox.Session) -> None:
    """Start a package from the template: `nox -s new -- NAME`."""
    if len(session.posargs) != 1 or not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", session.posargs[0]):
        session.error("give one name in lower case, words joined by '-': nox -s new -- crossmodal-adapter")
    session.run(sys.executable, "tools/new_package.py", session.posargs[0])


if __name__ == "__main__":
    nox.main()
