"""The subcommands of `ktd`, one a module.

A module has NAME and HELP (literals, read without importing it), `configure(parser)` and `run(args) -> int`.
"""
