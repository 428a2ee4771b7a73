"""From argv to checked settings: what every command with settings does first.

In: argv. Out: `CommandLine` and `Loaded`, or one `ConfigError` with the problems of flags, files and values together;
``--help`` prints the flags with the values that the rest of argv would give them, and exits. Cost: ~0.4 s.
"""

from configs.errors import ConfigError
from configs.flags import CommandLine, Shown, Switch, build_parser, read
from configs.load import Loaded, load


def configure(
    prog: str, description: str, argv: list[str], switches: list[Switch], names: set[str] | None = None
) -> tuple[CommandLine, Loaded]:
    """Read argv and load the configuration it means; `names` limits the flags to those the command uses."""
    if {"-h", "--help"} & set(argv):
        build_parser(prog, description, switches, names, _shown(prog, argv, switches)).parse_args(["--help"])
    line, problems = read(build_parser(prog, description, switches, names), argv)
    return line, load(line.values, line.overrides, getattr(line.switches, "conf_path", None), problems)


def _shown(prog: str, argv: list[str], switches: list[Switch]) -> dict[str, Shown]:
    """The values that the rest of argv means; none when there is something wrong with it."""
    rest = [text for text in argv if text not in ("-h", "--help")]
    try:
        _, loaded = configure(prog, "", rest, switches)
    except ConfigError:
        return {}
    return {name: Shown(getattr(loaded.settings, name), origin) for name, origin in loaded.origins.items()}
