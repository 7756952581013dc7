"""The benchmark of the closed loop: what is asked and how it is decided is in PROTOCOL.md."""
