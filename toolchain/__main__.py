"""The `weightsmith` program, and `python -m toolchain`."""

from toolchain.interrupts import leave_quietly


def main() -> None:
    """Run the command line; what it imports comes after Ctrl-C is taken care of."""
    leave_quietly()
    from toolchain.cli.program import main as run

    run()


if __name__ == "__main__":
    main()
