"""What stands behind an error is looked for, however the errors refer to each other."""

import errno

from weightsmith.core.errors import of_limits


def test_too_many_open_files_are_found_behind_other_errors_that_may_form_a_loop() -> None:
    error, other = ValueError("damaged"), ValueError()
    error.__cause__ = OSError(errno.EMFILE, "Too many open files")
    found = of_limits(error)
    assert found is not None
    assert "ulimit" in found.hint

    error.__cause__, other.__cause__ = other, error
    assert of_limits(error) is None
