"""`python -m gptcli`: the same program as `gpt`, and what torchrun starts."""


def main() -> None:
    """Run the command line of this process."""
    # Imported here: each worker process imports this module, and has no use for the program.
    from gptcli.cli import main as run

    run()


if __name__ == "__main__":
    main()
