"""The terminal: console, plan, live display, summary; with commands the only room that prints."""
