"""A package's command line: which verbs it has, and what happens around each of them."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import tyro

from leap_shared.cli import config as config_file
from leap_shared.cli import output
from leap_shared.cli.context import CONFIG, Context
from leap_shared.errors import UserError, did_you_mean
from leap_shared.files import write_text

__all__ = ["App", "Command"]


@dataclass(frozen=True, kw_only=True)
class Command:
    """Base of a verb: a frozen dataclass whose fields are its flags and whose `run` does the work.

    The docstring of the subclass is its help: one line, then more where needed, then lines under ``Examples:``.
    The verb is the class name in kebab-case unless the class sets `verb`, which may be of two words.
    """

    verb: ClassVar[str] = ""

    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1 or mps."""
    seed: int = 0
    """Seed of every random number generator."""
    out: Path | None = None
    """Folder for what the run writes (runs/VERB where none is given)."""
    json: bool = False
    """Print the result as one JSON document on stdout."""
    config: Path | None = None
    """YAML file with values for these flags; flags on the command line win."""

    def run(self, context: Context) -> object:
        """Do the work; the result is printed: rows as a table, a mapping as lines, None not at all."""
        raise NotImplementedError(f"{type(self).__name__} has no run method")

    @classmethod
    def verb_name(cls) -> str:
        """What is typed to run this command."""
        return cls.verb or re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", cls.__name__).lower()


@dataclass(frozen=True)
class App:
    """Command line of one package: ``app = App("leap-oper", "leap_oper", (Train, Demo))``, then ``app.main()``.

    Adds the flag ``--version`` and, unless a command has that name, the verb `info`. Exit codes: 0, 2 for the user's
    errors (one line on stderr), 130 for an interrupt, 141 for a closed pipe, 1 with its traceback for anything else.
    """

    name: str
    package: str
    commands: tuple[type[Command], ...]

    def main(self, argv: Sequence[str] | None = None) -> NoReturn:
        """Run the command line and exit."""
        try:
            try:
                self._dispatch(list(sys.argv[1:] if argv is None else argv))
            finally:
                if sys.stdout is not None:
                    sys.stdout.flush()
        except UserError as error:
            code, message = 2, f"error: {' '.join(str(error).split())}"
        except KeyboardInterrupt:
            code, message = 130, "interrupted"
        except BrokenPipeError:
            if not output.drop_closed_stdout():
                raise
            sys.exit(141)
        else:
            sys.exit(0)
        print(f"{self.name}: {message}", file=sys.stderr)  # noqa: T201 - the one line for the user
        sys.exit(code)

    def _dispatch(self, arguments: list[str]) -> None:
        verbs = {command.verb_name(): command for command in self.commands}
        verbs.setdefault("info", _info_command(self.package))
        if arguments[:1] == ["--version"]:
            sys.stdout.write(output.version_line(self.name, self.package) + "\n")
            return
        for words in (2, 1):
            verb = " ".join(arguments[:words])
            if len(arguments) >= words and verb in verbs:
                self._run(verb, verbs[verb], arguments[words:])
                return
        group = {verb: kind for verb, kind in verbs.items() if arguments and verb.split()[0] == arguments[0]}
        rest = arguments[1:] if group else arguments
        if not rest or rest[0] in ("-h", "--help"):
            sys.stdout.write(self._help(group or verbs))
            return
        given = " ".join(arguments[:2]) if group else arguments[0]
        raise UserError(f"unknown verb {given!r}: {did_you_mean(given, group or verbs)} (see {self.name} --help)")

    def _run(self, verb: str, kind: type[Command], arguments: list[str]) -> None:
        command = self._parse(verb, kind, arguments)
        if command.seed < 0:
            raise UserError(f"seed {command.seed} is negative: give 0 or more")

        def write_config(folder: Path) -> None:
            head = f"# {output.version_line(self.name, self.package)}\n"
            repeat = f"# {self.name} {verb} --config {shlex.quote(str(folder / CONFIG))}\n"
            write_text(folder / CONFIG, head + repeat + config_file.dump(command, verb))

        folder = command.out or Path("runs", *verb.split())
        context = Context(command.device, command.seed, folder, write_config)
        try:
            with output.stdout_to_stderr() if command.json else contextlib.nullcontext():
                if command.device not in ("auto", "cpu"):
                    _ = context.device
                if command.out is not None:
                    _ = context.out
                result = command.run(context)
        except UserError:
            context.discard()
            raise
        finally:
            context.close()
        if context.is_main:
            output.emit(result, as_json=command.json)

    def _parse(self, verb: str, kind: type[Command], arguments: list[str]) -> Command:
        options: dict[str, Any] = {"prog": f"{self.name} {verb}", "description": inspect.getdoc(kind)}
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--config", nargs="?")
        path = finder.parse_known_args(arguments)[0].config
        if path is not None:
            options["default"] = config_file.load(Path(path), kind, verb)
        complaint = io.StringIO()
        try:
            with contextlib.redirect_stderr(complaint):
                command: Command = tyro.cli(kind, args=arguments, **options)
                return command
        except SystemExit as stop:
            cause: BaseException | None = stop
            while cause is not None:
                if isinstance(cause, UserError):
                    raise cause from None
                cause = cause.__context__
            if stop.code:
                raise UserError(_one_line(complaint.getvalue())) from None
            raise

    def _help(self, verbs: dict[str, type[Command]]) -> str:
        documents = {verb: (inspect.getdoc(kind) or "").partition("Examples:") for verb, kind in verbs.items()}
        width = max(map(len, verbs))
        lines = [f"usage: {self.name} VERB [FLAGS]", "", "verbs:"]
        lines += [f"  {verb:{width}}  {text.strip().splitlines()[0]}" for verb, (text, _, _) in documents.items()]
        examples = [line.strip() for _, _, text in documents.values() for line in text.strip().splitlines()[:1]]
        lines += ["", "examples:", *(f"  {example}" for example in examples)] if examples else []
        return "\n".join(
            [*lines, "", f"{self.name} VERB --help explains one; {self.name} --version says what runs.", ""]
        )


def _one_line(box: str) -> str:
    """The text in the box that tyro draws around a complaint, without its title; semicolons part paragraphs."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()[1:]
    text = " ".join(line.strip("│╭╮╰╯ ") for line in lines)
    paragraphs = [" ".join(part.split()) for part in re.split("[─-]{8,}", text)]
    return "; ".join(paragraph.rstrip(". ") for paragraph in paragraphs if paragraph)


def _info_command(package: str) -> type[Command]:
    @dataclass(frozen=True)
    class Info(Command):
        """Say what is installed, what is missing and what works on this machine."""

        def run(self, context: Context) -> object:  # noqa: ARG002 - the interface of every verb
            return output.installation(package)

    return Info
