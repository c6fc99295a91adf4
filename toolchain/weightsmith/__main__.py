"""The `weightsmith` program, and `python -m weightsmith`."""

from weightsmith.interrupts import leave_quietly


def main() -> None:
    """Run the command line; what it imports comes after Ctrl-C is taken care of."""
    leave_quietly()
    from weightsmith.cli.program import main as run

    run()


if __name__ == "__main__":
    main()
