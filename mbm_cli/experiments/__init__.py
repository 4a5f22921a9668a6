"""The experiments behind the commands: what is run, in which order, what comes out."""
