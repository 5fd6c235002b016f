"""Files that libraries keep in the home, where it can't be written to."""

import os
import secrets
import tempfile
from pathlib import Path

from pipeline.disk.files import write_atomic


def replace_read_only_home() -> None:
    """Send Ray's token and the cache of `datasets` to the folder of temporary files, if the home can't be written to.

    Call it before Ray starts and `datasets` is imported. Ray 2.60 writes the token of a new cluster to ~/.ray
    (ray/_private/authentication/authentication_token_setup.py). All processes of a user find the same folder. What the
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
        token = folder / "ray_auth_token"
        if not token.is_file():
            write_atomic(token, secrets.token_hex(32))
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
