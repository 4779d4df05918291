"""The command line, by groups of commands."""

from shiva_dit.cli.command_line import main as main
