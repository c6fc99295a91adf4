"""What stands behind an error is looked for, however the errors refer to each other."""

import errno

from weightsmith.core.errors import of_limits


def test_too_many_open_files_are_found_behind_other_errors() -> None:
    error = ValueError("damaged")
    error.__cause__ = OSError(errno.EMFILE, "Too many open files")

    found = of_limits(error)

    assert found is not None
    assert "ulimit" in found.hint


def test_an_error_that_is_behind_itself_ends_the_search() -> None:
    error, other = ValueError(), ValueError()
    error.__cause__, other.__cause__ = other, error

    assert of_limits(error) is None
