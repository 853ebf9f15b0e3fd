"""`ganq completion`: print the completion script of a shell."""

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
    """Print the completion script of SHELL, which completes commands, options, job ids and names."""
    from click.shell_completion import get_completion_class

    from cli.main import COMPLETE, root

    completer_class = get_completion_class(shell)
    assert completer_class is not None
    completer = completer_class(root, {}, "ganq", COMPLETE)
    # Not completer.source(), which starts a bash to check its version.
    click.echo(f"# To install it: {INSTALL[shell]}")
    click.echo(completer.source_template % completer.source_vars())
    return 0
