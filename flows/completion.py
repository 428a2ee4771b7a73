"""`panda completion`: the shell completion script. In: nothing. Out: a script on stdout. Cost: 0.2 s."""

from configs.completion import script


def main(argv: list[str]) -> int:
    """Print the script for bash and zsh."""
    from flows.cli import VERBS

    print(script(list(VERBS)))
    return 0
