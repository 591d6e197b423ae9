"""One module for each command: arguments -> configuration -> one library call -> printing."""
