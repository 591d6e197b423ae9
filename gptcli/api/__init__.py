"""The verbs as functions, one module each: for the commands, for notebooks and for programs.

They raise `GptError` and print nothing; notes and warnings go to Python's logger `gptcli`, which
the command line shows. `gptcli` offers their public names; docs/python.md shows them at work.
"""
