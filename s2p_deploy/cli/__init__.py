"""The command line: one file per command, each parses, calls one stage function and prints."""

from s2p_deploy.cli.app import main

__all__ = ["main"]
