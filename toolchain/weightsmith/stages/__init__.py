"""One verb each: functions from frozen values to a frozen value."""
