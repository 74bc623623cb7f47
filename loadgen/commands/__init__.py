"""What the subcommands of ``loadgen`` do; the command line itself is in ``cli``."""
