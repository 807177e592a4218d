def main() -> None:
    """Entry point of the `interlace` command."""
