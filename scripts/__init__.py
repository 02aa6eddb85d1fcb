"""The command line: one thin file a command.

May import: inner, meta, search, studies.
"""
