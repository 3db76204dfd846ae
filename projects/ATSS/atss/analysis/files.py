"""Where results are written, before anything is worked out."""

from pathlib import Path


def try_to_write(option: str, *files: Path) -> None:
    """Makes the folders of files, and opens each, without a change to its content.

    Args:
        option: by which they were named, for people.

    Raises:
        OSError: in a sentence that names the option and the file.
    """
    for file in files:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            there = file.exists()
            with file.open("a"):
                pass
            if not there:
                file.unlink()
        except OSError as error:
            raise OSError(f"cannot write {option} {file}: {error.strerror}") from error
