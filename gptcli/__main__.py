"""`python -m gptcli`: the same program as `gpt`, and what torchrun starts."""

from gptcli.cli import main

if __name__ == "__main__":
    main()
