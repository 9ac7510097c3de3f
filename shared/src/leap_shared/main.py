"""The command `leap-shared`: verbs, no logic."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from leap_shared.cli import App, Command, Context
from leap_shared.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Report(Command):
    """Join the sections that demos wrote into one page, OUT/index.html.

    Examples:
        leap-shared report report/oper report/flatten --out report
    """

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional] = field(default=())
    """Folders of demos, each with its section.json and section.html."""

    def run(self, context: Context) -> object:
        """Write the page and say where it is."""
        from leap_shared.experiment import join

        if not self.folders:
            raise UserError(
                "no folder given: name the folders that demos wrote, as in `leap-shared report report/oper`"
            )
        return {"report": str(join(self.folders, context.out))}


app = App(name="leap-shared", package="leap_shared", commands=(Report,))


def main() -> None:
    """Entry point of the console script."""
    app.main()
