"""Files that libraries keep in the home: where it can't be written to, and where others could read them."""

import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path


def replace_read_only_home() -> None:
    """Send Ray's token and the cache of `datasets` to the folder of temporary files, if the home can't be written to.

    Call it before Ray starts and `datasets` is imported. All processes of a user find the same folder. What the
    environment sets stays. Raises ValueError where another user owns the folder.
    """
    if os.access(Path.home(), os.W_OK):
        return
    folder = Path(tempfile.gettempdir()) / f"alignyard-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise ValueError(f"'{folder}' belongs to another user; set TMPDIR to a folder of your own")
    os.environ.setdefault("HF_HOME", str(folder / "huggingface"))
    if not os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}:
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(folder / "ray_auth_token")
        write_token()


def write_token() -> None:
    """Write a token for Ray's clusters where this user has none, and let nobody else read it: whoever has it can run
    programs as this user.

    Ray 2.60 would write it itself, readable by all (ray/_private/authentication/authentication_token_setup.py).
    """
    if "RAY_AUTH_TOKEN" in os.environ:
        return
    file = _token_file()
    if not file.is_file():
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(prefix=".token-", dir=file.parent)  # readable by its owner alone
        with open(descriptor, "w", encoding="utf-8") as stream:  # noqa: PTH123  Path can't open a descriptor
            stream.write(secrets.token_hex(32))
        with suppress(FileExistsError):  # another process was faster
            os.link(partial, file)
        Path(partial).unlink()
    restrict_token()


def restrict_token() -> None:
    """Let nobody but this user read the token, if this user owns its file."""
    file = _token_file()
    if file.is_file() and file.stat().st_uid == os.getuid() and file.stat().st_mode & 0o077:
        file.chmod(0o600)


def _token_file() -> Path:
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
