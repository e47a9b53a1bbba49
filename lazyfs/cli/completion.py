"""`lazyfs completion`: shell completion of commands, options and their values."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script for SHELL.

    \b
    To install it:
      bash   lazyfs completion bash > ~/.local/share/bash-completion/completions/lazyfs
      zsh    lazyfs completion zsh > "${fpath[1]}/_lazyfs"
      fish   lazyfs completion fish > ~/.config/fish/completions/lazyfs.fish
    """
    found = get_completion_class(shell)
    assert found is not None
    root = context.find_root().command
    click.echo(found(root, {}, "lazyfs", "_LAZYFS_COMPLETE").source())
