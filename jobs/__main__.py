"""`python -m jobs`: the `flashu` command, where it is not installed as one."""

from jobs.cli.main import main

main()
