"""`ganq completion`: the shell's completion script."""

import click

from cli.ui.lazy import examples

INSTALL = {
    "bash": 'add to ~/.bashrc:  eval "$(ganq completion bash)"',
    "zsh": 'add to ~/.zshrc, after compinit:  eval "$(ganq completion zsh)"',
    "fish": "ganq completion fish > ~/.config/fish/completions/ganq.fish",
}


@click.command(
    epilog=examples(
        'eval "$(ganq completion bash)"', "ganq completion fish > ~/.config/fish/completions/ganq.fish"
    )
)
@click.argument("shell", type=click.Choice([*INSTALL]))
def completion(shell: str) -> int:
    """Print the completion script of SHELL: commands, options, job ids and names."""
    from click.shell_completion import get_completion_class

    from cli.main import COMPLETE, root

    found = get_completion_class(shell)
    assert found is not None
    maker = found(root, {}, "ganq", COMPLETE)
    # Not maker.source(): on bash it starts a bash, only to look at its version.
    click.echo(f"# To install it: {INSTALL[shell]}")
    click.echo(maker.source_template % maker.source_vars())
    return 0
