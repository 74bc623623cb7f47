"""What inference engines say on the wire, one dialect each. Pure: bytes in, facts out."""
